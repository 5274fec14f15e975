"""Which share of a GPU's peak the train step of each stage reaches, at a size that fills the one card at hand.

    python -m benchmarks.mfu --json out/mfu.json                          # all stages, in the order of STAGES
    python -m benchmarks.mfu --only clip decoder --steps 20 --seconds 15
    python -m benchmarks.mfu --only clip --batch 96 --remat none          # another size than the table's
    JAX_COMPILATION_CACHE_DIR=/tmp/jax python -m benchmarks.mfu --warm    # compiles only, beside another job

The step is the training loop's own: the frozen CLIP in it, AdamW, averaged weights, f32 parameters, bf16 computation,
its state given up. What differs: weights and the one batch are random and on the device; nothing is loaded or saved.

    ms a step      of `--steps` steps asked for one after another and waited for once; the median of such groups
    TFLOP a step   of matrix products and convolutions, the frozen CLIP's too, without recomputation, as `meter` counts
    MFU            TFLOP/s / the card's dense bf16 peak (`meter.FLOPS`)
    peak GiB       most bytes in use at once, as the device's allocator counts; the compiler's count where only compiled

Each try is a process of its own, for a process gives no memory back; what fails is one line of the table.
"""

import argparse
import importlib.metadata
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from benchmarks.mfu_sizes import STAGES, Size
from unclip_jax import config as configs
from unclip_jax.meter import GIB

ROOT = Path(__file__).resolve().parent.parent
TRIES = 2  # sizes of a stage, each of which is compiled
# Of the card's memory; jax's own default, three quarters, leaves one idle. jax refuses the old name beside the new one.
FRACTION, OLD_FRACTION = "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"


