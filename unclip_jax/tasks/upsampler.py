"""The upsamplers' training and sampling (unCLIP, section 2.3): diffusion over large images given small ones.

The small image is enlarged and concatenated to the noised one. In training it is blurred a little, so that the network
does not lean on details that a drawn image lacks; networks without attention train on crops and draw at any size. No
caption enters.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from unclip_jax.data.images import gaussian_blur, resize
from unclip_jax.diffusion.guide import hand_over
from unclip_jax.diffusion.loss import diffusion_loss
from unclip_jax.diffusion.sample import SAMPLERS, initial_noise
from unclip_jax.diffusion.schedule import Schedule, make_schedule, respace
from unclip_jax.errors import UserError
from unclip_jax.models.unet import UNet
from unclip_jax.tasks.decoder import mean_loss, split_variance


@dataclasses.dataclass(frozen=True)
class UpsamplerTask:
    """Unconditional-on-text ADM UNet over [noised image, enlarged small image].

    Attributes:
      image_size: side of the large images in pixels; training images may be smaller crops.
      factor: large side / small side (the paper: 4).
      last_steps: so many steps of least noise are drawn by a second network of the same form (Karlo: 1). Parameters
        are then {"net": …, "last": …}, for sampling only.
      blur: standard deviation in small-image pixels of the Gaussian blur, kernel 3 (the paper: 0.6).
      blur_share: share of examples blurred. Not in the paper; 1/2, so that unblurred small images are known too.
      sampler: defaults of `sample`: name, steps.
    """

    model: UNet
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

    @classmethod
    def from_config(cls, config, clip=None):
        channels = 6 if config.objective.vlb_weight else 3
        net = UNet(**{**config.model.to_dict(), "out_channels": channels})
        sampler, schedule = config.sampler.to_dict(), make_schedule(**config.diffusion)
        return cls(net, schedule, config.data.size, sampler, **config.objective)

    def init(self, rng):
        image = jnp.zeros((1, self.image_size, self.image_size, 6))
        net = self.model.init(rng, image, jnp.zeros((1,), jnp.int32))["params"]
        return {"net": net, "last": net} if self.last_steps else net

    def prepare(self, frozen, params, batches):
        return params

    def encode(self, frozen, batch):
        """Adds the small images, "low" f32[B, H / factor, H / factor, 3]."""
        side = batch["image"].shape[1]
        if side % self.factor:
            raise ValueError(f"images of {side} pixels must be divisible by factor={self.factor}")
        return {**batch, "low": resize(batch["image"], side // self.factor)}

    def _denoise(self, params, low, size, train=False, rngs=None):
        enlarged = resize(low, size)

        def denoise(xt, time):
            x = jnp.concatenate([xt, enlarged], axis=-1)
            return split_variance(self.model.apply({"params": params}, x, time, train=train, rngs=rngs))

        return denoise

    def loss(self, params, batch, rng, t=None):
        """`t` i32[B] asks for the error at these times, without dropout; None draws them, to train."""
        if self.last_steps:
            what = f"objective.last_steps={self.last_steps} is for sampling with converted weights"
            raise UserError(what, "train with objective.last_steps=0")
        t_rng, noise_rng, blur_rng, dropout = jax.random.split(rng, 4)
        x0, low = batch["image"], batch["low"]
        b = x0.shape[0]
        blurred = jax.random.uniform(blur_rng, (b, 1, 1, 1)) < self.blur_share
        low = jnp.where(blurred, gaussian_blur(low, self.blur), low)
        train = t is None
        loss, metrics = diffusion_loss(
            self.schedule,
            self._denoise(params, low, x0.shape[1], train, {"dropout": dropout}),
            x0,
            jax.random.randint(t_rng, (b,), 0, self.schedule.num_steps) if train else t,
            jax.random.normal(noise_rng, x0.shape),
            self.target,
            self.vlb_weight,
            self.weighting,
        )
        return loss.mean(), metrics

    def sample(self, params, cond, keys, **over):
        """cond {low: f32[B, h, h, 3]} → images f32[B, factor h, factor h, 3] in [-1, 1]."""
        settings = {**self.sampler, **over}
        low = cond["low"]
        size = low.shape[1] * self.factor
        schedule = respace(self.schedule, settings["steps"])
        if self.last_steps:
            first, last = (self._denoise(params[name], low, size) for name in ("net", "last"))
            denoise = hand_over(first, last, schedule.timesteps[:self.last_steps][-1])
        else:
            denoise = self._denoise(params, low, size)
        image = SAMPLERS[settings["name"]](
            schedule,
            denoise,
            initial_noise(keys, (size, size, 3)),
            keys,
            target=self.target,
        )
        return jnp.clip(image, -1, 1)

    def evaluate(self, params, batch, rng):
        return mean_loss(self, params, batch, rng)

    def preview(self, params, batch, rng):
        """Small images enlarged, what the upsampler makes of them, and the true large ones, in three rows."""
        drawn = self.sample(params, batch, jax.random.split(rng, batch["image"].shape[0]))
        return jnp.concatenate([resize(batch["low"], drawn.shape[1], "nearest"), drawn, batch["image"]])
