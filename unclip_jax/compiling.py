"""Compiling ahead of time: faster on a CPU, and what it leaves in the C library's heap is given back."""

import ctypes
import gc
import os
import time

import jax

LONG = 1.0  # seconds of compiling, or of reading from the cache; what takes less leaves little
LEVEL = "xla_backend_optimization_level"


def compiled(program: jax.stages.Lowered) -> jax.stages.Compiled:
    """`program.compile()`; what that took is given back before the program runs, if it took `LONG`.

    On a CPU LLVM optimises at level 1, where XLA_FLAGS does not name another: the products and convolutions in which
    the time goes are as fast as at XLA's 3; the bundled stack's programs compile in two thirds of the time, train steps
    in 82 to 97 % of it (docs/results.md).
    """
    less = jax.default_backend() == "cpu" and LEVEL not in os.environ.get("XLA_FLAGS", "")
    start = time.monotonic()
    made = program.compile({LEVEL: 1} if less else None)
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
