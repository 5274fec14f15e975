"""How fast pictures come out of tar shards, beside the package webdataset; memory over epochs; opening an index.

    pip install "unclip_jax[bench]"
    python -m benchmarks.loader [--only speed|memory|index] [--out FILE.json]

Everything runs on one core (`--core`). Both read the same shards of 256-px JPEG pictures with captions, decode them
with Pillow and give batches f32[64, 256, 256, 3] in [-1, 1] with captions, by turns in one run, each several times; the
median counts. Images/s are per second of the process's CPU time, threads and kernel included, so that other programs
on the machine take nothing from either; those by the clock on the wall stand beside them. Ours shuffles all pictures
anew in each epoch, webdataset shards and then a buffer of 1,000.
"""

import argparse
import io
import json
import os
import statistics
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from unclip_jax.data import loader
from unclip_jax.data.images import to_float
from unclip_jax.data.webdataset import WebDataset

SIDE, BATCH = 256, 64


def picture(rng: np.random.Generator) -> bytes:
    """A JPEG of the size and weight of a photograph's: smooth shapes with a little grain."""
    coarse = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).resize((SIDE, SIDE), Image.BICUBIC)
    grain = rng.normal(0, 6, (SIDE, SIDE, 3))
    out = io.BytesIO()
    Image.fromarray(np.clip(np.asarray(coarse) + grain, 0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
    return out.getvalue()


def write_shard(path: Path, first: int, members: list[tuple[str, bytes]], count: int) -> None:
    """A tar of `count` records, each of these (suffix, bytes), numbered from `first`."""
    with tarfile.open(path, "w") as tar:
        for number in range(first, first + count):
            for suffix, data in members:
                info = tarfile.TarInfo(f"{number:09d}{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def make_shards(folder: Path, shards: int, count: int) -> Path:
    """`shards` tars of `count` pictures each, all different; those that are there are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    for n in range(shards):
        path = folder / f"{n:05d}.tar"
        if path.exists():
            continue
        rng = np.random.default_rng(n)
        with tarfile.open(path, "w") as tar:
            for k in range(count):
                for suffix, data in ((".jpg", picture(rng)), (".txt", f"picture {k} of shard {n}".encode())):
                    info = tarfile.TarInfo(f"{n * count + k:09d}{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return folder


def ours(folder: Path, batches: int, seed: int) -> int:
    """Reads `batches`; how many pictures that were."""
    source = WebDataset(str(folder), "all", SIDE, index=str(folder.with_name(f"{folder.name}-index")))
    stream = loader.batches(source, None, BATCH, seed=seed, num_threads=1, prefetch=1)
    count = sum(len(next(stream)["image"]) for _ in range(batches))
    stream.close()
    return count


def theirs(folder: Path, batches: int, seed: int) -> int:
    """The same, by webdataset."""
    import webdataset

    shards = sorted(map(str, folder.glob("*.tar")))
    made = webdataset.WebDataset(shards, shardshuffle=len(shards), seed=seed, empty_check=False).shuffle(1000)
    stream = iter(made.decode("rgb8").to_tuple("jpg", "txt").batched(BATCH, partial=False).repeat())
    return sum(len(to_float(np.asarray(next(stream)[0]))) for _ in range(batches))


def speed(folder: Path, batches: int, repeats: int) -> dict:
    """Images per second of CPU time and of the clock, by reader, one run after the other."""
    readers, rates = {"ours": ours, "webdataset": theirs}, {"ours": [], "webdataset": []}
    for reader in readers.values():
        reader(folder, 1, 0)  # imports, the index, the first touch of every file
    for turn in range(repeats):
        for name, reader in readers.items():
            cpu, wall = time.process_time(), time.perf_counter()
            count = reader(folder, batches, turn)
            rates[name].append((count / (time.process_time() - cpu), count / (time.perf_counter() - wall)))
    return {
        name: {"cpu": statistics.median(c for c, _ in all_), "wall": statistics.median(w for _, w in all_), "all": all_}
        for name, all_ in rates.items()
    }


def resident() -> float:
    """MiB of this process in memory."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def memory(folder: Path, epochs: int) -> list[float]:
    """MiB in memory after each epoch of one stream of ours."""
    source = WebDataset(str(folder), "all", SIDE, index=str(folder.with_name(f"{folder.name}-index")))
    stream = loader.batches(source, None, BATCH, num_threads=1, prefetch=1)
    held = []
    for _ in range(epochs):
        for _ in range(len(source) // BATCH):
            next(stream)
        held.append(resident())
    stream.close()
    return held


def index(folder: Path, records: int) -> dict:
    """Seconds to make the index of many small records, to open it again, and to look a thousand of them up."""
    shards, count = 100, records // 100
    folder.mkdir(parents=True, exist_ok=True)
    first = folder / "00000.tar"
    write_shard(first, 0, [(".jpg", b"picture"), (".txt", b"caption")], count)
    for n in range(1, shards):
        (folder / f"{n:05d}.tar").unlink(missing_ok=True)
        (folder / f"{n:05d}.tar").hardlink_to(first)
    seconds, kept = {}, tempfile.mkdtemp(dir=folder.parent)
    for what in ("make", "open"):
        begin = time.perf_counter(), time.process_time()
        source = WebDataset(str(folder), "all", SIDE, index=f"{kept}/index")
        seconds[what], seconds[f"{what}_cpu"] = time.perf_counter() - begin[0], time.process_time() - begin[1]
    begin = time.perf_counter()
    for i in np.random.default_rng(0).integers(len(source), size=1000).tolist():
        _ = source.index.train[i % len(source.index.train)].tolist()
    return {"records": len(source), **seconds, "thousand": time.perf_counter() - begin}


def main(argv=None) -> None:
    """Runs the parts asked for and prints tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=("speed", "memory", "index"))
    work = Path(tempfile.gettempdir()) / "unclip-loader"
    parser.add_argument("--work", type=Path, default=work, help="folder for the shards")
    parser.add_argument("--core", type=int, default=0)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--count", type=int, default=500, help="pictures in a shard")
    parser.add_argument("--batches", type=int, default=30, help="of 64, for each time measured")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--records", type=int, default=1_000_000, help="of the index")
    parser.add_argument("--out", type=Path, help="JSON of all numbers")
    args = parser.parse_args(argv)
    os.sched_setaffinity(0, {args.core})
    found = {}
    if args.only in (None, "speed", "memory"):
        folder = make_shards(args.work / f"{args.shards}x{args.count}", args.shards, args.count)
    if args.only in (None, "speed"):
        found["speed"] = speed(folder, args.batches, args.repeats)
        for name, rate in found["speed"].items():
            print(f"{name:12}{rate['cpu']:8.0f} images per second of CPU, {rate['wall']:6.0f} by the clock")
    if args.only in (None, "memory"):
        found["memory"] = memory(folder, args.epochs)
        print("MiB after each epoch: " + ", ".join(f"{held:.0f}" for held in found["memory"]))
    if args.only in (None, "index"):
        found["index"] = index(args.work / "index", args.records)
        print(", ".join(f"{name} {value:.4g}" for name, value in found["index"].items()))
    if args.out:
        args.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
