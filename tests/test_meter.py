"""The stopwatch on a clock made by hand: every second belongs to one thing, also over restarts."""

import jax
import pytest

from unclip_jax import meter
from unclip_jax.plan.chips import CHIPS


class Clock:
    """Says what it is told."""

    def __init__(self, now: float = 0.0):
        self.now = now

    def __call__(self) -> float:
        return self.now


def made(now=0.0):
    clock = Clock(now)
    return meter.Meter(clock, clock), clock


def spend(watch, clock, **seconds):
    for what, count in seconds.items():
        clock.now += count
        watch.lap(what)


def test_every_second_belongs_to_one_thing():
    watch, clock = made(1000.0)
    watch.flops = 6e12 / 8
    spend(watch, clock, start=5, compile=20)
    for _ in range(4):
        spend(watch, clock, input=1, step=3)
    spend(watch, clock, checkpoint=7, checks=2)
    told = watch.read(4, 32, "TPU v5 lite")
    assert told == {
        "images_per_second": 4 * 32 / 16, "input_wait": 0.25, "checkpoint_seconds": 7, "goodput": 12 / 50,
        "device_flops_per_second": 4 * 6e12 / 16 / 8, "mfu": 4 * 6e12 / 16 / 8 / 197e12,
    }  # fmt: skip
    spend(watch, clock, input=0, step=10)
    told = watch.read(2, 32, "cpu")
    assert told["images_per_second"] == 6.4 and told["goodput"] == 22 / 60
    assert told["checkpoint_seconds"] == told["input_wait"] == 0 and "mfu" not in told


def test_goodput_counts_what_was_saved_and_all_the_time_since_the_first_start():
    """30 s of steps saved, 50 s more lost by a kill, an hour down, 10 s of start, then 20 s of steps."""
    watch, clock = made(500.0)
    spend(watch, clock, start=10, step=30)
    stored = watch.stored()
    spend(watch, clock, step=50)
    watch, clock = made(clock.now + 3600)
    watch.go_on({**stored, "config": "…"})
    spend(watch, clock, start=10, step=20)
    assert watch.read(1, 1, "cpu")["goodput"] == pytest.approx((30 + 20) / (10 + 30 + 50 + 3600 + 10 + 20))
    plain, clock = made()
    plain.go_on({})  # of a checkpoint that knows nothing of it
    assert plain.stored() == {"began": 0.0, "useful": 0.0}


KINDS = {
    "TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5p": "v5p", "TPU v5": "v5p", "TPU v6 lite": "v6e",
    "TPU v6e": "v6e", "NVIDIA A100-SXM4-80GB": "a100", "NVIDIA A100 80GB PCIe": "a100",
    "NVIDIA H100 80GB HBM3": "h100", "NVIDIA H200": "h200",
}  # fmt: skip


def test_peaks_are_those_of_the_plan():
    assert {kind: meter.peak_flops(kind) for kind in KINDS} == {k: CHIPS[chip].flops for k, chip in KINDS.items()}
    assert set(meter.PEAKS) <= {k for k in meter.PEAKS if meter.peak_flops(k) == meter.PEAKS[k]}


@pytest.mark.parametrize("kind", ["cpu", "TPU v50", "NVIDIA H100 PCIe", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", ""])
def test_an_unknown_device_has_no_peak(kind):
    assert meter.peak_flops(kind) is None


def test_this_machines_device_has_a_kind():
    assert meter.peak_flops(jax.devices()[0].device_kind) is None or jax.default_backend() != "cpu"


def test_a_host_whose_clock_is_behind_tells_no_goodput_above_all_time():
    watch, _ = made(500.0)
    watch.go_on({"began": 900.0, "useful": 30.0})
    assert watch.read(1, 1, "cpu")["goodput"] == 1
