"""The diffusion prior on the shapes world.

    unclip train --config configs/shapes/prior_diffusion.py --workdir runs/shapes/prior --config.clip=runs/shapes/clip

Variants: laptop, gpu (the bundled stack's), tiny (for tests).
"""

from configs import common, small

VARIANTS = {
    "laptop": dict(width=128, layers=3, heads=4, batch_size=128, num_steps=1200, steps=25),
    "gpu": dict(
        width=160,
        layers=5,
        heads=5,
        batch_size=512,
        num_steps=6000,
        steps=25,
        guidance=2.0,
        candidates=8,
    ),
    "tiny": dict(width=48, layers=2, heads=2, batch_size=32, num_steps=100, steps=8),
}


def get_config(variant: str = ""):
    return small.prior(common.choose(variant, VARIANTS), data=dict(size=32))
