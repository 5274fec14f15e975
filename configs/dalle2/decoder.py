"""The paper's decoder at 64 px (unCLIP, section 2.1, table 3 and App. C): GLIDE with CLIP image embeddings.

    unclip train --config configs/dalle2/decoder.py --workdir runs/dalle2/decoder \\
        --config.data.path=pictures --config.clip=runs/dalle2/clip

| Variant | UNet | caption Transformer | parameters |
|---|---|---|---|
| paper | 512 channels x 1, 2, 3, 4; 3 blocks; attention at 32, 16, 8 | 2048 wide, 24 layers, 32 heads | 3,562,963,462 |
| inpaint | the same, and four more input channels, as GLIDE's | the same | 3,562,981,894 |

The paper: 3.5B. The count is for vit_h16 of `clip.py` and holds both networks, as the paper's must: UNet 2.24B, caption
Transformer 1.31B with its token embeddings, conditioning 0.01B (GLIDE: 2.3B and 1.2B). Batch 2048, 800K iterations, 250
steps sampled.

The variant inpaint is for fine-tuning by --config.init=runs/dalle2/decoder: the added channels begin without effect.
Its 100K iterations are not from the paper.

The CLIP sees the pictures at 256 px (`data.size`), the UNet at 64 (`objective.image_size`), as in the paper. Unlike the
paper: 77 caption tokens, the CLIP's, not 256. The guidance is that of its FID table.
"""

from configs import common
from configs.dalle2 import shared

VARIANTS = {
    "paper": dict(
        unet=dict(channels=512, multipliers=(1, 2, 3, 4), blocks=3, attention=(32, 16, 8), dropout=0.1),
        context_width=2048,
        text=dict(layers=24, heads=32),
    ),
}
VARIANTS["inpaint"] = dict(VARIANTS["paper"], inpaint=True)


def get_config(variant: str = ""):
    v = common.choose(variant, VARIANTS)
    return shared.base(
        "decoder",
        size=256,
        fsdp=32,
        batch_size=2048,
        num_steps=100_000 if v.get("inpaint") else 800_000,
        model=dict(
            unet=dict(v["unet"], head_channels=64, remat="full"),
            context_width=v["context_width"],
            text=dict(v["text"], remat="full"),
            dtype="bfloat16",
        ),
        diffusion=dict(name="cosine", num_steps=common.SCHEDULE_STEPS),
        objective=dict(
            dict(image_size=64, target="eps", clip_drop=0.1, text_drop=0.5, vlb_weight=0.001),
            **({"inpaint": True} if v.get("inpaint") else {}),
        ),
        sampler=dict(name="ddpm", steps=250, guidance=1.25, **common.GUIDED),
        tokenizer=common.TOKENIZER_OF_CLIP,
        optim=shared.adamw(lr=1.2e-4, weight_decay=0.0, b2=0.999, eps=1e-8),
        ema_decay=0.9999,
    )
