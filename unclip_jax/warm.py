"""A stack's programs compiled before they are needed, ahead of time, into JAX's persistent cache if there is one.

`UnCLIP.generate` is gone through with every stage compiled instead of run, so that what is compiled is what will be
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

    made: dict = dataclasses.field(default_factory=dict)

    def _call(self, stage, program, params, given):
        shapes = jax.tree.map(lambda a: (a.shape, a.dtype), given)
        key = (stage, str(shapes))
        if key not in self.made:
            start, rows = time.perf_counter(), len(jax.tree.leaves(given)[0])
            program.lower(params, *given).compile()
            self.made[key] = Program(stage, rows, time.perf_counter() - start)
        return jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), jax.eval_shape(program, params, *given))


def warm_up(stack: UnCLIP, prompts: Sequence[str], **settings) -> list[Program]:
    """Compiles what `stack.generate(prompts, **settings)` will run, in its order; nothing is drawn.

    Only the number of prompts counts, not what they say. JAX keeps the programs in `jax_compilation_cache_dir`.
    """
    fields = {field.name: getattr(stack, field.name) for field in dataclasses.fields(stack)}
    rehearsal = _Rehearsal(**fields)
    rehearsal.generate(prompts, **settings)
    return list(rehearsal.made.values())
