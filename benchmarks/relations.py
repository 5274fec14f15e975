"""Which stage of a stack on the shapes world knows "above" from "below", and "left of" from "right of".

    python -m benchmarks.relations --model shapes --num 200

Each prompt tells how two objects lie to each other; beside its true picture stands the mirrored one, which shows the
same objects the other way round. A row is the share of prompts for which a stage lies nearer to the true picture than
to the mirrored one; who knows nothing has half:

    CLIP       the prompt's z_txt to the z_img of both, by cosine
    prior      the drawn z_img to those of both (and the autoregressive one's)
    decoder    what it makes of noise in one look at a time near the last, from the prompt and one of these as z_img:
               none, the true picture's, the mirrored one's, the prior's
"""

import argparse
import dataclasses
from random import Random

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.data.images import to_float
from unclip_jax.data.shapes import describe, render, sample_scene
from unclip_jax.diffusion.sample import picture_keys
from unclip_jax.pipeline import UnCLIP
from unclip_jax.settings import PRIORS
from unclip_jax.tasks.embeddings import unit

BATCH = 100
TIME = 0.99  # of the schedule's last


def mirrored(scene):
    """(the scene turned over along its objects' offset, whether that is upside down)."""
    a, b = scene.objects
    upright = abs(a.y - b.y) > abs(a.x - b.x)
    turned = [dataclasses.replace(o, **({"y": 1 - o.y} if upright else {"x": 1 - o.x})) for o in scene.objects]
    return dataclasses.replace(scene, objects=tuple(turned)), upright


def cases(num: int, heldout: bool, size: int, seed: int = 11):
    """(prompts, true pictures f32[N, S, S, 3], mirrored ones, bool[N] whether they say above or below)."""
    rng, made = Random(2 * seed + heldout), []
    while len(made) < num:
        scene = sample_scene(rng, heldout, 2)
        prompt, claim = describe(scene, rng, full=True)
        if claim.relations and len({(o.shape, o.colour) for o in scene.objects}) == 2:
            other, upright = mirrored(scene)
            made.append((prompt, render(scene, size), render(other, size), upright))
    prompts, true, turned, upright = zip(*made, strict=True)
    return list(prompts), to_float(np.stack(true)), to_float(np.stack(turned)), np.array(upright)


def shares(pipe: UnCLIP, num: int, heldout: bool) -> dict[str, tuple[float, float]]:
    """{row: (share right of those that say above or below, of the others)}."""
    task, side = pipe.tasks["decoder"], pipe.tasks["clip"].model.vision["image_size"]
    if side != task.image_size:
        raise SystemExit(f"the decoder draws {task.image_size} px and CLIP sees {side}; they must be the same here")
    prompts, true, turned, upright = cases(num, heldout, task.image_size)
    tokens, mask = pipe.tokenizer.encode(prompts)
    cond = {"tokens": tokens, "mask": mask}
    look = lambda image: pipe.run("clip", ({**cond, "image": image},), {}, BATCH, False)  # noqa: E731
    encoded, other = look(true), look(turned)["z_img"]
    own = encoded.pop("z_img")
    nearer = lambda z: np.asarray((unit(z) * (unit(own) - unit(other))).sum(-1) > 0)  # noqa: E731
    rows, drawn = {"CLIP": nearer(encoded["z_txt"])}, {}
    for kind, stage in PRIORS.items():
        if stage in pipe.tasks:
            given = {**cond, **encoded}, picture_keys(0, num, 1)
            drawn[kind] = pipe.run(stage, given, pipe.settings(prior=kind)[stage], BATCH, False)
            rows[f"prior, {kind}"] = nearer(drawn[kind])
    noise = np.random.default_rng(0).standard_normal(true.shape).astype(np.float32)
    time = round(TIME * task.schedule.num_steps)

    @jax.jit
    def made(params, cond, noise, keep):
        n = len(noise)
        denoise = task.x0_and_denoise(params, {**cond, "image": noise}, jnp.full((n,), keep))[1]
        return denoise(noise, jnp.full((n,), time)).pred

    def closer(z, keep=True):
        rows = {**cond, **encoded, "z_img": z}
        parts = [slice(at, at + BATCH) for at in range(0, num, BATCH)]
        some = lambda part: {name: value[part] for name, value in rows.items()}  # noqa: E731
        x0 = [made(pipe.params["decoder"], some(part), noise[part], keep) for part in parts]
        apart = lambda image: np.square(np.concatenate(x0) - image).sum((1, 2, 3))  # noqa: E731
        return apart(true) < apart(turned)

    rows["decoder, prompt alone"] = closer(own, keep=False)
    rows["decoder, prompt and the true z_img"] = closer(own)
    rows["decoder, prompt and the mirrored z_img"] = closer(other)
    for kind, z in drawn.items():
        rows[f"decoder, prompt and the prior's ({kind})"] = closer(z)
    return {name: (float(right[upright].mean()), float(right[~upright].mean())) for name, right in rows.items()}


def main(argv=None) -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="shapes")
    parser.add_argument("--num", type=int, default=200, help="prompts of each kind")
    args = parser.parse_args(argv)
    pipe = UnCLIP.load(args.model)
    if pipe.tasks["decoder"].target != "x0":
        raise SystemExit("the decoder must predict x0, as those of configs/shapes do")
    seen, heldout = (shares(pipe, args.num, kind) for kind in (False, True))
    print(f"{args.num} prompts each           seen: above or below, left or right      held out: the same two")
    for name in seen:
        print(f"{name:44}" + "".join(f"{100 * share:9.1f} %" for share in (*seen[name], *heldout[name])))


if __name__ == "__main__":
    main()
