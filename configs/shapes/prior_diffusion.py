"""The diffusion prior on the shapes world.

    unclip train --config configs/shapes/prior_diffusion.py --workdir runs/shapes/prior --config.clip=runs/shapes/clip

Variants: laptop (the bundled stack's), tiny (for tests).
"""

from configs import common

VARIANTS = {
    "laptop": dict(width=128, layers=4, heads=4, batch_size=256, num_steps=3000, steps=25),
    "tiny": dict(width=48, layers=2, heads=2, batch_size=32, num_steps=100, steps=8),
}


def get_config(variant: str = ""):
    v = common.choose(variant, VARIANTS)
    return common.base(
        "prior_diffusion",
        batch_size=v["batch_size"],
        num_steps=v["num_steps"],
        model=dict(caption="tokens", width=v["width"], layers=v["layers"], heads=v["heads"]),
        diffusion=dict(name="cosine", num_steps=common.SCHEDULE_STEPS),
        objective=dict(text_drop=0.1, clip_x0=5.0),
        sampler=dict(name="ddpm", steps=v["steps"], guidance=1.0, candidates=2),
        tokenizer=dict(path="", vocab_size=0, max_len=0),  # the CLIP's
        data=dict(size=32),
        optim=dict(lr=1e-3, warmup=200, weight_decay=0.06, b2=0.96, eps=1e-6),
        eval=dict(batches=2, preview=32),
    )
