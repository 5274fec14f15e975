"""The paper's diffusion prior (unCLIP, table 3 and App. C).

    unclip train --config configs/dalle2/prior_diffusion.py --workdir runs/dalle2/prior \\
        --config.data.path=pictures --config.clip=runs/dalle2/clip

| Variant | width | layers | heads | steps sampled | batch | iterations | parameters |
|---|---|---|---|---|---|---|---|
| paper | 2048 | 24 | 32 | 64 | 4096 | 600K | 1,324,648,448 (paper: "1B") |

The count is for vit_h16 of `clip.py`. The 24 blocks alone, whose sizes the paper gives, are 1.21B, so its "1B" has one
digit; CLIP's 49,408 token embeddings are 0.10B more, and the projections and the time embedding the last 0.01B.

Unlike the paper: 77 caption tokens, the CLIP's, not 256; whitened embeddings in place of the factor 17.2 (each
component is brought to mean 0 and variance 1; the factor only scales all of them alike); ancestral sampling with the
posterior's variance, not the analytic one. Pictures come at 256 px and are resized where the CLIP takes others.
"""

from configs import common
from configs.dalle2 import shared

VARIANTS = {"paper": dict(width=2048, layers=24, heads=32)}


def get_config(variant: str = ""):
    v = common.choose(variant, VARIANTS)
    return shared.base(
        "prior_diffusion",
        size=256,
        fsdp=8,
        batch_size=4096,
        num_steps=600_000,
        model=dict(caption="tokens", **v, **shared.FAST),
        diffusion=dict(name="cosine", num_steps=common.SCHEDULE_STEPS),
        objective=dict(text_drop=0.1, clip_x0=5.0),
        sampler=dict(name="ddpm", steps=64, guidance=1.0, candidates=2, **common.GUIDED),
        tokenizer=common.TOKENIZER_OF_CLIP,
        optim=shared.adamw(lr=1.1e-4, weight_decay=6.0e-2, b2=0.96, eps=1e-6),
        ema_decay=0.9999,
    )
