"""What edits of pictures are worth, measured on the shapes world with a trained stack, at the decoder's size.

    python -m benchmarks.edits --model shapes --num 100 --out edits.json --sheets docs/images

Inversion: mean absolute difference, in [-1, 1], of test pictures and what DDIM draws from their latents (z_i, x_T).
Text diff "red" to "green": pictures of one red object; in how many the oracle then sees one green object, of the same
shape, within 0.1 of the side of its place. Of the thetas, the caller sees all; the best one is not chosen for each
picture.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path
from random import Random

import numpy as np

from unclip_jax import gallery
from unclip_jax.data import shapes
from unclip_jax.data.images import grid, to_float
from unclip_jax.metrics import shapes_oracle
from unclip_jax.pipeline import UnCLIP
from unclip_jax.storage import write_text

NEAR = 0.1  # of the side
THETAS = (0.0, 0.25, 0.35, 0.5)


def red_scenes(num: int, seed: int = 0) -> list[shapes.Scene]:
    """Scenes of one red object, of any shape that training shows in red."""
    rng, scenes = Random(seed), []
    while len(scenes) < num:
        scene = shapes.sample_scene(rng, count=1)
        if not shapes.is_held_out(scene.objects[0].shape, "red"):
            scenes.append(dataclasses.replace(scene, objects=(dataclasses.replace(scene.objects[0], colour="red"),)))
    return scenes


def verdict(image: np.ndarray, scene: shapes.Scene, colour: str) -> dict[str, bool]:
    """What the oracle says of an edited picture: colour changed, shape and place kept, one object, all of these."""
    seen, was = shapes_oracle.read(image).objects, scene.objects[0]
    if not seen:
        return dict.fromkeys(("colour", "shape", "place", "one", "all"), False)
    now = seen[0]
    right = {
        "colour": now.colour == colour,
        "shape": now.shape == was.shape,
        "place": float(np.hypot(now.x - was.x, now.y - was.y)) < NEAR,
        "one": len(seen) == 1,
    }
    return {**right, "all": all(right.values())}


def inversion(stack: UnCLIP, num: int, steps: int, batch_size: int) -> dict:
    """How near pictures come back from their latents, and how near x_T is to noise."""
    source = shapes.Shapes("test", size=stack.tasks["decoder"].image_size)
    images = [source[i]["image"] for i in range(num)]
    latents = stack.latents(images, steps=steps, batch_size=batch_size)
    back = stack.variations(images, eta=0.0, steps=steps, batch_size=batch_size)
    errors = np.abs(to_float(back) - to_float(np.stack(images))).mean((1, 2, 3))
    return {
        "steps": steps,
        "n": num,
        "mean error": float(errors.mean()),
        "worst error": float(errors.max()),
        "spread of x_T": float(latents.noise.std()),
    }


def text_diff(stack, num: int, source: str, target: str, batch_size: int, **settings) -> tuple[list, np.ndarray]:
    """Shares by theta, and the pictures u8[num, 1 + thetas, H, W, 3] with the originals first."""
    scenes = red_scenes(num)
    images = np.stack([shapes.render(scene, stack.tasks["decoder"].image_size) for scene in scenes])
    drawn = stack.text_diff(images, source, target, THETAS, batch_size=batch_size, **settings)
    drawn = drawn.reshape(num, len(THETAS), *images.shape[1:])
    rows = []
    for k, theta in enumerate(THETAS):
        verdicts = [verdict(image, scene, "green") for image, scene in zip(drawn[:, k], scenes, strict=True)]
        rows.append({"theta": theta, **{key: float(np.mean([v[key] for v in verdicts])) for key in verdicts[0]}})
    return rows, np.concatenate([images[:, None], drawn], 1)


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="shapes")
    parser.add_argument("--num", type=int, default=100, help="pictures (100)")
    parser.add_argument("--steps", type=int, default=100, help="of the inversion that is judged (100)")
    parser.add_argument("--edit-steps", type=int, default=50, help="of the text diffs (50)")
    parser.add_argument("--batch-size", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=2.0, help="of the text diffs, noise and pictures alike (2)")
    parser.add_argument("--words", nargs=2, default=["red", "green"], metavar=("FROM", "TO"))
    parser.add_argument("--only", choices=("inversion", "text_diff", "blend"))
    parser.add_argument("--sheets", metavar="DIR", help="write contact sheets there")
    parser.add_argument("--out", metavar="FILE.json")
    args = parser.parse_args()
    stack, began = UnCLIP.load(args.model).without_upsamplers(), time.time()
    report, sheets = {"model": Path(args.model).name, "words": args.words, "guidance": args.guidance}, {}
    if args.only in (None, "inversion"):
        report["inversion"] = inversion(stack, args.num, args.steps, args.batch_size)
        print(report["inversion"], flush=True)
    if args.only in (None, "text_diff"):
        settings = {"steps": args.edit_steps, "guidance": args.guidance}
        rows, pictures = text_diff(stack, args.num, *args.words, args.batch_size, **settings)
        report["text_diff"] = rows
        for row in rows:
            print("  ".join(f"{key} {value:.2f}" for key, value in row.items()), flush=True)
        labels = ["picture", *(f"theta {theta}" for theta in THETAS)] * 6
        sheets["edit"] = grid(pictures[:6].reshape(-1, *pictures.shape[2:]), pictures.shape[1], labels, scale=4)
    if args.only in (None, "blend"):
        frames = stack.interpolate(["a red circle", "a blue square"], frames=9, steps=args.edit_steps, batch_size=9)
        sheets["blend"] = grid(frames, 9, scale=3)
    for name, sheet in sheets.items():
        if args.sheets:
            gallery.write_image(Path(args.sheets) / f"{name}.png", sheet)
    if args.out:
        write_text(Path(args.out), json.dumps(report, indent=2) + "\n")
    print(f"{time.time() - began:.0f} s")


if __name__ == "__main__":
    main()
