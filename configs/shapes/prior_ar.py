"""The autoregressive prior on the shapes world.

    unclip train --config configs/shapes/prior_ar.py --workdir runs/shapes/prior_ar --config.clip=runs/shapes/clip

Variants: laptop, gpu (the bundled stack's), tiny (for tests).
"""

from configs import common, small

VARIANTS = {
    "laptop": dict(dims=24, buckets=64, width=128, layers=3, heads=4, batch_size=128, num_steps=1500),
    "gpu": dict(dims=32, buckets=64, width=128, layers=4, heads=4, batch_size=512, num_steps=4000, candidates=8),
    "tiny": dict(dims=8, buckets=32, width=48, layers=2, heads=2, batch_size=32, num_steps=100),
}


def get_config(variant: str = ""):
    return small.prior_ar(common.choose(variant, VARIANTS), data=dict(size=32))
