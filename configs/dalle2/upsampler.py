"""The paper's two upsamplers (unCLIP, section 2.1, table 3 and App. C): no caption, no attention, no guidance.

    unclip train --config configs/dalle2/upsampler.py:64-256 --workdir runs/dalle2/up256 --config.data.path=pictures
    unclip train --config configs/dalle2/upsampler.py:256-1024 --workdir runs/dalle2/up1024 --config.data.path=pictures

| Variant | UNet | schedule | steps sampled | crops | batch | parameters |
|---|---|---|---|---|---|---|
| 64-256 | 320 channels x 1, 2, 3, 4; 3 blocks; dropout 0.1 | cosine | 27 | 64 px | 1024 | 729,702,083 (paper: 700M) |
| 256-1024 | 192 channels x 1, 1, 2, 2, 4, 4; 2 blocks | linear | 15 | 256 px | 512 | 282,059,139 (paper: 300M) |

1M iterations each. The networks train on crops of a quarter of the side and draw at full size. For the first, small
pictures are blurred a little in training (kernel 3, sigma 0.6); for the second they are degraded as in blind
super-resolution (BSR, `data/degrade.py`: blur, resizing, noise, JPEG, in random order). The variance is not learned, as
DDIM has no use for it.
"""

from configs import common
from configs.dalle2 import shared

VARIANTS = {
    "64-256": dict(
        size=256,
        model=dict(channels=320, multipliers=(1, 2, 3, 4), blocks=3, dropout=0.1),
        schedule="cosine",
        steps=27,
        batch_size=1024,
        lr=1.2e-4,
    ),
    "256-1024": dict(
        size=1024,
        model=dict(channels=192, multipliers=(1, 1, 2, 2, 4, 4), blocks=2, dropout=0.0),
        schedule="linear",
        steps=15,
        batch_size=512,
        lr=1.0e-4,
        degrade="bsr",
    ),
}


def get_config(variant: str = ""):
    v = common.choose(variant, VARIANTS)
    degrade = v.get("degrade")
    blurred = {"blur_share": 0.0} if degrade else {"blur": 0.6, "blur_share": 0.5}
    return shared.base(
        "upsampler",
        size=v["size"],
        fsdp=8,
        batch_size=v["batch_size"],
        num_steps=1_000_000,
        model=dict(v["model"], **shared.FAST),
        diffusion=dict(name=v["schedule"], num_steps=common.SCHEDULE_STEPS),
        objective=dict(factor=4, target="eps", vlb_weight=0.0, **blurred),
        sampler=dict(name="ddim", steps=v["steps"], threshold=None),
        data=dict(captions=False),
        loader=dict(crop=v["size"] // 4, degrade=degrade, factor=4),
        optim=shared.adamw(lr=v["lr"], weight_decay=0.0, b2=0.999, eps=1e-8),
        ema_decay=0.9999,
    )
