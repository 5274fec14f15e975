"""Compiling ahead of time; what it leaves in the C library's heap, more than programs then need, is given back."""

import ctypes
import gc
import time

import jax

LONG = 1.0  # seconds of compiling, or of reading from the cache; what takes less leaves little


def compiled(program: jax.stages.Lowered, once: bool = False) -> jax.stages.Compiled:
    """`program.compile()`; what that took is given back before the program runs, if it took `LONG`.

    One to run `once` is optimised less on a CPU: hundreds of random arrays would compile twice to four times as long.
    """
    less = {"xla_backend_optimization_level": 1} if once and jax.default_backend() == "cpu" else None
    start = time.monotonic()
    made = program.compile(less)
    if time.monotonic() - start > LONG:
        trim()
    return made


def trim() -> None:
    """Gives what is garbage back to the system: after a UNet's train step is compiled, a gigabyte of the host's.

    By glibc's malloc_trim; elsewhere it is freed, and that is all.
    """
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        pass
