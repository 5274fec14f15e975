"""Diffusion: schedules, losses, guidance and samplers over any denoiser `(xt, model_time) -> Out`."""

from unclip_jax.diffusion.draw import draw
from unclip_jax.diffusion.guide import Denoise, Out, guide, guide_batched, within
from unclip_jax.diffusion.inpaint import partway, repaint
from unclip_jax.diffusion.invert import ddim_invert
from unclip_jax.diffusion.loss import bpd, diffusion_loss, prior_bpd, simple, vlb, x0_variance
from unclip_jax.diffusion.sample import SAMPLERS, ddim, ddpm, initial_noise
from unclip_jax.diffusion.schedule import (
    Schedule,
    make_schedule,
    model_time,
    q_posterior,
    q_sample,
    respace,
    to_eps,
    to_v,
    to_x0,
)
from unclip_jax.diffusion.slerp import slerp
from unclip_jax.diffusion.tile import tiled

__all__ = [
    "SAMPLERS", "Denoise", "Out", "Schedule", "bpd", "ddim", "ddim_invert", "ddpm", "diffusion_loss", "draw", "guide",
    "guide_batched", "initial_noise", "make_schedule", "model_time", "partway", "prior_bpd", "q_posterior", "q_sample",
    "repaint", "respace", "simple", "slerp", "tiled", "to_eps", "to_v", "to_x0", "vlb", "within", "x0_variance",
]  # fmt: skip
