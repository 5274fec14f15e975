"""The diffusion prior on one's own captioned pictures.

    unclip train --config configs/folder/prior_diffusion.py --workdir runs/prior \\
        --config.data.path=pictures --config.clip=runs/clip

Variants: laptop, tiny (for tests); in configs/small.py.
"""

from configs import common, small


def get_config(variant: str = ""):
    return small.prior(common.choose(variant, small.PRIOR), data=small.folder(64))
