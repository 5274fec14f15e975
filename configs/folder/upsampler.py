"""The upsampler on one's own pictures, 64 to 128 px, trained on 64-px crops. It reads no captions.

    unclip train --config configs/folder/upsampler.py --workdir runs/upsampler --config.data.path=pictures

Variants: laptop, tiny (for tests); in configs/small.py.
"""

from configs import common, small


def get_config(variant: str = ""):
    return small.upsampler(common.choose(variant, small.UPSAMPLER), data=small.folder(128, captions=False), crop=64)
