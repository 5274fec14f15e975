"""The C library's heap, in which compilers leave more than programs then need."""

import ctypes
import gc

import jax


def compiled(program: jax.stages.Lowered) -> jax.stages.Compiled:
    """`program.compile()`; what that took is given back before the program runs."""
    made = program.compile()
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
