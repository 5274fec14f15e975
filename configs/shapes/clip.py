"""CLIP on the shapes world.

    unclip train --config configs/shapes/clip.py --workdir runs/shapes/clip
    unclip train --config configs/shapes/clip.py:tiny --workdir /tmp/clip     # a minute on a laptop

Variants: laptop (the bundled stack's), tiny (for tests).
"""

from configs import common

VARIANTS = {
    "laptop": dict(
        embed_dim=128,
        vision=dict(image_size=32, patch=4, width=96, layers=4, heads=3),
        text=dict(width=96, layers=2, heads=3),
        batch_size=256,
        num_steps=700,
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
    v = common.choose(variant, VARIANTS)
    return common.base(
        "clip",
        batch_size=v["batch_size"],
        num_steps=v["num_steps"],
        model=dict(embed_dim=v["embed_dim"], vision=v["vision"], text=v["text"], norm=v["embed_dim"] ** 0.5),
        tokenizer=dict(path="", vocab_size=512, max_len=32),
        data=dict(size=32),
        optim=dict(lr=1e-3, warmup=100, weight_decay=0.1, b2=0.98),
        ema_decay=0.99,
        eval=dict(batches=4, preview=32),
    )
