"""Our speed and memory beside the peers', same weights and shapes, in one table.

    python -m benchmarks.run [--only NAME …] [--size small|karlo] [--repeats 5] [--json FILE]
    python -m benchmarks.run --device gpu --size karlo [--warm] [--seconds N]

Peers come by `pip install "unclip_jax[bench]"`; rows whose peer is missing say so. For each row both sides are made in
one process and timed in turns, ours, theirs, ours, …, after a run that does not count; the table has medians; ratios
above 1 where we are faster. `--clock cpu` takes processor seconds instead of wall-clock, for a machine that others use.
Peak memory is that of a process of its own for each side, which makes its networks and does the work once; its
wall-clock, from the start of Python on, is the time to the first result ("cold"). `--list` names the rows.

On a GPU both sides compute in bfloat16, and the peer takes its turns twice, as it is and by torch.compile. Memory is
the card's: ours that of the compiled programs with their arguments and results, the peer's what torch has allocated at
most in a run. The last column is the part of the card's dense bf16 FLOP/s that our products and convolutions reach.
`--warm` does each row once without measuring, so that a later run finds the compiled programs in
$JAX_COMPILATION_CACHE_DIR and $TORCHINDUCTOR_CACHE_DIR. A row or a side that fails says so, and the next one is tried.
"""

import argparse
import importlib.metadata
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks import device as devices
from benchmarks.device import Device

SIDES = ("ours", "peer")
COMPILED = "compiled"  # a third side: the peer by torch.compile
PACKAGES = {
    "jax": "jax", "flax": "flax", "torch": "torch", "diffusers": "diffusers", "open_clip": "open_clip_torch",
    "DALLE2-pytorch": "dalle2-pytorch",
}  # fmt: skip
LONG = 20  # seconds; the peer's first run counts if it takes longer, as nothing is compiled in it


def sides_of(device: Device) -> tuple[str, ...]:
    """Who takes turns."""
    return SIDES + (COMPILED,) * device.compiled


def turns(sides: Mapping[str, Callable], repeats: int, clock=time.perf_counter, device: Device = devices.CPU) -> dict:
    """Times of all in turns: {"first": {side: seconds}, side: […], "peak_gb": {side: …}, "failed": {side: why}}.

    A side that fails at its first run takes no turns.
    """
    found = {"first": {}, "failed": {}, "peak_gb": {}}

    def timed(side):
        device.forget_peak()
        start = clock()
        sides[side]()
        seconds = clock() - start
        found["peak_gb"][side] = device.peak_gb()
        return seconds

    for side in sides:
        try:
            found["first"][side] = timed(side)
        except Exception as error:  # whatever a compiler or a full card raises
            found["failed"][side] = in_a_line(error)
    runs = {side: [] for side in found["first"]}
    if found["first"].get("peer", 0) > LONG and device is devices.CPU:
        runs["peer"].append(found["first"]["peer"])
    for _ in range(repeats):
        for side in runs:
            if len(runs[side]) < repeats:
                runs[side].append(timed(side))
    return {**found, **runs}


def in_a_line(error: Exception) -> str:
    """In one short line of the table."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:200].replace("|", "/")


def made(row, device: Device) -> dict[str, Callable]:
    """What takes turns, by side. ImportError where the peer cannot be had."""
    models = row.peer()
    theirs, ours = row.theirs(models), row.ours(None if device.half else models)
    if not device.compiled:
        return {"ours": ours, "peer": theirs}
    for net in devices.networks(models):
        net.compile()
    return {"ours": ours, "peer": devices.eager(theirs), COMPILED: theirs}


def measure(row, repeats: int, clock=time.perf_counter, device: Device = devices.CPU) -> dict:
    """One row's times, and on a GPU its memory; what is missing for it where the peer cannot be had."""
    try:
        sides = made(row, device)
    except ImportError as error:
        return {"missing": str(error)}
    ours, times = sides["ours"], turns(sides, repeats, clock, device)
    medians = {side: statistics.median(times[side]) for side in sides if side in times}
    found = {"seconds": medians, "failed": times["failed"], "all": times, "compile": {}, "ratio": {}}
    if "ours" in medians:
        found |= {"flops": ours.flops, "ratio": {s: medians[s] / medians["ours"] for s in medians if s != "ours"}}
        found["compile"]["ours"] = ours.compile_seconds
    if COMPILED in medians:
        found["compile"][COMPILED] = times["first"][COMPILED] - medians[COMPILED]
    if device is not devices.CPU:
        found["peak_gb"] = {s: ours.peak_gb() if s == "ours" else times["peak_gb"][s] for s in medians}
        found["process_peak_gb"] = devices.process_peak_gb()
    return found


def warm(row, device: Device) -> str:
    """Does what is compiled in a row once, so that caches have it; seconds of each side, or what failed."""
    sides = made(row, device)
    times = turns({side: sides[side] for side in ("ours", COMPILED) if side in sides}, 0, device=device)
    return ", ".join([f"{side} {seconds:.1f} s" for side, seconds in times["first"].items()] + why(times["failed"]))


