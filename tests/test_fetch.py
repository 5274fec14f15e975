"""The device works while results are copied and used."""

import jax
import numpy as np
import pytest

from unclip_jax.fetch import fetched


class Result:
    """What a device computes: tells when it is asked for, when its copy begins and when it is waited for."""

    def __init__(self, number, log):
        self.number, self.log = number, log
        log.append(f"compute {number}")

    def copy_to_host_async(self):
        if f"copy {self.number}" not in self.log:
            self.log.append(f"copy {self.number}")

    def __array__(self, *_, **__):
        self.log.append(f"wait {self.number}")
        return np.full(2, self.number)


def log_of(count):
    log = []
    for got in fetched({"x": Result(number, log)} for number in range(count)):
        assert type(got["x"]) is np.ndarray
        log.append(f"use {got['x'][0]}")
    return log


def test_on_an_accelerator_the_next_is_computed_while_one_is_copied_and_used(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    first, between = ["compute 0", "copy 0"], ["compute {1}", "copy {1}", "wait {0}", "use {0}"]
    steps = [step.format(k, k + 1) for k in range(2) for step in between]
    assert log_of(3) == [*first, *steps, "wait 2", "use 2"]


def test_on_a_cpu_one_follows_the_other():
    assert log_of(3) == [step.format(k) for k in range(3) for step in ("compute {}", "copy {}", "wait {}", "use {}")]


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@pytest.mark.parametrize("count", [0, 1, 4])
def test_all_come_in_order(monkeypatch, backend, count):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    twice = jax.jit(lambda x: 2 * x)
    assert [int(x) for x in fetched(twice(k) for k in range(count))] == [2 * k for k in range(count)]
