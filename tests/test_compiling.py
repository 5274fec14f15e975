"""The heap is trimmed where that can be done; nothing happens elsewhere."""

import ctypes
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from unclip_jax import compiling


def resident() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as told:
        return int(told.read().split()[1]) * 4096


GLIBC = sys.platform.startswith("linux") and hasattr(ctypes.CDLL(None), "malloc_trim")


@pytest.mark.skipif(not GLIBC, reason="of glibc")
def test_what_was_freed_goes_back():
    """Blocks of the heap, every second of which stays, so that malloc itself gives none of the others back."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    blocks = [libc.malloc(2**16) for _ in range(2000)]
    for block in blocks:
        ctypes.memset(block, 1, 2**16)
    for block in blocks[::2]:
        libc.free(block)
    before = resident()
    compiling.trim()
    after = resident()
    for block in blocks[1::2]:
        libc.free(block)
    assert before - after > 1000 * 2**15


@pytest.mark.parametrize("error", [AttributeError, OSError, TypeError])
def test_elsewhere_nothing_happens(error, monkeypatch):
    def missing(*_):
        raise error

    monkeypatch.setattr(compiling, "ctypes", SimpleNamespace(CDLL=missing))
    compiling.trim()


@pytest.mark.parametrize("seconds, trims", [(0.5 * compiling.LONG, 0), (2 * compiling.LONG, 1)])
def test_a_program_is_compiled_and_what_a_long_one_took_is_given_back(seconds, trims, monkeypatch):
    calls, clock = [], iter([100.0, 100.0 + seconds])
    monkeypatch.setattr(compiling, "trim", lambda: calls.append("trim"))
    monkeypatch.setattr(compiling, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    double = compiling.compiled(jax.jit(lambda x: 2 * x).lower(3))
    assert len(calls) == trims and int(double(3)) == 6


@pytest.mark.parametrize(
    "backend, flags, options",
    [
        ("cpu", "", {compiling.LEVEL: 1}),
        ("cpu", "--xla_dump_to=x", {compiling.LEVEL: 1}),
        ("cpu", f"--xla_dump_to=x --{compiling.LEVEL}=3", None),
        ("gpu", "", None),
    ],
)
def test_a_cpus_programs_are_optimised_less_unless_xla_is_told_a_level(backend, flags, options, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setenv("XLA_FLAGS", flags)
    assert compiling.compiled(SimpleNamespace(compile=lambda given: (given, "made"))) == (options, "made")


def test_what_is_optimised_less_gives_the_same(monkeypatch):
    """Numbers from 0 to 4; code that is optimised otherwise rounds otherwise."""

    def made():
        return {"w": jax.random.normal(jax.random.key(0), (64, 48)), "b": jax.random.uniform(jax.random.key(1), (7,))}

    monkeypatch.setenv("XLA_FLAGS", "")
    got = compiling.compiled(jax.jit(made).lower())()
    for name, array in jax.jit(made)().items():
        np.testing.assert_allclose(got[name], array, rtol=1e-5, atol=1e-6)
