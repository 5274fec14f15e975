"""The autoregressive prior on icons.

    unclip train --config configs/icons/prior_ar.py --workdir runs/icons/prior_ar --config.clip=runs/icons/clip

Variants: laptop, tiny (for tests); in configs/small.py.
"""

from configs import common, small


def get_config(variant: str = ""):
    return small.prior_ar(common.choose(variant, small.PRIOR_AR), data=dict(source="icons", size=64))
