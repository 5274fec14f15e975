"""The upsampler on the shapes world, 32 to 64 px, trained on 32-px crops.

    unclip train --config configs/shapes/upsampler.py --workdir runs/shapes/upsampler

Variants: laptop (the bundled stack's), bsr (64 to 128 px, on 64-px crops, from variously degraded pictures), inpaint
(with channels for a picture and its mask, to be fine-tuned with --config.init=runs/shapes/upsampler), tiny (for tests).
"""

from configs import common, small

VARIANTS = {
    "laptop": dict(
        channels=32,
        multipliers=(1, 2),
        blocks=1,
        groups=8,
        batch_size=32,
        num_steps=3000,
        steps=12,
        weighting="clipped_snr",
        optim=dict(name="muon"),
    ),
    "tiny": dict(channels=16, multipliers=(1, 2), blocks=1, groups=4, batch_size=16, num_steps=50, steps=4),
}
VARIANTS["bsr"] = dict(VARIANTS["laptop"], size=128, degrade="bsr")
VARIANTS["inpaint"] = dict(VARIANTS["laptop"], inpaint=True, num_steps=1000)


def get_config(variant: str = ""):
    v = common.choose(variant, VARIANTS)
    size = v.get("size", 64)
    return small.upsampler(v, data=dict(size=size), crop=size // 2)
