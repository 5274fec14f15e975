"""What the paper's sizes share: one's own captioned pictures, bfloat16, recomputation, parameters split over devices.

`num_workers` processes of the host read pictures. `fsdp` is the least number of devices; more of them make copies.
"""

from configs import common

CLIP_TOKENS = dict(vocab_size=49408, max_len=77)
FAST = dict(dtype="bfloat16", remat="full")


def base(task: str, size: int, fsdp: int, **blocks):
    """`common.base` for a run of weeks, on the central squares of pictures, `size` pixels wide."""
    return common.base(
        task,
        data={"source": "folder", "path": "", "size": size, "max_bad": 0.1, **blocks.pop("data", {})},
        loader={"num_workers": 8, "num_threads": 16, **blocks.pop("loader", {})},
        mesh=dict(fsdp=fsdp),
        every=dict(log=100, save=5000, preview=5000, eval=5000),
        **blocks,
    )


def adamw(lr: float, weight_decay: float, b2: float, eps: float) -> dict:
    """The paper's numbers, b1 = 0.9. It names no schedule and no clipping: constant after 1,000 steps, clipped at 1."""
    return dict(lr=lr, weight_decay=weight_decay, b1=0.9, b2=b2, eps=eps, warmup=1000, schedule="constant")
