"""Sizes at which a stage's train step fills a card, for `benchmarks.mfu`."""

from typing import NamedTuple


class Size(NamedTuple):
    """One way to fill a card.

    Attributes:
      memory: GiB that jax must have there, or this is not tried.
      config: as for `unclip train`, below configs/.
      batch: its size.
      remat: policy of all networks (`nn.remat`).
      clip: config of the frozen CLIP, where there is one.
      changes: more overrides of the config.
    """

    memory: float
    config: str
    batch: int
    remat: str
    clip: str = ""
    changes: tuple[str, ...] = ()


L14, KARLO, WHOLE = "dalle2/clip.py:vit_l14", "karlo/clip.py", ("objective.chunk=0",)
PRIOR, PRIOR_AR, DECODER = "karlo/prior_diffusion.py", "dalle2/prior_ar.py", "karlo/decoder.py"
UP256, UP1024 = "dalle2/upsampler.py:64-256", "dalle2/upsampler.py:256-1024"
# In the order of their worth; of each stage the largest first. From 100 GiB on: an H200. Karlo's decoder, 0.9B, stands
# in the place of the paper's, 3.6B, which compiles for many minutes. Parameters, average, moments and gradients are 20
# bytes a parameter; an example of CLIP keeps 220 MiB with "none" and 125 with "dots", of the priors 110 and 57, 480 and
# 349 of the autoregressive one, of the decoder 310 and 181, of the upsamplers 226 and 118, 1,195 and 760.
STAGES: dict[str, tuple[Size, ...]] = {
    "clip": (Size(100, L14, 256, "none", changes=WHOLE), Size(60, L14, 256, "dots", changes=WHOLE)),
    "prior_diffusion": (Size(100, PRIOR, 512, "none", KARLO), Size(60, PRIOR, 512, "dots", KARLO)),
    "decoder": (Size(60, DECODER, 64, "none", KARLO), Size(60, DECODER, 48, "dots", KARLO)),
    "prior_ar": (
        Size(125, PRIOR_AR, 144, "none", L14),
        Size(110, PRIOR_AR, 128, "dots", L14),
        Size(60, PRIOR_AR, 40, "dots", L14),
        Size(60, PRIOR_AR, 48, "full", L14),
    ),
    "upsampler_64_256": (
        Size(120, UP256, 416, "none"),
        Size(110, UP256, 640, "dots"),
        Size(60, UP256, 96, "dots"),
        Size(60, UP256, 48, "dots"),
    ),
    "upsampler_256_1024": (
        Size(120, UP1024, 88, "none"),
        Size(110, UP1024, 128, "dots"),
        Size(60, UP1024, 24, "dots"),
        Size(60, UP1024, 12, "dots"),
    ),
}
