"""How often a hole is filled as asked: one of two objects of the shapes world is cut out, and the prompt tells of both.

    python -m benchmarks.inpaint --model shapes --num 100 [--out FILE.json]

The oracle (`metrics.shapes_oracle`) reads the result. Shares of the pictures in which

    object     exactly one object lies in the hole, of the shape and colour asked for
    colour     … of the colour asked for, whatever its shape; and shape alike
    caption    all that the prompt says of both holds: count, shapes, colours, and sizes, places, relation where said
    untouched  every pixel outside the hole is that of the given picture
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np

from unclip_jax import gallery
from unclip_jax.data.shapes import Shapes, describe, render
from unclip_jax.metrics.intervals import wilson
from unclip_jax.metrics.shapes_oracle import read, score

KEYS = ("object", "colour", "shape", "caption", "untouched")
MARGIN = 1.5 / 64  # of the box around the object's reach; the gap to the other object is at least 4.8 / 64


def cases(num: int, size: int, seed: int = 0) -> list[dict]:
    """Scenes of two objects of the split `test`: image u8[S, S, 3], hole bool[S, S], prompt, and the object cut out."""
    source, made, record = Shapes("test", size, seed), [], 0
    while len(made) < num:
        rng, scene = source._rng(record), source.scene(record)
        record += 1
        if len(scene.objects) != 2:
            continue
        gone = scene.objects[record % 2]
        low_x, low_y = (max(0, math.floor((c - gone.r - MARGIN) * size)) for c in (gone.x, gone.y))
        high_x, high_y = (min(size, math.ceil((c + gone.r + MARGIN) * size)) for c in (gone.x, gone.y))
        hole = np.zeros((size, size), bool)
        hole[low_y:high_y, low_x:high_x] = True
        prompt = describe(scene, rng, full=True)[0]
        made.append({"image": render(scene, size), "hole": hole, "prompt": prompt, "gone": gone})
    return made


def judge(case: dict, result: np.ndarray) -> dict[str, bool]:
    """The verdicts of KEYS on one result u8[S, S, 3]."""
    size, reading, hole = len(result), read(result), case["hole"]
    inside = [o for o in reading.objects if hole[min(size - 1, int(o.y * size)), min(size - 1, int(o.x * size))]]
    one = inside[0] if len(inside) == 1 else None
    shape, colour = (one is not None and getattr(one, key) == getattr(case["gone"], key) for key in ("shape", "colour"))
    return {
        "object": shape and colour,
        "colour": colour,
        "shape": shape,
        "caption": score(reading, case["prompt"])["right"],
        "untouched": bool((result == case["image"])[~hole].all()),
    }


def contact_sheet(made: list[dict], images: np.ndarray) -> np.ndarray:
    """Each case's picture beside its result u8[N, S, S, 3], under which the prompt stands."""
    sheet = []
    for case, image in zip(made, images, strict=True):
        sheet += [gallery.Picture(case["image"], "given"), gallery.Picture(image, case["prompt"])]
    return gallery.labelled_grid(sheet, columns=2)


def main(argv=None) -> None:
    """Draws, judges, prints one row, and writes it with a contact sheet beside it if told."""
    from unclip_jax.pipeline import UnCLIP
    from unclip_jax.storage import write_text

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="shapes")
    parser.add_argument("--num", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=25)
    parser.add_argument("--out", help="FILE.json")
    kinds = {"jump": int, "resample": int, "steps": int, "guidance": float, "prior-guidance": float}
    for name, kind in kinds.items():
        parser.add_argument(f"--{name}", type=kind)
    args = parser.parse_args(argv)
    pipe = UnCLIP.load(args.model)
    given = {key: getattr(args, key) for key in ("jump", "resample", "steps", "guidance", "prior_guidance")}
    given = {key: value for key, value in given.items() if value is not None}
    made = cases(args.num, pipe.size, args.seed)
    start = time.monotonic()
    images = pipe.inpaint(
        *([case[key] for case in made] for key in ("image", "hole", "prompt")),
        args.seed, batch_size=args.batch_size, **given,
    )  # fmt: skip
    seconds = time.monotonic() - start
    verdicts = [judge(case, image) for case, image in zip(made, images, strict=True)]
    shares = {key: sum(v[key] for v in verdicts) / len(verdicts) for key in KEYS}
    low, high = wilson(round(shares["object"] * args.num), args.num)
    print("n  " + "  ".join(f"{key} %" for key in KEYS) + "  95% of object  s a picture  settings")
    print(f"{args.num}  " + "  ".join(f"{100 * shares[key]:.1f}" for key in KEYS)
          + f"  {100 * low:.1f} - {100 * high:.1f}  {seconds / args.num:.2f}  {given}")  # fmt: skip
    if args.out:
        report = {"model": args.model, "num": args.num, "seed": args.seed, "settings": given, **shares}
        write_text(Path(args.out), json.dumps(report, indent=2) + "\n")
        gallery.write_image(Path(args.out).with_suffix(".png"), contact_sheet(made[:32], images[:32]), report)


if __name__ == "__main__":
    main()
