"""Karlo at its full size with random weights: the time and the memory that one picture of 256 px takes here.

    python -m benchmarks.karlo_full_size make out/karlo
    python -m benchmarks.karlo_full_size draw out/karlo --out out/karlo.json

`make` writes a stack of configs/karlo, stored as bfloat16 (7 GB), a stage at a time. `draw` loads it as
`unclip sample --low-memory` does, reports each stage, and at the end the peak of resident memory. The numbers of steps
are Karlo's unless flags give fewer. Weights are random, and so is the picture; captions are cut by a tokenizer of few
pieces, as CLIP's is not at hand, and computed at CLIP's size.
"""

import argparse
import dataclasses
import json
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp

from benchmarks.sides import random_params, shapes
from configs.karlo import clip, decoder, prior_diffusion, upsampler
from unclip_jax import tasks
from unclip_jax.pipeline import UnCLIP
from unclip_jax.tokenizer import Tokenizer
from unclip_jax.weights import BUNDLED, save_stack

PROMPT = "a red circle above a blue square"
COMPILING = "/jax/core/compile/backend_compile_duration"


def stages() -> Iterator[tuple[str, tuple]]:
    """Pairs for `weights.save_stack`, made one by one."""
    made = {
        "clip": clip.get_config(),
        "prior": prior_diffusion.get_config(),
        "decoder": decoder.get_config(),
        "upsampler": upsampler.get_config(),
    }
    made["upsampler"].unlock().objective.last_steps = 1
    for config in made.values():
        with config.unlocked():
            config.model.dtype = "float32"  # a CPU computes bfloat16 many times slower
            config.tokenizer = dict(path="", vocab_size=49408, max_len=77)
    known = tasks.make(made["clip"]).model
    for name, config in made.items():
        yield name, (random_params(shapes(tasks.make(config, clip=known), jnp.bfloat16)), config, 0, {})


class Clock:
    """What a stage spent on reading its weights and, apart from that, on compiling, in seconds."""

    def __init__(self):
        self.reading = self.compiling = 0.0
        self._in_reading = False

    def listen(self, event: str, seconds: float, **_) -> None:
        """Of jax.monitoring."""
        if event == COMPILING and not self._in_reading:
            self.compiling += seconds

    def read(self, params: Callable[[str], Mapping], stage: str) -> Mapping:
        """params(stage), on the clock."""
        start, self._in_reading = time.perf_counter(), True
        out = jax.block_until_ready(params(stage))
        self.reading, self._in_reading = self.reading + time.perf_counter() - start, False
        return out


@dataclasses.dataclass(frozen=True)
class Measured(UnCLIP):
    """A stack that tells of each stage as it ends."""

    rows: list = dataclasses.field(default_factory=list)
    clock: Clock = dataclasses.field(default_factory=Clock)

    def _params(self, stage):
        return self.clock.read(super()._params, stage)

    def run(self, stage, rows, options, *rest):
        start, reading, compiling = time.perf_counter(), self.clock.reading, self.clock.compiling
        out = super().run(stage, rows, options, *rest)
        seconds = {"read": self.clock.reading - reading, "compile": self.clock.compiling - compiling}
        seconds["draw"] = time.perf_counter() - start - sum(seconds.values())
        steps = options.get("steps", 1)
        row = {"stage": stage, "steps": steps, **{name: round(value, 1) for name, value in seconds.items()}}
        self.rows.append({**row, "per_step": round(seconds["draw"] / steps, 2), "peak_gb": round(peak(), 2)})
        print(json.dumps(self.rows[-1]), flush=True)
        return out


def peak() -> float:
    """The process's largest resident memory so far, in GB (1e9 bytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def make(path: str) -> None:
    """Writes the stack."""
    words = Tokenizer.from_json((BUNDLED / "shapes/tokenizer.json").read_text(encoding="utf-8"))
    words.max_len = 77
    out = save_stack(path, stages(), words.to_json(), "bfloat16")
    print(f"{out}: {sum(file.stat().st_size for file in out.iterdir()) / 1e9:.2f} GB, peak {peak():.2f} GB")


def draw(path: str, **steps) -> dict:
    """Draws one picture; returns what was measured."""
    pipe = Measured.load(path, low_memory=True)
    jax.monitoring.register_event_duration_secs_listener(pipe.clock.listen)
    start = time.perf_counter()
    images = pipe.generate([PROMPT], progress=False, **{name: n for name, n in steps.items() if n is not None})
    return {
        "pixels": images.shape[1],
        "seconds": round(time.perf_counter() - start, 1),
        "peak_gb": round(peak(), 2),
        "stages": pipe.rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("make", "draw"))
    parser.add_argument("path", help="of the stack")
    parser.add_argument("--out", type=Path, help="a JSON file for the numbers")
    for name in ("prior-steps", "steps", "upsample-steps"):
        parser.add_argument(f"--{name}", type=int)
    args = parser.parse_args()
    if args.what == "make":
        make(args.path)
        return
    report = draw(args.path, prior_steps=args.prior_steps, steps=args.steps, upsample_steps=args.upsample_steps)
    print(json.dumps(report))
    if args.out:
        args.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
