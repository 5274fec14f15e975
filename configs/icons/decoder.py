"""The decoder on icons, at 64 px.

    unclip train --config configs/icons/decoder.py --workdir runs/icons/decoder --config.clip=runs/icons/clip

Variants: laptop, tiny (for tests); in configs/small.py.
"""

from configs import common, small


def get_config(variant: str = ""):
    return small.decoder(common.choose(variant, small.DECODER), data=dict(source="icons", size=64))
