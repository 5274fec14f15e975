"""Our speed and memory beside the peers', same weights and shapes, in one table.

    python -m benchmarks.run [--only NAME …] [--size small|karlo] [--repeats 5] [--json FILE]

Peers come by `pip install "unclip_jax[bench]"`; rows whose peer is missing say so. For each row both sides are made in
one process and timed in turns, ours, theirs, ours, …, after a run that does not count; the table has medians; ratios
above 1 where we are faster. `--clock cpu` takes processor seconds instead of wall-clock, for a machine that others use.
Peak memory is that of a process of its own for each side, which makes its networks and does the work once; its
wall-clock, from the start of Python on, is the time to the first result ("cold"). `--list` names the rows.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

SIDES = ("ours", "peer")
PACKAGES = {
    "jax": "jax", "flax": "flax", "torch": "torch", "diffusers": "diffusers", "open_clip": "open_clip_torch",
    "DALLE2-pytorch": "dalle2-pytorch",
}  # fmt: skip
LONG = 20  # seconds; the peer's first run counts if it takes longer, as nothing is compiled in it


def use_threads(threads: int) -> None:
    """Has both frameworks compute with so many threads; before either is imported."""
    flags = os.environ.get("XLA_FLAGS", "")
    if threads == 1:
        flags += " --xla_cpu_multi_thread_eigen=false"
    os.environ |= {"XLA_FLAGS": flags.strip(), "OMP_NUM_THREADS": str(threads), "JAX_PLATFORMS": "cpu"}


def turns(ours, theirs, repeats: int, clock=time.perf_counter) -> dict:
    """Times of both in turns: {"first": {ours: seconds}, "ours": […], "peer": […]}."""

    def timed(run):
        start = clock()
        run()
        return clock() - start

    first, times = timed(ours), {"ours": [], "peer": []}
    warm = timed(theirs)
    if warm > LONG:
        times["peer"].append(warm)
    for _ in range(repeats):
        times["ours"].append(timed(ours))
        if len(times["peer"]) < repeats:
            times["peer"].append(timed(theirs))
    return {"first": first, **times}


def measure(row, repeats: int, clock=time.perf_counter) -> dict:
    """One row's times; what is missing for it where the peer cannot be had."""
    try:
        models = row.peer()
    except ImportError as error:
        return {"missing": str(error)}
    theirs, ours = row.theirs(models), row.ours(models)
    found = turns(ours, theirs, repeats, clock)
    medians = {side: statistics.median(found[side]) for side in SIDES}
    ratio = medians["peer"] / medians["ours"]
    return {"seconds": medians, "ratio": ratio, "compile": found["first"] - medians["ours"], "all": found}


def alone(name: str, side: str, size: str, threads: int) -> dict:
    """{"peak_gb", "cold"} of one side in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.run", "--size", size, "--threads", str(threads), "--alone", name, side]
    start = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return {**json.loads(done.stdout.splitlines()[-1]), "cold": time.perf_counter() - start}


def run_alone(row, side: str) -> None:
    """What `alone` starts."""
    (row.ours(None) if side == "ours" else row.theirs(row.peer()))()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(json.dumps({"peak_gb": peak}))


def versions() -> dict[str, str]:
    """Of Python and of all that takes part and is here."""
    found = {"python": platform.python_version()}
    for name, package in PACKAGES.items():
        try:
            found[name] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


HEAD = (
    "| Row | Of | Peer | Ours s | Peer s | Peer / ours | Ours GB | Peer GB | Ours cold s | Peer cold s | Compile s |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|"
)


def line(row, found: dict) -> str:
    """A row of the table."""
    cells = [row.name, row.what, row.package]
    if "missing" in found:
        return f"| {' | '.join(cells)} | not measured: {found['missing']} |"
    number = lambda x: f"{x:.3g}" if x < 100 else f"{x:.0f}"  # noqa: E731
    cells += [number(found["seconds"][side]) for side in SIDES] + [f"**{found['ratio']:.2f}**"]
    for what in ("peak_gb", "cold"):
        cells += [f"{found[side][what]:.2f}" if side in found else "–" for side in SIDES]
    return f"| {' | '.join(cells)} | {number(found['compile'])} |"


def main(argv=None) -> None:
    """Prints the table row by row; the JSON is written after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="rows whose names begin so")
    parser.add_argument("--size", choices=("tiny", "small", "karlo"), default="small")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--no-memory", action="store_true", help="no processes of their own: no memory, no cold times")
    parser.add_argument("--alone", nargs=2, metavar=("NAME", "SIDE"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    use_threads(args.threads)
    from benchmarks.rows import rows

    chosen = [row for row in rows(args.size) if not args.only or row.name.startswith(tuple(args.only))]
    if args.list:
        return print("\n".join(row.name for row in chosen))
    if args.alone is None or args.alone[1] == "peer":
        import torch

        torch.set_num_threads(args.threads)
    if args.alone:
        return run_alone(next(row for row in chosen if row.name == args.alone[0]), args.alone[1])
    told = {name: getattr(args, name) for name in ("size", "threads", "repeats", "clock")}
    report = {**told, "versions": versions(), "rows": {}}
    print(", ".join(f"{name} {version}" for name, version in report["versions"].items()), HEAD, sep="\n\n", flush=True)
    for row in chosen:
        found = measure(row, args.repeats, time.process_time if args.clock == "cpu" else time.perf_counter)
        if "missing" not in found and not args.no_memory:
            found |= {side: alone(row.name, side, args.size, args.threads) for side in SIDES}
        report["rows"][row.name] = {"peer": row.package, "of": row.what, **found}
        print(line(row, found), flush=True)
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
