"""Where the time of a training run goes, and which part of its devices' peak its steps use.

    images/s           images of the steps / time in steps and in waiting for input
    input wait         waiting for input / the same time
    FLOP/s a device    FLOPs of the steps, without recomputation / the same time / devices
    MFU                that / the device's peak (Chowdhery et al. 2022, App. B)
    checkpoint stall   seconds that saving held the loop up
    goodput            time in steps that count / time since the run was first started

Steps count once they are in the state that a run goes on from: what a killed process did after its last checkpoint does
not, nor does the time until the run is started again. Compiling, saving, previews and held-out metrics are neither
steps nor input. The clock is the host's, which runs ahead of the devices between two lines of the log; nothing waits
for them but the log itself, so input wait is the most that it can be: the devices may have been busy all the same.
"""

import time
from collections import Counter
from collections.abc import Callable, Mapping

GIB = 1 << 30
# Dense bf16 FLOP/s of a chip, as in the data sheets that `plan.chips.CHIPS` names.
FLOPS = {"v4": 275e12, "v5e": 197e12, "v5p": 459e12, "v6e": 918e12, "a100": 312e12, "h100": 989e12, "h200": 989e12}
# The chip by the start of jax's device_kind. Others have no MFU.
KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5p": "v5p",
    "TPU v5": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "NVIDIA A100": "a100",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
}
PEAKS = {kind: FLOPS[chip] for kind, chip in KINDS.items()}


def peak_flops(device_kind: str) -> float | None:
    """Of one device; None where it is not known, as for the parts that a GPU was cut into (MIG)."""
    fitting = [kind for kind in PEAKS if device_kind == kind or device_kind.startswith((f"{kind} ", f"{kind}-"))]
    return PEAKS[max(fitting, key=len)] if fitting and "MIG" not in device_kind else None


class Meter:
    """A stopwatch whose every moment belongs to something: "start", "compile", "input", "step", "checkpoint", "checks".

    Args:
      clock, wall: seconds that never go back, and Unix time.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter, wall: Callable[[], float] = time.time):
        self.clock, self.wall = clock, wall
        self.began, self.useful = wall(), 0.0  # Unix time of the run's first start; seconds of steps that count
        self.flops = 0.0  # of a step, on each device
        self.spent: Counter[str] = Counter()  # since the last `read`
        self.last = clock()

    def go_on(self, meta: Mapping) -> None:
        """Takes over what an earlier process's checkpoint says (`stored`)."""
        self.began, self.useful = meta.get("began", self.began), meta.get("useful", self.useful)

    def lap(self, what: str) -> None:
        """The time since the last lap belongs to `what`."""
        now = self.clock()
        self.spent[what] += now - self.last
        self.useful += (now - self.last) * (what == "step")
        self.last = now

    def stored(self) -> dict[str, float]:
        """For a checkpoint, as JSON values."""
        return {"began": self.began, "useful": self.useful}

    def read(self, steps: int, batch_size: int, device_kind: str) -> dict[str, float]:
        """What the table above says of the `steps` since the last reading; names are of a unit or of a share."""
        spent, self.spent = self.spent, Counter()
        # Another host's clock may be behind that of the host where the run was started.
        goodput = self.useful / max(self.wall() - self.began, self.useful, 1e-9)
        rates = {"checkpoint_seconds": spent["checkpoint"], "goodput": goodput}
        seconds = spent["step"] + spent["input"]
        if seconds > 0:
            rates |= {"images_per_second": steps * batch_size / seconds, "input_wait": spent["input"] / seconds}
            rates["device_flops_per_second"] = steps * self.flops / seconds
            if peak := peak_flops(device_kind):
                rates["mfu"] = rates["device_flops_per_second"] / peak
        return rates
