"""Karlo's decoder at 64 px (Kakao Brain 2022): no caption Transformer of its own, both CLIP embeddings beside the time.

    unclip train --config configs/karlo/decoder.py --workdir runs/karlo/decoder \\
        --config.data.path=pictures --config.clip=runs/karlo/clip

| Variant | UNet | steps sampled | iterations | parameters |
|---|---|---|---|---|
| karlo | 320 channels x 1, 2, 3, 4; 3 blocks; attention at 32, 16, 8 | 25, guidance 8 | 1M | 893,318,086 |

The UNet alone 885,439,686, as diffusers counts; the rest is its text_proj. Network, shares dropped and sampling are
Karlo's. Its batch size, learning rate and optimizer are not published: here the paper's (`configs/dalle2`).
"""

from configs import common
from configs.dalle2 import shared

VARIANTS = {
    "karlo": dict(
        unet=dict(channels=320, multipliers=(1, 2, 3, 4), blocks=3, attention=(32, 16, 8), dropout=0.1),
        context_width=1536,
    ),
}


def get_config(variant: str = ""):
    v = common.choose(variant, VARIANTS)
    return shared.base(
        "decoder",
        size=224,
        fsdp=8,
        batch_size=2048,
        num_steps=1_000_000,
        model=dict(
            unet=dict(v["unet"], head_channels=64, remat="full"),
            context_width=v["context_width"],
            text=None,
            image_tokens=4,
            add_text_embedding=True,
            dtype="bfloat16",
        ),
        diffusion=dict(name="cosine", num_steps=common.SCHEDULE_STEPS),
        objective=dict(
            image_size=64, target="eps", clip_drop=0.1, text_drop=0.3, vlb_weight=0.001, empty_caption=True
        ),
        sampler=dict(name="ddpm", steps=25, guidance=8.0),
        tokenizer=common.TOKENIZER_OF_CLIP,
        optim=shared.adamw(lr=1.2e-4, weight_decay=0.0, b2=0.999, eps=1e-8),
        ema_decay=0.9999,
    )