def measure(sizes: tuple[Size, ...], nth: int, steps: int, seconds: float, warm: bool) -> dict:
    """The `nth` of the sizes that suit the device: compiled, and unless `warm` run for about `seconds`.

    Args:
      steps: of a group.

    Returns:
      What became of it, for JSON; "error" in one line where something failed; {} where no such size is left.
    """
    import jax

    device, row = jax.devices()[0], {}
    limit = (device.memory_stats() or {}).get("bytes_limit", 0)
    suited = [size for size in sizes if size.memory * GIB <= limit][:TRIES]
    if nth >= len(suited):
        return {}
    try:
        for told in _measured(suited[nth], device, limit, steps, seconds, warm):
            row |= told
    except Exception as error:  # the table goes on with what is known
        row["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return row


def configured(size: Size):
    """(its config on one device, that of its CLIP or None)."""
    from unclip_jax import tasks

    changes = ("mesh.fsdp=1", f"batch_size={size.batch}", *size.changes)
    config = configs.load_config(str(ROOT / "configs" / size.config), changes)
    clip = configs.load_config(str(ROOT / "configs" / size.clip)) if size.clip else None
    return tasks.with_policy(config, size.remat), clip


def _measured(size: Size, device, limit: float, steps: int, seconds: float, warm: bool):
    """What `measure` tells, as it becomes known."""
    import jax

    from unclip_jax.meter import peak_flops
    from unclip_jax.plan.abstract import abstract
    from unclip_jax.train_step import compile_step

    yield {**size._asdict(), "device": device.device_kind}
    config, clip = configured(size)
    run = abstract(config, [device], clip)
    shardings = jax.tree.map(lambda a: a.sharding, run.state)
    yield {"parameters": sum(a.size for a in jax.tree.leaves(run.state.params))}
    args = (run.state, run.frozen, run.batch, jax.ShapeDtypeStruct((), np.int32))
    started = time.perf_counter()
    traced = compile_step(run.step, run.mesh, shardings).trace(*args)
    yield {"trace_seconds": time.perf_counter() - started}
    started = time.perf_counter()
    with ThreadPoolExecutor(1) as beside:  # the compiler leaves Python free
        counted = None if warm else beside.submit(_flops, run, traced, args)
        step = traced.lower().compile()
    needed = _needed(step)
    yield {"compile_seconds": time.perf_counter() - started, "needed_gib": needed / GIB}
    if limit and needed > limit:
        raise MemoryError(f"needs {needed / GIB:.1f} GiB of {limit / GIB:.1f}")
    if warm:
        return

    vocabulary = ((clip or config).tokenizer or {}).get("vocab_size", 0)
    made = _random_state(run.state), _random_params(run.frozen), _random_batch(run.batch, vocabulary)
    groups, loss = _timed(step, *_put(made, args[:3]), steps, seconds)
    del made
    spent, memory = statistics.median(groups), device.memory_stats() or {}
    yield {"ms": 1e3 * spent, "groups_ms": [1e3 * group for group in groups], "steps": steps, "loss": loss}
    yield {"images_per_second": size.batch / spent}
    yield {"peak_gib": memory["peak_bytes_in_use"] / GIB if "peak_bytes_in_use" in memory else None}
    flops, peak = counted.result(), peak_flops(device.device_kind)
    yield {"tflop": flops / 1e12, "tflop_per_second": flops / 1e12 / spent}
    yield {"mfu": flops / spent / peak if peak else None}


def _put(made, shapes):
    """Arrays of the host's, where their shapes' shardings say."""
    import jax

    return jax.device_put(made, jax.tree.map(lambda a: a.sharding, shapes))


def _flops(run, traced, args) -> float:
    """Of a step, without recomputation."""
    from unclip_jax import optim, sharding, tasks
    from unclip_jax.cost import count_flops, jaxpr_flops
    from unclip_jax.train_step import step_of

    config, plain = run.config, tasks.without_remat(run.task, run.config)
    if plain is run.task:
        return jaxpr_flops(traced.jaxpr)
    step = step_of(config, plain, optim.make(config.num_steps, **config.optim))
    return count_flops(sharding.split_rows(step, run.mesh), *args)


def _needed(compiled) -> float:
    """Bytes on the device while a program runs, its arguments included; 0 where the compiler does not tell."""
    try:
        memory = compiled.memory_analysis()
        kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        return kept + memory.temp_size_in_bytes
    except Exception:  # a program from the cache may not know
        return 0.0


def _timed(step: Callable, state, frozen, batch, steps: int, seconds: float) -> tuple[list[float], float]:
    """Seconds a step in each group, and the last loss; two steps before them do not count."""
    import jax

    indices, groups, begun = itertools.count(), [], 0.0
    while not groups or time.perf_counter() - begun + steps * groups[-1] < seconds:
        started = time.perf_counter()
        for index in itertools.islice(indices, steps if begun else 2):
            state, metrics = step(state, frozen, batch, np.int32(index))
        jax.block_until_ready((state, metrics))
        if begun:
            groups.append((time.perf_counter() - started) / steps)
        begun = begun or time.perf_counter()
    return groups, float(metrics["loss"])


def _random_state(shapes):
    """A TrainState in the host's memory, as after a while: no weights are zero."""
    import jax

    params = _random_params(shapes.params)
    zeros = lambda tree: jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), tree)  # noqa: E731
    return type(shapes)(zeros(shapes.step), params, None if shapes.ema is None else params, zeros(shapes.opt))


def _random_params(shapes):
    """Arrays that keep the size of signals, from few random numbers: billions would take minutes."""
    import jax

    some = np.random.default_rng(0).standard_normal(1_000_003, np.float32)

    def fill(path, a):
        name = jax.tree_util.keystr(path[-1:], simple=True)
        if a.ndim < 2 or name in ("bias", "scale"):
            return np.full(a.shape, name in ("scale", "std"), a.dtype)
        return (np.resize(some, a.shape) * np.float32((a.shape[-1] / a.size) ** 0.5)).astype(a.dtype)

    return jax.tree_util.tree_map_with_path(fill, shapes)


def _random_batch(shapes, vocabulary: int) -> dict:
    """Noise and captions of random tokens that fill their places."""
    rng = np.random.default_rng(0)
    make = {
        "image": lambda shape: rng.uniform(-1, 1, shape).astype(np.float32),
        "tokens": lambda shape: rng.integers(1, vocabulary, shape, np.int32),
        "mask": lambda shape: np.ones(shape, bool),
    }
    return {name: make[name](a.shape) for name, a in shapes.items()}


