"""The CLIP that Karlo stands on: OpenAI's ViT-L/14, its embeddings as projected, of no set length.

    unclip train --config configs/karlo/clip.py --workdir runs/karlo/clip \\
        --config.data.path=pictures --config.tokenizer.path=clip-tokenizer

| Variant | image | vision: width, layers | text: width, layers | embedding | parameters (both towers) |
|---|---|---|---|---|---|
| vit_l14 | 224 px | 1024, 24 | 768, 12 | 768 | 427,616,513 |

As `configs/dalle2/clip.py:vit_l14` but for that length. Karlo took OpenAI's weights; this trains one's own.
"""

from configs import common
from configs.dalle2 import clip

VARIANTS = {"vit_l14": dict(norm=None)}


def get_config(variant: str = ""):
    v = common.choose(variant, VARIANTS)
    config = clip.get_config("vit_l14")
    config.model.norm = v["norm"]
    return config
