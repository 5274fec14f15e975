"""The autoregressive prior on one's own captioned pictures.

    unclip train --config configs/folder/prior_ar.py --workdir runs/prior_ar \\
        --config.data.path=pictures --config.clip=runs/clip

Variants: laptop, tiny (for tests); in configs/small.py.
"""

from configs import common, small


def get_config(variant: str = ""):
    return small.prior_ar(common.choose(variant, small.PRIOR_AR), data=small.folder(64))
