"""The upsampler on the shapes world, 32 to 64 px, trained on 32-px crops.

    unclip train --config configs/shapes/upsampler.py --workdir runs/shapes/upsampler

Variants: laptop (the bundled stack's), tiny (for tests).
"""

from configs import common

VARIANTS = {
    "laptop": dict(channels=32, multipliers=(1, 2), blocks=1, groups=8, batch_size=64, num_steps=4000, steps=12),
    "tiny": dict(channels=16, multipliers=(1, 2), blocks=1, groups=4, batch_size=16, num_steps=50, steps=4),
}


def get_config(variant: str = ""):
    v = common.choose(variant, VARIANTS)
    return common.base(
        "upsampler",
        batch_size=v["batch_size"],
        num_steps=v["num_steps"],
        model=dict(channels=v["channels"], multipliers=v["multipliers"], blocks=v["blocks"], groups=v["groups"], patch=2),
        diffusion=dict(name="cosine", num_steps=common.SCHEDULE_STEPS),
        objective=dict(factor=2, target="v", vlb_weight=0.0),
        sampler=dict(name="ddim", steps=v["steps"]),
        data=dict(size=64),
        loader=dict(crop=32),
        optim=dict(lr=1e-3, warmup=200, weight_decay=0.01),
        every=dict(preview=1000, eval=1000),
    )