def alone(name: str, side: str, size: str, threads: int) -> dict:
    """{"peak_gb", "cold"} of one side in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.run", "--size", size, "--threads", str(threads), "--alone", name, side]
    start = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return {**json.loads(done.stdout.splitlines()[-1]), "cold": time.perf_counter() - start}


def run_alone(row, side: str) -> None:
    """What `alone` starts."""
    (row.ours(None) if side == "ours" else row.theirs(row.peer()))()
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss begins with that of the process that started this one
        peak = next(int(text.split()[1]) for text in status.read_text().splitlines() if text.startswith("VmHWM"))
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"peak_gb": peak * 1024 / 1e9}))


def versions() -> dict[str, str]:
    """Of Python and of all that takes part and is here."""
    found = {"python": platform.python_version()}
    for name, package in PACKAGES.items():
        try:
            found[name] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


NAMES = {"ours": "Ours", "peer": "Peer", COMPILED: "torch.compile"}


def head(device: Device) -> str:
    """The table's first two lines."""
    sides = sides_of(device)
    columns = ["Row", "Of", "Peer", *(f"{NAMES[s]} s" for s in sides), *(f"{NAMES[s]} / ours" for s in sides[1:])]
    columns += [f"{NAMES[s]} GB" for s in sides]
    if device is devices.CPU:
        columns += ["Ours cold s", "Peer cold s", "Compile s"]
    else:
        columns += ["Ours compile s", "torch.compile compile s", "Of peak"]
    return f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}"


def line(row, found: dict, device: Device = devices.CPU, peak_flops: float | None = None) -> str:
    """A row of the table; what failed is told behind it."""
    cells, sides = [row.name, row.what, row.package], sides_of(device)
    if "missing" in found:
        return f"| {' | '.join(cells)} | not measured: {found['missing']} |"

    def number(x, form=lambda x: f"{x:.3g}" if x < 100 else f"{x:.0f}"):
        return "–" if x is None else form(x)

    cells += [number(found["seconds"].get(side)) for side in sides]
    cells += [number(found["ratio"].get(side), "**{:.2f}**".format) for side in sides[1:]]
    cells += [number(found.get("peak_gb", {}).get(side), "{:.2f}".format) for side in sides]
    if device is devices.CPU:
        cells += [number(found.get("cold", {}).get(side), "{:.2f}".format) for side in sides]
        cells += [number(found["compile"].get("ours"))]
    else:
        share = peak_flops and "ours" in found["seconds"] and found["flops"] / found["seconds"]["ours"] / peak_flops
        cells += [number(found["compile"].get(side)) for side in ("ours", COMPILED)]
        cells += [number(100 * share if share else None, "{:.0f} %".format)]
    return f"| {' | '.join(cells)} |{''.join(f' {text}' for text in why(found['failed']))}"


def why(failed: Mapping[str, str]) -> list[str]:
    """Of each side that failed."""
    return [f"{NAMES[side]} failed: {text}" for side, text in failed.items()]


def parse(argv) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="rows whose names are these or begin so")
    parser.add_argument("--size", choices=("tiny", "small", "karlo"), default="small")
    parser.add_argument("--device", choices=devices.DEVICES, default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--no-memory", action="store_true", help="no processes of their own: no memory, no cold times")
    parser.add_argument("--warm", action="store_true", help="compile alone, for the caches of a later run")
    parser.add_argument("--seconds", type=float, help="start no row later than this")
    parser.add_argument("--alone", nargs=2, metavar=("NAME", "SIDE"), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv=None) -> None:
    """Prints the table row by row; the JSON is written after each."""
    args = parse(argv)
    device = devices.DEVICES[args.device]
    devices.prepare(device, args.threads)
    from benchmarks.rows import choose, rows

    chosen = choose(rows(args.size, device), args.only)
    if args.list:
        return print("\n".join(row.name for row in chosen))
    if args.alone is None or args.alone[1] == "peer":
        devices.set_up_torch(device, args.threads)
    if args.alone:
        return run_alone(next(row for row in chosen if row.name == args.alone[0]), args.alone[1])
    table(args, chosen, device)


def table(args: argparse.Namespace, chosen: list, device: Device) -> None:
    """Measures the rows, or warms them."""
    from unclip_jax.meter import peak_flops

    began, card = time.monotonic(), devices.name_of(device)
    flags = {name: getattr(args, name) for name in ("device", "size", "threads", "repeats", "clock")}
    report = {**flags, "card": card, "versions": versions(), "rows": {}, "skipped": []}
    print(", ".join(f"{name} {version}" for name, version in report["versions"].items()), card or "", flush=True)
    print("" if args.warm else f"\n{head(device)}", flush=True)
    for row in chosen:
        if args.seconds is not None and time.monotonic() - began > args.seconds:
            report["skipped"].append(row.name)
            continue
        try:
            if args.warm:
                print(f"{row.name}: {warm(row, device)}", flush=True)
            else:
                found = _measured(row, args, device)
                report["rows"][row.name] = {"peer": row.package, "of": row.what, **found}
                print(line(row, found, device, card and peak_flops(card)), flush=True)
        except Exception as error:  # the next row may do
            report["rows"][row.name] = {"peer": row.package, "of": row.what, "failed": in_a_line(error)}
            print(f"| {row.name} | {row.what} | {row.package} | failed: {in_a_line(error)} |", flush=True)
        device.free()
        if args.json and not args.warm:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    skipped = f"; skipped: {', '.join(report['skipped'])}" if report["skipped"] else ""
    print(f"{time.monotonic() - began:.0f} s{skipped}", flush=True)


def _measured(row, args: argparse.Namespace, device: Device) -> dict:
    """`measure`, and on a CPU the processes of their own."""
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    found = measure(row, args.repeats, clock, device)
    if "missing" not in found and device is devices.CPU and not args.no_memory:
        each = {side: alone(row.name, side, args.size, args.threads) for side in SIDES}
        found |= {what: {side: each[side][what] for side in SIDES} for what in ("peak_gb", "cold")}
    return found


if __name__ == "__main__":
    main()
