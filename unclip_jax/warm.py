"""A stack's programs compiled before they are needed, ahead of time, into JAX's persistent cache if there is one.

`UnCLIP.stream` is gone through with every stage compiled instead of run, so that what is compiled is what will be
asked for: the same code decides on shapes, settings and batches.
"""

import dataclasses
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from unclip_jax.pipeline import UnCLIP


class Program(NamedTuple):
    """One that was compiled, or read from the cache."""

    stage: str
    rows: int  # in its batch
    seconds: float  # of tracing and compiling


@dataclasses.dataclass(frozen=True)
class _Rehearsal(UnCLIP):
    """A stack whose stages are compiled and give zeros."""

    made: list = dataclasses.field(default_factory=list)

    def _program(self, stage, options, method, given, scales):
        start, known = time.perf_counter(), len(self._programs)
        program = super()._program(stage, options, method, given, scales)
        if len(self._programs) > known:
            self.made.append(Program(stage, len(jax.tree.leaves(given)[0]), time.perf_counter() - start))
        return lambda params, given, scales: jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), program.out_info)

    def _params(self, stage):
        return None  # no weights are read


def warm_up(stack: UnCLIP, prompts: Sequence[str], **settings) -> list[Program]:
    """Compiles what `stack.stream(prompts, **settings)`, or `generate`, will run, in its order; nothing is drawn.

    One set of programs draws all blocks of a stream, so the first alone is gone through. Only the number of prompts
    counts, not what they say. JAX keeps the programs in `jax_compilation_cache_dir`, and `stack` has them. A stack
    loaded with `low_memory` reads no weights for it.
    """
    fields = {field.name: getattr(stack, field.name) for field in dataclasses.fields(stack)}
    rehearsal = _Rehearsal(**fields)
    next(rehearsal.stream(prompts, **settings))
    return rehearsal.made
