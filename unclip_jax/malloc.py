"""The C library's heap, in which compilers leave more than programs then need."""

import ctypes
import gc


def trim() -> None:
    """Gives what is garbage back to the system: after a UNet's train step is compiled, a gigabyte of the host's.

    By glibc's malloc_trim; elsewhere it is freed, and that is all.
    """
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        pass
