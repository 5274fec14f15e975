"""The heap of a process that computes on a CPU, where XLA's arrays come from malloc."""

import ctypes
import sys

import jax

# Of <malloc.h>. No array by mmap, none of the heap given back, one heap for all threads.
KEEP = {"M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, -1), "M_ARENA_MAX": (-8, 1)}


def keep() -> bool:
    """Has glibc keep what is freed for what is allocated next, if jax computes on a CPU; whether it does.

    By itself it gives each large array back to the system, which must clear those pages again when the next step asks
    for as many: a tenth of a training step's time, and up to a fifth of its memory (docs/results.md). The choice is
    the whole process's, so that commands make it and `import unclip_jax` does not. It asks jax for its devices.
    """
    if sys.platform != "linux" or jax.default_backend() != "cpu":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    return mallopt is not None and all([mallopt(*option) == 1 for option in KEEP.values()])
