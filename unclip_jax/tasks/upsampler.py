"""The upsamplers' training and sampling (unCLIP, section 2.1): diffusion over large images given small ones.

The small image is enlarged and concatenated to the noised one. In training it is blurred a little, or degraded more
variously by the loader (`loader.degrade`), so that the network does not lean on details that a drawn image lacks;
networks without attention train on crops and draw at any size. No caption enters; GLIDE's, whose network is a `Decoder`
without CLIP, takes one.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from unclip_jax.data.images import gaussian_blur, resize
from unclip_jax.diffusion.draw import draw
from unclip_jax.diffusion.guide import is_one, within
from unclip_jax.diffusion.sample import initial_noise
from unclip_jax.diffusion.schedule import Schedule, make_schedule, respace
from unclip_jax.diffusion.tile import check_tiles, tiled
from unclip_jax.errors import UserError
from unclip_jax.models.decoder import Decoder
from unclip_jax.models.unet import UNet
from unclip_jax.tasks import pictures
from unclip_jax.tasks.pictures import image_loss, make_network, mean_loss, split_variance


@dataclasses.dataclass(frozen=True)
class UpsamplerTask:
    """ADM UNet over [noised image, enlarged small image], which a caption conditions only where it is a `Decoder`.

    Attributes:
      model: a `Decoder` where the config's model has the block `unet`.
      image_size: side of the large images in pixels; training images may be smaller crops.
      factor: large side / small side (the paper: 4).
      last_steps: so many steps of least noise are drawn by a second network of the same form (Karlo: 1). Parameters
        are then {"net": …, "last": …}, for sampling only.
      blur: standard deviation in small-image pixels of the Gaussian blur, kernel 3 (the paper: 0.6).
      blur_share: share of examples blurred. Not in the paper; 1/2, so that unblurred small images are known too.
      enlarge: how the small image is brought to the large one's size, "bicubic" or "linear" (GLIDE).
      inpaint: the network also sees a known large picture and where it is known, as the decoder's can.
      sampler: defaults of `sample`: what `diffusion.draw` takes (name, steps, …), and temperature, a factor on the
        first noise (GLIDE: 0.997).
    """

    model: UNet | Decoder
    schedule: Schedule
    image_size: int
    sampler: dict[str, Any]
    factor: int = 4
    target: str = "eps"
    weighting: str = "none"
    vlb_weight: float = 0.0
    blur: float = 0.6
    blur_share: float = 0.5
    last_steps: int = 0
    enlarge: str = "bicubic"
    inpaint: bool = False

    @classmethod
    def from_config(cls, config, clip=None):
        """Captions, where they enter, are those of `config.tokenizer`; the output's width is the objective's."""
        if "unet" in config.model:
            net = make_network(config, None)
        else:
            net = UNet(**{**config.model.to_dict(), **pictures.channels(config.objective)})
        sampler, schedule = config.sampler.to_dict(), make_schedule(**config.diffusion)
        if not is_one(sampler.get("guidance", 1)):
            raise UserError(f"sampler.guidance={sampler['guidance']}: an upsampler is not guided", "leave it out")
        return cls(net, schedule, config.data.size, sampler, **config.objective)

    def init(self, rng):
        side, time = self.image_size, jnp.zeros((1,), jnp.int32)
        image = jnp.zeros((1, side, side, 6 + pictures.KNOWN_CHANNELS * self.inpaint))
        cond = ()
        if self.captioned:
            tokens = jnp.zeros((1, self.model.text["max_len"]), jnp.int32)
            cond = (None, None, tokens, tokens == 0, None)
        net = self.model.init(rng, image, time, *cond)["params"]
        return {"net": net, "last": net} if self.last_steps else net

    @property
    def captioned(self) -> bool:
        """Whether a caption enters."""
        return isinstance(self.model, Decoder)

    def adopt(self, params):
        """The parameters of an upsampler that may lack the channels for inpainting, which are then of no effect.

        Of two networks, where the task has one, that of all steps but the last.
        """
        if "last" in params and not self.last_steps:
            params = params["net"]
        if not self.inpaint or self.last_steps:
            return params
        if not self.captioned:
            return pictures.adopt(params, self._unet("patch", 1), 6)
        return {**params, "net": pictures.adopt(params["net"], self._unet("patch", 1), 6)}

    def _unet(self, name: str, default=None):
        """A keyword of the UNet."""
        return self.model.unet.get(name, default) if self.captioned else getattr(self.model, name)

    def prepare(self, frozen, params, batches):
        return params

    def encode(self, frozen, batch):
        """Adds the small images, "low" f32[B, H / factor, H / factor, 3], where the loader has not made them.

        Within [-1, 1], as all that a decoder draws: bicubic resizing goes beyond at edges.
        """
        side = batch["image"].shape[1]
        if "low" in batch:
            if batch["low"].shape[1] * self.factor != side:
                small = batch["low"].shape[1]
                raise ValueError(f"loader.factor made {small} pixels of {side}, and objective.factor is {self.factor}")
            return batch
        if side % self.factor:
            raise ValueError(f"images of {side} pixels must be divisible by factor={self.factor}")
        return {**batch, "low": jnp.clip(resize(batch["image"], side // self.factor), -1, 1)}

    def x0_and_denoise(self, params, batch, **train):
        """An encoded batch's large images, and the network that is shown the small ones."""
        return batch["image"], self._denoise(params, batch, batch["image"].shape[1], **train)

    def _denoise(self, params, batch, size, tile=None, overlap=None, **options):
        """The denoiser for a batch {low, and tokens and mask of a caption}; `options` are the module's."""
        seen, cond = [resize(batch["low"], size, self.enlarge)], ()
        if self.inpaint:
            seen.append(pictures.known_channels(batch, batch["low"].shape[0], size))
        if self.captioned:
            args = (None, None, batch["tokens"], batch["mask"], None)
            cond = (self.model.apply({"params": params}, *args, method="condition"),)
            options["method"] = "denoise"

        def network(x, time):
            return self.model.apply({"params": params}, x, time, *cond, **options)

        if tile:
            network = tiled(network, *self.tiles(tile, overlap))
        return lambda xt, time: split_variance(network(jnp.concatenate([xt, *seen], axis=-1), time))

    def tiles(self, tile, overlap=None) -> tuple[int, int, int]:
        """(tile, overlap, the network's factor), a quarter of the tile by default; UserError for what does not fit."""
        align = self._unet("patch", 1) * 2 ** (len(self._unet("multipliers")) - 1)
        overlap = tile // 4 if overlap is None else overlap
        check_tiles(tile, overlap, align)
        return tile, overlap, align

    def loss(self, params, batch, rng, t=None):
        """`t` i32[B] asks for the error at these times, without dropout; None draws them, to train."""
        if self.last_steps:
            what = f"objective.last_steps={self.last_steps} is for sampling with converted weights"
            raise UserError(what, "train with objective.last_steps=0")
        t_rng, noise_rng, blur_rng, dropout = jax.random.split(rng, 4)
        b = batch["image"].shape[0]
        blurred = jax.random.uniform(blur_rng, (b, 1, 1, 1)) < self.blur_share
        low = jnp.where(blurred, gaussian_blur(batch["low"], self.blur), batch["low"])
        train = dict(train=t is None, rngs={"dropout": dropout})
        batch = {**batch, "low": low}
        if self.inpaint:
            batch = pictures.with_holes(batch, jax.random.fold_in(rng, 4))
        x0, denoise = self.x0_and_denoise(params, batch, **train)
        return image_loss(self, x0, denoise, t, t_rng, noise_rng)

    def sample(self, params, cond, keys, **over):
        """cond {low: f32[B, h, h, 3], and tokens and mask of a caption} → f32[B, factor h, factor h, 3] in [-1, 1].

        With {known, keep} of the large size in `cond`, the known picture stays where keep is 1. With `tile` in `over`,
        and `overlap`, in pixels of the large picture, the network runs on tiles (`diffusion.tile`).
        """
        settings = {**self.sampler, **over}
        tiles = {name: settings.pop(name, None) for name in ("tile", "overlap")}
        temperature = settings.pop("temperature", 1.0)
        size = cond["low"].shape[1] * self.factor
        if self.last_steps:
            first, last = (self._denoise(params[name], cond, size, **tiles) for name in ("net", "last"))
            times = respace(self.schedule, settings["steps"]).timesteps[:self.last_steps]
            denoise = within(0, int(times[-1]), last, first)
        else:
            denoise = self._denoise(params, cond, size, **tiles)
        image = draw(
            self.schedule,
            denoise,
            temperature * initial_noise(keys, (size, size, 3)),
            keys,
            target=self.target,
            x0_variance=params.get("x0_variance"),
            image=cond.get("known"),
            keep=cond.get("keep"),
            **settings,
        )
        return jnp.clip(image, -1, 1)

    def evaluate(self, params, batch, rng):
        return mean_loss(self, params, batch, rng)

    def preview(self, params, batch, rng):
        """Small images enlarged, what the upsampler makes of them, and the true large ones, in three rows."""
        drawn = self.sample(params, batch, jax.random.split(rng, batch["image"].shape[0]))
        return jnp.concatenate([resize(batch["low"], drawn.shape[1], "nearest"), drawn, batch["image"]])
