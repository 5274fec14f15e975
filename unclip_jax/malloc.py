"""The C library's heap, in which compilers leave more than programs then need."""

import ctypes


def trim() -> None:
    """Gives what was freed back to the system: after a UNet's train step is compiled, over a gigabyte of the host's.

    By glibc's malloc_trim; where there is none, nothing.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        pass
