"""CLIP in the paper's size and in OpenAI's (unCLIP, App. C; Radford et al. 2021, tables 18 and 20).

    unclip train --config configs/dalle2/clip.py --workdir runs/dalle2/clip \\
        --config.data.path=pictures --config.tokenizer.path=clip-tokenizer
    unclip train --config configs/dalle2/clip.py:vit_b32 --workdir runs/b32 --config.data.path=pictures

`tokenizer.path` is a folder with CLIP's tokenizer.json, or vocab.json and merges.txt; "" trains one on the first 20,000
captions. Prior and decoder take vocabulary and caption length, 77 tokens, from the CLIP.

| Variant | image | vision: width, layers | text: width, layers | embedding | parameters (both towers) |
|---|---|---|---|---|---|
| vit_h16 (the paper's) | 256 px | 1280, 32 | 1024, 24 | 1024 | 986,339,841 |
| vit_l14 | 224 px | 1024, 24 | 768, 12 | 768 | 427,616,513 |
| vit_b16 | 224 px | 768, 12 | 512, 12 | 512 | 149,620,737 |
| vit_b32 | 224 px | 768, 12 | 512, 12 | 512 | 151,277,313 |

The last three are OpenAI's released networks to the parameter. The unCLIP paper gives no heads for ViT-H/16: 16, as in
open_clip's. It is trained with sharpness-aware minimisation, rho = 0.1, two gradients a step (plain AdamW:
`--config.optim.sam_rho=0`). Unlike the paper: it climbs along the gradient of the whole batch, where the paper's
replicas climb each along that of their own 64 pictures; and gradients are clipped at norm 1.
Embeddings leave with norm 17.2.
`num_steps` is CLIP's 32 epochs: of 400M pictures, and for vit_h16 of the 650M that unCLIP's encoder saw.
"""

from configs import common
from configs.dalle2 import shared

OPENAI = dict(activation="quick_gelu")
VARIANTS = {
    "vit_h16": dict(
        embed_dim=1024,
        vision=dict(image_size=256, patch=16, width=1280, layers=32, heads=16),
        text=dict(width=1024, layers=24, heads=16),
        lr=3e-4,
        sam_rho=0.1,
        pictures=650e6,
    ),
    "vit_l14": dict(
        embed_dim=768,
        vision=dict(image_size=224, patch=14, width=1024, layers=24, heads=16, **OPENAI),
        text=dict(width=768, layers=12, heads=12, **OPENAI),
        lr=4e-4,
        pictures=400e6,
    ),
    "vit_b16": dict(
        embed_dim=512,
        vision=dict(image_size=224, patch=16, width=768, layers=12, heads=12, **OPENAI),
        text=dict(width=512, layers=12, heads=8, **OPENAI),
        lr=5e-4,
        pictures=400e6,
    ),
    "vit_b32": dict(
        embed_dim=512,
        vision=dict(image_size=224, patch=32, width=768, layers=12, heads=12, **OPENAI),
        text=dict(width=512, layers=12, heads=8, **OPENAI),
        lr=5e-4,
        pictures=400e6,
    ),
}
BATCH_SIZE = 32768


def get_config(variant: str = ""):
    v = common.choose(variant, VARIANTS)
    return shared.base(
        "clip",
        size=v["vision"]["image_size"],
        fsdp=8,
        batch_size=BATCH_SIZE,
        num_steps=int(32 * v["pictures"] / BATCH_SIZE),
        model=dict(
            embed_dim=v["embed_dim"],
            vision=dict(v["vision"], remat="full"),
            text=dict(v["text"], remat="full"),
            norm=17.2,
            dtype="bfloat16",
        ),
        objective=dict(loss="softmax", chunk=4096),
        tokenizer=dict(path="", **shared.CLIP_TOKENS),
        optim=dict(
            lr=v["lr"],
            warmup=2000,
            schedule="cosine",
            weight_decay=0.2,
            b1=0.9,
            b2=0.98,
            eps=1e-6,
            sam_rho=v.get("sam_rho", 0.0),
        ),
        ema_decay=0.0,  # CLIP is not averaged
    )
