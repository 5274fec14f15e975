"""CLIP on the shapes world.

    unclip train --config configs/shapes/clip.py --workdir runs/shapes/clip
    unclip train --config configs/shapes/clip.py:tiny --workdir /tmp/clip     # a minute on a laptop

Variants: laptop (20 minutes of two cores), gpu (the bundled stack's, two minutes of one large GPU), tiny (for tests).
"""

from configs import common, small

VARIANTS = {
    "laptop": dict(
        embed_dim=128,
        vision=dict(image_size=32, patch=8, width=160, layers=4, heads=5),
        text=dict(width=96, layers=2, heads=3),
        batch_size=384,
        num_steps=900,
        lr=2e-3,
    ),
    "gpu": dict(
        embed_dim=128,
        vision=dict(image_size=32, patch=4, width=160, layers=6, heads=5),
        text=dict(width=128, layers=4, heads=4),
        batch_size=1024,
        num_steps=2500,
        lr=2e-3,
    ),
    "tiny": dict(
        embed_dim=32,
        vision=dict(image_size=32, patch=8, width=48, layers=2, heads=2),
        text=dict(width=48, layers=2, heads=2),
        batch_size=32,
        num_steps=100,
    ),
}


def get_config(variant: str = ""):
    return small.clip(common.choose(variant, VARIANTS), data=dict(size=32), vocab_size=512)
