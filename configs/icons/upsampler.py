"""The upsampler on icons, 64 to 128 px, trained on 64-px crops.

    unclip train --config configs/icons/upsampler.py --workdir runs/icons/upsampler

Variants: laptop, tiny (for tests); in configs/small.py.
"""

from configs import common, small


def get_config(variant: str = ""):
    return small.upsampler(common.choose(variant, small.UPSAMPLER), data=dict(source="icons", size=128), crop=64)
