"""Tests run on eight simulated CPU devices, unless JAX_PLATFORMS says otherwise, with strict broadcasting.

Most of a test's time is compiling, of programs that run for a moment: so LLVM does not optimise them, gets each as one
module, and from the older of XLA's emitters, whose code it compiles in a third of the time. Tracing makes many objects
and few cycles, so memory is swept for those more rarely.
"""

import gc
import importlib.metadata
import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
FLAGS = {
    "xla_force_host_platform_device_count": 8,
    "xla_backend_optimization_level": 0,
    "xla_cpu_parallel_codegen_split_count": 1,
}
if importlib.metadata.version("jaxlib").startswith("0.10."):  # the flag is gone in 0.11, and an unknown one is fatal
    FLAGS["xla_cpu_use_fusion_emitters"] = "false"
given = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = " ".join([given, *(f"--{k}={v}" for k, v in FLAGS.items() if k not in given)]).strip()

# Commands that tests start read it too.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")  # a program says of no operation where it was called

import jax  # noqa: E402 (reads all of them when imported)
import pytest  # noqa: E402

gc.set_threshold(100_000, 50, 100)
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_collection_finish():
    """What all imports made is there for good, so no sweep looks at it again."""
    settle()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    """Nor at what a file's tests left in caches: each run of training makes a sweep."""
    if nextitem is None or nextitem.path != item.path:
        settle()


def settle():
    gc.collect()
    gc.freeze()
