"""The diffusion prior on icons.

    unclip train --config configs/icons/prior_diffusion.py --workdir runs/icons/prior --config.clip=runs/icons/clip

Variants: laptop, tiny (for tests); in configs/small.py.
"""

from configs import common, small


def get_config(variant: str = ""):
    return small.prior(common.choose(variant, small.PRIOR), data=dict(source="icons", size=64))
