"""What is freed is kept for what comes next: counted in pages that the kernel had to give."""

import subprocess
import sys

import jax
import pytest

from unclip_jax import heap

SIZE = 2**28
ASK = f"""
import resource, sys
import numpy as np
from unclip_jax import heap
kept = sys.argv[1] == "keep" and heap.keep()
faults = []
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones({SIZE}, np.uint8)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(kept, *faults)
"""


def faults(how: str) -> tuple[str, list[int]]:
    done = subprocess.run([sys.executable, "-c", ASK, how], stdout=subprocess.PIPE, text=True, check=True)
    kept, *counts = done.stdout.split()
    return kept, [int(n) for n in counts]


@pytest.mark.skipif(sys.platform != "linux" or jax.default_backend() != "cpu", reason="of glibc, on a CPU")
def test_only_the_first_large_array_asks_the_kernel_for_pages():
    kept, counts = faults("keep")
    if kept == "False":
        pytest.skip("this libc has no mallopt")
    assert counts[0] > 10 * max(counts[1:]), counts
    assert min(faults("leave")[1]) > 10 * max(counts[1:]), "without it each array does"


def test_on_other_devices_the_process_is_left_alone(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda name: pytest.fail("asked libc"))
    assert heap.keep() is False
