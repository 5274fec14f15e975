"""Where the rows of `benchmarks.run` are measured, and how each side is waited for, counted and freed there.

On a GPU both sides hold part of the same card: jax takes memory as it needs it, up to half.
"""

import contextlib
import gc
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple


class Device(NamedTuple):
    """The device of both sides and their precision; see `CPU` and `GPU`.

    In bfloat16 our networks compute in it, with weights in it to draw and in f32 to train; so do the peer's, the latter
    by autocast. Our weights are then random ones of our own and the peer's are made where they stay: bringing a billion
    over takes longer than the rows.
    """

    name: str  # as in `--device`
    torch: str  # of the peer's tensors
    dtype: str  # of the computation
    compiled: bool  # measure torch.compile beside the peer as it is
    train_steps: int  # of training that are timed as one; the host runs ahead in them, as in a real run

    @property
    def half(self) -> bool:
        """Whether it computes in bfloat16."""
        return self.dtype == "bfloat16"

    def tensor(self, array, training: bool = False):
        """A numpy array as the peer's tensor; in training f32 stays f32."""
        import torch

        made = torch.from_numpy(array).to(self.torch)
        return made.to(torch.bfloat16) if self.half and not training and made.is_floating_point() else made

    def network(self, make: Callable[[], Any], training: bool = False):
        """The peer's network that `make` makes."""
        import torch

        with torch.device(self.torch):
            made = make().to(self.torch)
        return made.to(torch.bfloat16) if self.half and not training else made

    def noise(self, shape: tuple[int, ...]):
        """Normal torch tensor of the dtype that the peer draws in."""
        import torch

        return torch.randn(shape, device=self.torch, dtype=getattr(torch, self.dtype))

    def autocast(self) -> contextlib.AbstractContextManager:
        """Around the peer's loss."""
        import torch

        if not self.half:
            return contextlib.nullcontext()
        return torch.autocast(torch.device(self.torch).type, torch.bfloat16)

    @property
    def _cuda(self) -> bool:
        return self.torch.startswith("cuda")

    def wait(self) -> None:
        """Until the peer's work is done."""
        if self._cuda:
            import torch

            torch.cuda.synchronize()

    def forget_peak(self) -> None:
        """So that `peak_gb` is that of what comes."""
        if self._cuda:
            import torch

            torch.cuda.reset_peak_memory_stats()

    def peak_gb(self) -> float | None:
        """The most that the peer has held since; None where torch does not count."""
        if not self._cuda:
            return None
        import torch

        return torch.cuda.max_memory_allocated() / 1e9

    def free(self) -> None:
        """Between rows: what nobody holds any more, and what torch has compiled, which it would try to share."""
        gc.collect()
        if self.compiled:
            import torch

            torch.compiler.reset()
        if self._cuda:
            import torch

            torch.cuda.empty_cache()


CPU = Device("cpu", "cpu", "float32", compiled=False, train_steps=1)
GPU = Device("gpu", "cuda", "bfloat16", compiled=True, train_steps=4)
DEVICES = {device.name: device for device in (CPU, GPU)}


def prepare(device: Device, threads: int) -> None:
    """Sets what both frameworks read when they are first imported: threads of a CPU, memory of a GPU."""
    if device is CPU:
        flags = os.environ.get("XLA_FLAGS", "")
        if threads == 1:
            flags += " --xla_cpu_multi_thread_eigen=false"
        os.environ |= {"XLA_FLAGS": flags, "OMP_NUM_THREADS": str(threads), "JAX_PLATFORMS": "cpu"}
    else:
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


def set_up_torch(device: Device, threads: int) -> None:
    """The peer at its best: so many threads; on a GPU convolutions tried out and products of f32 in TF32, as by XLA."""
    import torch

    if device is CPU:
        torch.set_num_threads(threads)
    else:
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True


def name_of(device: Device) -> str | None:
    """The GPU's, as jax calls it; None on a CPU. SystemExit where jax or torch sees none."""
    if device is CPU:
        return None
    import jax
    import torch

    if jax.default_backend() != "gpu" or not torch.cuda.is_available():
        raise SystemExit(f"--device gpu: jax has {jax.devices()}, torch has CUDA: {torch.cuda.is_available()}")
    return jax.devices()[0].device_kind


def process_peak_gb() -> float | None:
    """The most that jax has held since the process began; None where it does not count."""
    import jax

    held = jax.devices()[0].memory_stats()
    return held["peak_bytes_in_use"] / 1e9 if held else None


class Program:
    """A jitted function, compiled for the first arguments that it is called with, which knows what a call costs."""

    def __init__(self, function: Callable, **jit):
        import jax

        self._jitted, self.compiled = jax.jit(function, **jit), None
        self.flops, self.compile_seconds = 0.0, 0.0

    def __call__(self, *args):
        if self.compiled is None:
            self.compile(*args)
        return self.compiled(*args)

    def compile(self, *args) -> None:
        """Before it is called, for arguments of such shapes."""
        from unclip_jax.compiling import compiled
        from unclip_jax.cost import jaxpr_flops

        start = time.perf_counter()
        traced = self._jitted.trace(*args)
        self.compiled = compiled(traced.lower())
        self.compile_seconds = time.perf_counter() - start
        self.flops = jaxpr_flops(traced.jaxpr)


class Work:
    """Our side of a row: a call does it once, and it is done when the call returns. `times`: calls of each program."""

    def __init__(self, run: Callable[[], Any], *programs: Program, times: int = 1):
        self._run, self._programs, self._times = run, programs, times

    def __call__(self):
        import jax

        return jax.block_until_ready(self._run())

    @property
    def flops(self) -> float:
        """Of matrix products and convolutions, in one call."""
        return self._times * sum(program.flops for program in self._programs)

    @property
    def compile_seconds(self) -> float:
        """Of tracing and compiling, together."""
        return sum(program.compile_seconds for program in self._programs)

    def peak_gb(self) -> float | None:
        """All programs' arguments, and the results and temporaries of that with most, as the compiler laid them out."""
        found = [program.compiled.memory_analysis() for program in self._programs]
        if None in found:
            return None
        held = sum(m.argument_size_in_bytes for m in found)
        own = max(m.output_size_in_bytes + m.temp_size_in_bytes - m.alias_size_in_bytes for m in found)
        return (held + own) / 1e9


def eager(run: Callable[[], Any]) -> Callable[[], Any]:
    """`run` with torch's networks as they are, though they are marked to be compiled."""
    import torch

    def inner():
        with torch.compiler.set_stance("force_eager"):
            return run()

    return inner


def networks(models) -> list:
    """torch networks in nested tuples."""
    return [net for part in models for net in (networks(part) if isinstance(part, tuple) else [part])]
