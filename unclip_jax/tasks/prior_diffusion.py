"""The diffusion prior's training and sampling (unCLIP, section 2.2): predict the unnoised z_img, mean squared error."""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import process_allgather

from unclip_jax import pca
from unclip_jax.diffusion.draw import draw
from unclip_jax.diffusion.guide import Out, is_one
from unclip_jax.diffusion.loss import diffusion_loss
from unclip_jax.diffusion.sample import initial_noise
from unclip_jax.diffusion.schedule import Schedule, make_schedule, respace
from unclip_jax.models.clip import CLIP
from unclip_jax.models.prior import Prior
from unclip_jax.nn.drawing import for_loops
from unclip_jax.tasks.embeddings import best, candidate_keys, cosines, matrix_picture, unit
from unclip_jax.tasks.teacher import ask, ask_empty, caption_of, drop_captions, vocabulary

PREPARE_BATCHES = 32


@dataclasses.dataclass(frozen=True)
class PriorTask:
    """Prior over whitened embeddings: diffusion runs on (z_img - mean) / std, statistics that live beside the weights.

    Parameters are {"net": …, "mean": f32[D], "std": f32[D]}; the statistics get no gradient. For sampling there may be
    "x0_variance" f32[S], which `tasks.measure_x0_variance` adds.

    Attributes:
      clip: the frozen CLIP whose embeddings are modelled.
      text_drop: share of examples trained without caption and text embedding (the paper: 0.1).
      empty_caption: a dropped caption is the empty one, as CLIP encodes it (Karlo), not a learned vector.
      clip_x0: bound on the whitened prediction while sampling, or None.
      sampler: defaults of `sample`: candidates, and what `diffusion.draw` takes (name, steps, guidance, …).
    """

    model: Prior
    schedule: Schedule
    clip: CLIP
    sampler: dict[str, Any]
    text_drop: float = 0.1
    clip_x0: float | None = 5.0
    empty_caption: bool = False

    @classmethod
    def from_config(cls, config, clip: CLIP):
        """`config.model.caption` says how the caption enters: "tokens" (the paper) or "states" (Karlo)."""
        model = config.model.to_dict()
        vocab_size = vocabulary(model.pop("caption"), clip)
        learned_null = not config.objective.get("empty_caption", False)
        net = Prior(clip.embed_dim, clip.text["max_len"], vocab_size=vocab_size, learned_null=learned_null, **model)
        return cls(net, make_schedule(**config.diffusion), clip, config.sampler.to_dict(), **config.objective)

    def init(self, rng):
        d, length = self.clip.embed_dim, self.clip.text["max_len"]
        mask = jnp.ones((1, length), bool)
        caption = jnp.zeros((1, length), jnp.int32)
        if not self.model.vocab_size:
            caption = jnp.zeros((1, length, self.clip.text["width"]))
        z, keep = jnp.zeros((1, d)), None if self.empty_caption else jnp.ones((1,), bool)
        net = self.model.init(rng, z, jnp.zeros((1,), jnp.int32), caption, mask, z, keep)["params"]
        return {"net": net, "mean": jnp.zeros((d,)), "std": jnp.ones((d,))}

    def prepare(self, frozen, params, batches):
        """Mean and standard deviation of z_img per component, over the first batches of the training data."""
        told, seen = jax.jit(lambda frozen, batch: pca.batch_moments(self.encode(frozen, batch)["z_img"])), None
        for batch in itertools.islice(batches, PREPARE_BATCHES):
            seen = pca.merge(seen, len(batch["tokens"]), *process_allgather(told(frozen, batch), tiled=True))
        variance = np.maximum(seen.scatter.diagonal() / seen.n, pca.LEAST_VARIANCE)
        measured = {"mean": seen.mean, "std": np.sqrt(variance)}
        return {**params, **{name: jnp.asarray(value, jnp.float32) for name, value in measured.items()}}

    def encode(self, frozen, batch):
        batch = ask(self.clip, frozen["clip"], batch)
        return ask_empty(self.clip, frozen["clip"], batch) if self.empty_caption else batch

    def x0_and_denoise(self, params, batch, keep=None):
        """An encoded batch's whitened embeddings, and the network that knows the captions where keep; None: all."""
        x0 = (batch["z_img"] - params["mean"][None]) / params["std"][None]
        keep = jnp.ones(x0.shape[:1], bool) if keep is None else keep
        if self.empty_caption:
            batch, keep = drop_captions(batch, keep), None

        def denoise(xt, time):
            args = (caption_of(self.model, batch), batch["mask"], batch["z_txt"], keep)
            return Out(self.model.apply({"params": params["net"]}, xt, time, *args))

        return jax.lax.stop_gradient(x0), denoise

    def loss(self, params, batch, rng, t=None):
        """`t` i32[B] asks for the error at these times; None draws them, to train."""
        t_rng, noise_rng, drop_rng = jax.random.split(rng, 3)
        b = batch["z_img"].shape[0]
        x0, denoise = self.x0_and_denoise(params, batch, jax.random.uniform(drop_rng, (b,)) >= self.text_drop)
        t = jax.random.randint(t_rng, (b,), 0, self.schedule.num_steps) if t is None else t
        loss, metrics = diffusion_loss(self.schedule, denoise, x0, t, jax.random.normal(noise_rng, x0.shape), "x0")
        return loss.mean(), metrics

    def sample(self, params, cond, keys, **over):
        """cond {tokens, mask, z_txt, states} of B captions → z_img f32[B, D].

        `candidates` embeddings are drawn for each caption and the one with the largest dot product with z_txt kept
        (the paper: 2), or with cond["near"] f32[B, D] where there is one, such as a picture's z_img. The prefix of
        every caption, with all timesteps' tokens, is run once; its candidates share it, and all share that of the
        dropped caption.
        """
        settings = {**self.sampler, **over}
        candidates = settings.pop("candidates")
        b, d = cond["z_txt"].shape
        keys = candidate_keys(keys, candidates)
        variables = {"params": for_loops(params["net"])}
        # With guidance one caption more, dropped: it is the same for all.
        halves = 1 if is_one(settings["guidance"]) else 2
        caption = "tokens" if self.model.vocab_size else "states"
        seen = (caption, "mask", "z_txt")
        dropped = cond["empty"] if self.empty_caption else cond
        rows = {k: jnp.concatenate([cond[k], dropped[k][: halves - 1]]) for k in seen}
        keep = None if self.empty_caption else jnp.arange(b + halves - 1) < b
        times = jnp.asarray(respace(self.schedule, settings["steps"]).timesteps)
        args = (rows[caption], rows["mask"], rows["z_txt"], keep, times, (b, 1)[:halves])
        prefixes = self.model.apply(variables, *args, method="prefix")

        def denoise(xt, time):
            own = prefixes[: xt.shape[0] // len(keys)]  # both halves, or the first
            return Out(self.model.apply(variables, xt, own, jnp.searchsorted(times, time[0]), method="step"))

        z = draw(
            self.schedule,
            denoise,
            initial_noise(keys, (d,)),
            keys,
            target="x0",
            clip_x0=self.clip_x0,
            x0_variance=params.get("x0_variance"),
            **settings,
        )
        return best(z * params["std"][None] + params["mean"][None], cond.get("near", cond["z_txt"]))

    def evaluate(self, params, batch, rng):
        """Cosine of drawn and true embeddings, beside those of the text embedding and of the data's mean."""
        b = batch["z_img"].shape[0]
        z = self.sample(params, batch, jax.random.split(rng, b))
        loss, _ = self.loss(params, batch, rng)
        return {**cosines(z, batch, params["mean"]), "loss": (loss * b, b)}

    def preview(self, params, batch, rng):
        """Cosines of drawn (rows) with true embeddings (columns), whitened; a bright diagonal is what is wanted."""
        z = self.sample(params, batch, jax.random.split(rng, batch["z_img"].shape[0]))
        drawn, true = ((a - params["mean"][None]) / params["std"][None] for a in (z, batch["z_img"]))
        return matrix_picture(unit(drawn) @ unit(true).T)
