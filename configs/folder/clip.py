"""CLIP on one's own captioned pictures, at 64 px. docs/training.md says how captions are written.

    unclip data show folder --path pictures --out out/sheet.png
    unclip train --config configs/folder/clip.py --workdir runs/clip --config.data.path=pictures

Captions longer than `tokenizer.max_len` tokens lose their end. Where fewer than some hundred pictures leave nothing for
the split `test`, add --config.eval.split=train.

Variants: laptop, tiny (for tests); in configs/small.py.
"""

from configs import common, small


def get_config(variant: str = ""):
    return small.clip(common.choose(variant, small.CLIP), data=small.folder(64), vocab_size=4096, max_len=64)
