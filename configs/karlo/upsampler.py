"""Karlo's upsampler from 64 to 256 px (Kakao Brain 2022): time added before the norm, seven steps with noise.

    unclip train --config configs/karlo/upsampler.py --workdir runs/karlo/upsampler --config.data.path=pictures

| Variant | UNet | steps sampled | iterations | parameters |
|---|---|---|---|---|
| karlo | 320 channels x 1, 2, 3, 4; 3 blocks | 7 | 1M | 691,579,523 |

One network draws all steps. Karlo's published weights hold a second one for the last step, trained on with other
losses, which are not here; converted weights have both (`objective.last_steps`). Its batch size, learning rate,
optimizer, blur and crops are not published: here the paper's (`configs/dalle2`).
"""

from configs import common
from configs.dalle2 import shared

VARIANTS = {"karlo": dict(channels=320, multipliers=(1, 2, 3, 4), blocks=3, dropout=0.0, scale_shift=False)}


def get_config(variant: str = ""):
    v = common.choose(variant, VARIANTS)
    return shared.base(
        "upsampler",
        size=256,
        fsdp=8,
        batch_size=1024,
        num_steps=1_000_000,
        model=dict(v, **shared.FAST),
        diffusion=dict(name="cosine", num_steps=common.SCHEDULE_STEPS),
        objective=dict(factor=4, target="eps", vlb_weight=0.0, blur=0.6, blur_share=0.5),
        sampler=dict(name="ddpm", steps=7),
        data=dict(captions=False),
        loader=dict(crop=64, degrade=None, factor=4),
        optim=shared.adamw(lr=1.2e-4, weight_decay=0.0, b2=0.999, eps=1e-8),
        ema_decay=0.9999,
    )
