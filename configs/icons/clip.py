"""CLIP on icons (OpenMoji) at 64 px. Needs `pip install "unclip_jax[icons]"`.

    unclip data show icons --out out/icons.png
    unclip train --config configs/icons/clip.py --workdir runs/icons/clip
    unclip train --config configs/icons/clip.py:tiny --workdir /tmp/icons     # a minute on a laptop

Variants: laptop, tiny (for tests); in configs/small.py.
"""

from configs import common, small


def get_config(variant: str = ""):
    return small.clip(common.choose(variant, small.CLIP), data=dict(source="icons", size=64), vocab_size=2048)