def alone(stage: str, nth: int, args) -> dict:
    """`measure` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.mfu", "--alone", stage, str(nth)]
    command += ["--steps", str(args.steps), "--seconds", str(args.seconds), *["--warm"] * args.warm]
    command += [f"--batch={args.batch}", f"--remat={args.remat}"]
    env = {**os.environ, **({"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} if args.warm else {})}
    env.setdefault(FRACTION, env.pop(OLD_FRACTION, "0.95"))
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=args.limit)
    except subprocess.TimeoutExpired:
        return {"error": f"took more than {args.limit:.0f} s"}
    lines = done.stdout.splitlines()
    if done.returncode == 0 and lines and lines[-1].startswith("{"):
        return json.loads(lines[-1])
    print(done.stderr[-3000:], file=sys.stderr, flush=True)
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return {"error": f"exit code {done.returncode}: {lines[-1][:300] if lines else 'nothing was said'}"}


def too_large(row: dict) -> bool:
    """Whether memory was what failed."""
    return any(word in row.get("error", "") for word in ("MemoryError", "RESOURCE_EXHAUSTED", "ut of memory"))


def tries(stage: str, args) -> list[dict]:
    """Sizes of a stage, until one is not too large."""
    rows: list[dict] = []
    while not rows or too_large(rows[-1]):
        started = time.perf_counter()
        row = alone(stage, len(rows), args)
        if not row and rows:
            break
        row = row or {"error": "no size of this stage suits the device"}
        rows.append({"stage": stage, **row, "wall_seconds": time.perf_counter() - started})
    return rows


COLUMNS = {
    "Stage": lambda r: r["stage"],
    "Config": lambda r: r["config"],
    "Remat": lambda r: r["remat"],
    "Parameters": lambda r: f"{r['parameters'] / 1e9:.3f}B",
    "Batch": lambda r: f"{r['batch']}",
    "ms a step": lambda r: f"{r['ms']:.1f}",
    "Images/s": lambda r: f"{r['images_per_second']:.1f}",
    "TFLOP a step": lambda r: f"{r['tflop']:.4g}",
    "TFLOP/s": lambda r: f"{r['tflop_per_second']:.4g}",
    "MFU": lambda r: f"**{100 * r['mfu']:.1f} %**",
    "Peak GiB": lambda r: f"{r['peak_gib']:.1f}" if r.get("peak_gib") else f"{r['needed_gib']:.1f} (compiler)",
    "Compile s": lambda r: f"{r['compile_seconds']:.0f}",
    "": lambda r: r.get("error") or ("fits" if math.isfinite(r.get("loss", 0)) else "its loss is not finite"),
}
HEAD = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"


def line(row: dict) -> str:
    """A row of the table; – for what is not known."""

    def cell(show):
        try:
            return show(row)
        except (KeyError, TypeError):
            return "–"

    return f"| {' | '.join(cell(show) for show in COLUMNS.values())} |"


def main(argv=None) -> None:
    """Prints the table row by row; the JSON is written after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="STAGE", choices=tuple(STAGES), help="in this order")
    parser.add_argument("--warm", action="store_true", help="compile only, into JAX_COMPILATION_CACHE_DIR")
    parser.add_argument("--steps", type=int, default=10, help="of a group")
    parser.add_argument("--seconds", type=float, default=10, help="for all groups of a stage; there is at least one")
    parser.add_argument("--limit", type=float, default=300, metavar="SECONDS", help="for one try of a stage")
    parser.add_argument("--batch", type=int, default=0, help="in place of the table's")
    parser.add_argument("--remat", default="", help="likewise: none, dots or full")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--alone", nargs=2, metavar=("STAGE", "NTH"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.alone:
        stage, nth = args.alone
        other = {name: getattr(args, name) for name in ("batch", "remat") if getattr(args, name)}
        sizes = tuple(size._replace(**other) for size in STAGES[stage])
        row = measure(sizes, int(nth), args.steps, args.seconds, args.warm)
        return print(json.dumps(row), flush=True)
    report = {"jax": importlib.metadata.version("jax"), "warm": args.warm, "rows": []}
    print(f"jax {report['jax']}", HEAD, sep="\n\n", flush=True)
    for stage in args.only or STAGES:
        for row in tries(stage, args):
            report["rows"].append(row)
            print(line(row), flush=True)
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
