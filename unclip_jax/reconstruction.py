"""Pictures drawn from a part of what CLIP knows of them: principal components of z_img (unCLIP, section 4)."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from unclip_jax import pca as components
from unclip_jax.data import loader
from unclip_jax.data.source import Source
from unclip_jax.diffusion.sample import picture_keys
from unclip_jax.errors import UserError, is_whole
from unclip_jax.pca import PCA
from unclip_jax.runner import Runner
from unclip_jax.settings import check_numbers


class Reconstruction(Runner):
    """The methods of `UnCLIP` about principal components."""

    def reconstruct(
        self,
        images: Sequence[np.ndarray],
        dims: Sequence[int],
        seed: int = 0,
        *,
        pca: PCA | None = None,
        batch_size: int = 8,
        return_stages: bool = False,
        progress: bool = True,
        **settings,
    ):
        """Draws each image from the first k principal components of its CLIP embedding, for each k of `dims`.

        Ramesh et al. 2022, figure 7: what the components hold, by decreasing variance. All pictures of an image are
        drawn with the same noise, and without a caption -> u8[len(images) * len(dims), H, W, 3], image by image.

        Args:
          images: as of `variations`.
          dims: each of them within the components that there are.
          pca: the components; None: those kept with the stack's autoregressive prior. See `components_of`.
          seed, batch_size, return_stages, progress, **settings: as of `generate`.
        """
        check_numbers(seed, 1, batch_size)
        pca = self.kept_components() if pca is None else pca
        if not np.iterable(dims) or not len(dims) or not all(is_whole(k, 1, pca.std.shape[0]) for k in dims):
            what = f"dims={dims!r} must be whole numbers in 1 … {pca.std.shape[0]}, the components that there are"
            raise UserError(what, "name fewer, or measure all components on data")
        used = self.embedded_settings(settings)
        z_img = self.embed_images(images, batch_size=batch_size, progress=progress)
        parts = [pca.keep(int(k)) for k in dims]
        z = np.stack([np.asarray(part.back(part.project(z_img)), np.float32) for part in parts], axis=1)
        z = z.reshape(-1, z.shape[-1])
        cond = {**self._captions([""] * len(z)), "z_img": z}
        keys = picture_keys(seed, len(images), 1)[np.arange(len(images)).repeat(len(dims))]
        return self._draw(cond, keys, used, batch_size, return_stages, progress)

    def kept_components(self) -> PCA:
        """The principal components of z_img that the stack's autoregressive prior works with."""
        if "prior_ar" not in self.tasks:
            what = "this stack has no autoregressive prior, whose principal components could be used"
            raise UserError(what, "measure them on data: --data shapes, or UnCLIP.components_of")
        return self.tasks["prior_ar"].pca(self.params["prior_ar"])

    def components_of(self, source: Source, num: int = 4096, batch_size: int = 64) -> PCA:
        """All principal components of z_img, measured on `num` pictures of a data source (`data.make`)."""
        width, vision = self._clip().embed_dim, self._vision
        if vision is None:
            raise UserError("this stack's CLIP has no image tower, so it has no components", "give another stack")
        side, task = vision["image_size"], self.tasks["clip"]
        if not is_whole(num, width + 1):
            what = f"num={num!r} pictures do not tell all {width} components of this CLIP's embeddings"
            raise UserError(what, f"measure at least {width + 1}, better ten times as many")
        measure = jax.jit(lambda params, x: components.batch_moments(task.sample(params, {"image": x}, None)))
        params, seen, size = self.params["clip"], None, min(num, batch_size)
        stream = loader.batches(source, None, size)
        for _ in range(-(-num // size)):
            image = next(stream)["image"]
            if image.shape[1] != side:
                raise UserError(f"the source's pictures have {image.shape[1]} pixels, and this CLIP takes {side}")
            seen = components.merge(seen, size, *jax.device_get(measure(params, image)))
        return components.fit(seen)
