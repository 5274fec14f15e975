"""diffusers' side of the comparisons with Karlo: its classes with random weights, and its loops with given noise.

Checked with diffusers 0.42.1, torch 2.13.0, transformers 5.24.0. Reduced are width, depth and image size; the structure
is Karlo's own. In f64 diffusers' sinusoids of the time are computed in f64 too, by the same formula.
"""

import contextlib
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest

from unclip_jax.interop import karlo, karlo_json

torch = pytest.importorskip("torch", reason="parity with diffusers needs the package torch")
diffusers = pytest.importorskip("diffusers", reason="parity with diffusers needs the package diffusers")
pytest.importorskip("transformers", reason="parity with diffusers needs the package transformers")
from diffusers import PriorTransformer, UnCLIPScheduler, UNet2DConditionModel, UNet2DModel  # noqa: E402
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel  # noqa: E402
from diffusers.schedulers import scheduling_unclip  # noqa: E402

torch.set_grad_enabled(False)

LENGTH, EMBED, CONTEXT, SIDE = 77, 24, 40, 16
PRIOR = dict(num_attention_heads=4, attention_head_dim=8, num_layers=2, embedding_dim=EMBED)
DOWN, UP = karlo_json.DOWN, karlo_json.UP
DECODER = dict(
    sample_size=SIDE,
    in_channels=3,
    out_channels=6,
    block_out_channels=[16, 32, 48],
    layers_per_block=2,
    down_block_types=[DOWN, karlo_json.ATTENTION_DOWN, karlo_json.ATTENTION_DOWN],
    mid_block_type="UNetMidBlock2DSimpleCrossAttn",
    up_block_types=[karlo_json.ATTENTION_UP, karlo_json.ATTENTION_UP, UP],
    cross_attention_dim=CONTEXT,
    attention_head_dim=16,
    class_embed_type="identity",
    resnet_time_scale_shift="scale_shift",
    norm_num_groups=8,
)
TEXT_PROJ = dict(clip_embeddings_dim=EMBED, time_embed_dim=64, cross_attention_dim=CONTEXT)
UPSAMPLER = dict(
    sample_size=SIDE,
    in_channels=6,
    out_channels=3,
    block_out_channels=[16, 32],
    layers_per_block=2,
    down_block_types=[DOWN] * 2,
    up_block_types=[UP] * 2,
    add_attention=False,
    norm_num_groups=8,
)
SCHEDULERS = {
    "prior": dict(variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=5.0),
    "decoder": dict(variance_type="learned_range", prediction_type="epsilon"),
    "upsampler": dict(variance_type="fixed_small_log", prediction_type="epsilon"),
}


def randomise(model, seed: int = 0):
    """`model` in evaluation with random weights, none zero, that keep the size of signals."""
    rng = np.random.default_rng(seed)
    for name, p in model.named_parameters():
        noise = rng.standard_normal(p.shape)
        if p.ndim > 1 and name.endswith("weight"):
            noise /= np.sqrt(p[0].numel())
        elif (p.ndim == 1 and name.endswith("weight")) or name == "clip_std":
            noise = 1 + 0.1 * noise
        else:
            noise *= 0.3
        p.copy_(torch.from_numpy(noise))
    return model.eval()


def prior_model():
    return randomise(PriorTransformer(**PRIOR), 1)


def text_proj_model():
    return randomise(UnCLIPTextProjModel(**TEXT_PROJ), 2)


def decoder_model():
    return randomise(UNet2DConditionModel(**DECODER), 3)


def upsampler_models():
    return [randomise(UNet2DModel(**UPSAMPLER), seed) for seed in (4, 5)]


class WideTime(torch.nn.Module):
    """Stands for diffusers' `Timesteps`, which computes in f32."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width

    def forward(self, t):
        half = self.width // 2
        angle = t.double()[:, None] * torch.exp(-np.log(10000) * torch.arange(half, dtype=torch.float64) / half)[None]
        return torch.cat([torch.cos(angle), torch.sin(angle)], 1)


def double(model):
    """`model` in f64, with the sinusoid of the time where it has one."""
    if hasattr(model, "time_proj"):
        model.time_proj = WideTime(model.time_proj.num_channels)
    return model.double()


def ours(name: str, *models):
    """(keywords of our module, its parameters) of diffusers' models, one stage's in the order of `karlo.PARTS`."""
    with tempfile.TemporaryDirectory() as folder:
        for part, model in zip(karlo.PARTS[name], models, strict=True):
            model.save_pretrained(f"{folder}/{part}")
        UnCLIPScheduler(**SCHEDULERS[name]).save_pretrained(f"{folder}/{karlo.SCHEDULERS[name][0]}")
        ((_, stage),) = karlo.read_stages(Path(folder))
    configs = [json.loads(model.to_json_string()) for model in models]
    if name == "prior":
        return karlo_json.prior(*configs), stage.params
    module, _ = (karlo_json.decoder if name == "decoder" else karlo_json.upsampler)(*configs)
    return module, stage.params


def captions(dtype):
    """Four captions' (text states, masks, text embeddings), of 20, 77, 2 and 9 tokens; the third is the empty one."""
    rng = np.random.default_rng(7)
    states, z_txt = rng.standard_normal((4, LENGTH, EMBED)), rng.standard_normal((4, EMBED))
    mask = np.arange(LENGTH)[None] < np.array([20, LENGTH, 2, 9])[:, None]
    return states.astype(dtype), mask, z_txt.astype(dtype)


def error(got, wanted) -> float:
    """Largest difference over the largest number wanted."""
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    assert got.shape == wanted.shape and np.isfinite(wanted).all()
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())


def nchw(x):
    """Our images as theirs."""
    return torch.from_numpy(np.array(x)).permute(0, 3, 1, 2)


def nhwc(x) -> np.ndarray:
    """Their images as ours."""
    return x.permute(0, 2, 3, 1).numpy()


def scheduler(name: str, steps: int, exact: bool = True):
    """UnCLIPScheduler set to `steps`; `exact`: its tables computed in float64, the same formula."""
    made = UnCLIPScheduler(**SCHEDULERS[name])
    made.set_timesteps(steps)
    if exact:
        f = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
        made.betas = torch.from_numpy(np.minimum(1 - f[1:] / f[:-1], 0.999))
        made.alphas = 1 - made.betas
        made.alphas_cumprod = torch.cumprod(made.alphas, 0)
        made.one = torch.tensor(1.0, dtype=torch.float64)
    return made


def loop(made, predict, x, noises):
    """The loop of UnCLIPPipeline: predict(x, t, last) at every step, then `step` with the noise given for it.

    Args:
      noises: of each step, in our count: the last one run is 0.
    """
    times = made.timesteps
    for i, t in enumerate(times):
        last, noise = i + 1 == len(times), noises[len(times) - 1 - i]
        with given_noise(lambda noise=noise: noise):
            x = made.step(predict(x, t, last), t, x, prev_timestep=None if last else times[i + 1]).prev_sample
    return x


@contextlib.contextmanager
def given_noise(draw):
    """draw() is what the scheduler draws while this is entered."""
    drawn, scheduling_unclip.randn_tensor = scheduling_unclip.randn_tensor, lambda shape, **_: draw()
    try:
        yield
    finally:
        scheduling_unclip.randn_tensor = drawn
