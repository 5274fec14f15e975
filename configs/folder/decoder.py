"""The decoder on one's own captioned pictures, at 64 px.

    unclip train --config configs/folder/decoder.py --workdir runs/decoder \\
        --config.data.path=pictures --config.clip=runs/clip

Variants: laptop, tiny (for tests); in configs/small.py.
"""

from configs import common, small


def get_config(variant: str = ""):
    return small.decoder(common.choose(variant, small.DECODER), data=small.folder(64))
