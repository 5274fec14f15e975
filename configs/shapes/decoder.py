"""The decoder on the shapes world, at 32 px.

    unclip train --config configs/shapes/decoder.py --workdir runs/shapes/decoder --config.clip=runs/shapes/clip

Variants: laptop (the bundled stack's), tiny (for tests).
"""

from configs import common

VARIANTS = {
    "laptop": dict(
        unet=dict(channels=32, multipliers=(1, 2, 4), blocks=1, attention=(8, 4), head_channels=32, groups=8, patch=2),
        context_width=96,
        text=dict(layers=2, heads=3),
        batch_size=64,
        num_steps=8000,
        steps=30,
    ),
    "tiny": dict(
        unet=dict(channels=16, multipliers=(1, 2), blocks=1, attention=(8,), head_channels=16, groups=4, patch=2),
        context_width=32,
        text=dict(layers=1, heads=2),
        batch_size=16,
        num_steps=50,
        steps=8,
    ),
}


def get_config(variant: str = ""):
    v = common.choose(variant, VARIANTS)
    return common.base(
        "decoder",
        batch_size=v["batch_size"],
        num_steps=v["num_steps"],
        model=dict(unet=v["unet"], text=v["text"], context_width=v["context_width"]),
        diffusion=dict(name="cosine", num_steps=common.SCHEDULE_STEPS),
        objective=dict(target="v", weighting="none", clip_drop=0.1, text_drop=0.5, vlb_weight=0.001),
        sampler=dict(name="ddpm", steps=v["steps"], guidance=2.0),
        tokenizer=dict(path="", vocab_size=0, max_len=0),  # the CLIP's
        data=dict(size=32),
        optim=dict(lr=1e-3, warmup=200, weight_decay=0.01),
        every=dict(preview=1000, eval=1000),
    )
