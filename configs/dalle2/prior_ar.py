"""The paper's autoregressive prior (unCLIP, table 3 and App. C).

    unclip train --config configs/dalle2/prior_ar.py --workdir runs/dalle2/prior_ar \\
        --config.data.path=pictures --config.clip=runs/dalle2/clip

| Variant | caption encoder: width, layers, heads | latent decoder | codes, buckets | parameters |
|---|---|---|---|---|
| paper | 2048, 24, 32 | 1664, 24, 26 | 319, 1,024 | 2,119,287,040 (paper: "1B") |

The count is for vit_h16 of `clip.py`. The paper's "1B" cannot be the sum of its table: the 24 blocks of the caption
encoder are 1.21B and those of the latent decoder 0.80B. The rest here is CLIP's 49,408 token embeddings, 0.10B, and
tables and projections, 0.01B. Batch 4096, 1M iterations.

Unlike the paper: 77 caption tokens, the CLIP's, not 256, so the latent decoder's sequence is 77 + 1 + 319, not 384. The
paper does not say into how many buckets the dot product goes, nor how the two networks meet: here as many as a code
has, and the encoder's outputs are the prefix. It keeps the best of 2 for the diffusion prior; here for this one too.
Pictures come at 256 px and are resized where the CLIP takes others.
"""

from configs import common
from configs.dalle2 import shared

VARIANTS = {
    "paper": dict(
        text=dict(width=2048, layers=24, heads=32),
        decoder=dict(width=1664, layers=24, heads=26),
        dims=319,
        buckets=1024,
    ),
}


def get_config(variant: str = ""):
    v = common.choose(variant, VARIANTS)
    return shared.base(
        "prior_ar",
        size=256,
        fsdp=8,
        batch_size=4096,
        num_steps=1_000_000,
        model=dict(
            caption="tokens",
            text=dict(v["text"], remat="full"),
            dims=v["dims"],
            buckets=v["buckets"],
            dot_buckets=1024,
            **v["decoder"],
            **shared.FAST,
        ),
        objective=dict(text_drop=0.1),
        sampler=dict(temperature=1.0, top_p=1.0, guidance=1.0, candidates=2),
        tokenizer=common.TOKENIZER_OF_CLIP,
        optim=shared.adamw(lr=1.6e-4, weight_decay=4.0e-2, b2=0.91, eps=1e-10),
        ema_decay=0.999,
    )
