"""Karlo's prior (Kakao Brain 2022): CLIP's text states in place of tokens, the empty caption in place of a dropped one.

    unclip train --config configs/karlo/prior_diffusion.py --workdir runs/karlo/prior \\
        --config.data.path=pictures --config.clip=runs/karlo/clip

| Variant | width | layers | heads | steps sampled | iterations | parameters |
|---|---|---|---|---|---|---|
| karlo | 2048 | 20 | 32 | 25, guidance 4 | 1M | 1,022,028,544 |

With the 2 x 768 statistics of embeddings 1,022,030,080, as diffusers counts. Network, shares dropped and sampling are
Karlo's. Its batch size, learning rate and optimizer are not published: here the paper's (`configs/dalle2`). diffusers
bounds x0 at 5 while sampling, as here; Karlo's own code at 10.
"""

from configs import common
from configs.dalle2 import shared

VARIANTS = {"karlo": dict(width=2048, layers=20, heads=32)}


def get_config(variant: str = ""):
    v = common.choose(variant, VARIANTS)
    return shared.base(
        "prior_diffusion",
        size=224,
        fsdp=8,
        batch_size=4096,
        num_steps=1_000_000,
        model=dict(caption="states", **v, **shared.FAST),
        diffusion=dict(name="cosine", num_steps=common.SCHEDULE_STEPS),
        objective=dict(text_drop=0.2, clip_x0=5.0, empty_caption=True),
        sampler=dict(name="ddpm", steps=25, guidance=4.0, candidates=1),
        tokenizer=common.TOKENIZER_OF_CLIP,
        optim=shared.adamw(lr=1.1e-4, weight_decay=6.0e-2, b2=0.96, eps=1e-6),
        ema_decay=0.9999,
    )
