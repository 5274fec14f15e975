"""What the rows of `benchmarks.run` are made of: inputs, networks with the same weights on both sides, loops.

Where both have the same network (diffusers; open_clip) they have the same weights, random ones, drawn by the peer and
converted; not on a GPU, see `device.Device`. Inputs are random, of the same shapes, and on the device before the clock
starts. A row's sides are made apart, so that one can be measured alone.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from benchmarks.device import Device, Program, Work
from benchmarks.sizes import LENGTH

GUIDANCE = {"prior": 4.0, "decoder": 8.0}
STEPS = {"decoder": 25, "upsampler": 7}


class Row(NamedTuple):
    """One comparison. `peer()` makes the peer's networks, `theirs(networks)` and `ours(networks | None)` what is timed.

    Both do the work when called, and are done when they return. Without networks our weights are zeros on a CPU, which
    take the same time and memory there, and random numbers on a GPU, where they do not.
    """

    name: str
    package: str  # whose
    what: str  # shapes and counts, for the table
    peer: Callable[[], tuple]
    theirs: Callable[[tuple], Callable[[], Any]]
    ours: Callable[[tuple | None], Work]


# Inputs.


def texts(s: dict, batch: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Captions as CLIP tells of them: states, mask, z_txt, z_img, tokens (not read)."""
    rng, d = np.random.default_rng(seed), s["prior"]["embed_dim"]
    normal = lambda *shape: rng.standard_normal(shape, np.float32)  # noqa: E731
    mask = np.arange(LENGTH)[None] < rng.integers(8, LENGTH, batch)[:, None]
    tokens = np.zeros((batch, LENGTH), np.int32)
    made = {"states": normal(batch, LENGTH, d), "mask": mask, "z_txt": normal(batch, d), "z_img": normal(batch, d)}
    return {**made, "tokens": tokens}


def with_empty(s: dict, batch: int) -> dict:
    """`texts`, and those of the empty caption, as guided sampling takes them."""
    empty = {k: np.repeat(v, batch, axis=0) for k, v in texts(s, 1, 1).items() if k != "z_img"}
    return {**texts(s, batch), "empty": empty}


def halves(device: Device, cond: dict, *names: str) -> list:
    """torch tensors of the empty captions and, behind them, the given ones."""
    return [device.tensor(np.concatenate([cond["empty"][n], cond[n]])) for n in names]


# Both sides' networks.


def converted(task, stage: str, models: tuple) -> dict:
    """Parameters of ours from diffusers' networks of one stage."""
    from flax.traverse_util import flatten_dict, unflatten_dict

    from unclip_jax.interop.karlo_tables import TABLES
    from unclip_jax.interop.layout import read

    own = {path: leaf.shape for path, leaf in flatten_dict(shapes(task, np.float32), sep="/").items()}
    out = {}
    for (_, table), model in zip(TABLES[stage](own).items(), models, strict=True):
        arrays = {name: p.detach().numpy() for name, p in model.state_dict().items()}
        out |= read(table, {e.path: own[e.path] for e in table}, arrays, arrays.__getitem__)
    return unflatten_dict(out, sep="/")


def shapes(task, dtype) -> dict:
    """ShapeDtypeStructs of the task's parameters in a dtype; `weights.STATISTICS` stay f32."""
    import jax

    from unclip_jax.weights import dtype_in

    def kind(path, leaf):
        name = jax.tree_util.keystr(path[-1:], simple=True)
        return jax.ShapeDtypeStruct(leaf.shape, dtype_in(name, leaf.dtype, np.dtype(dtype).name))

    return jax.tree_util.tree_map_with_path(kind, jax.eval_shape(task.init, jax.random.key(0)))


def random_params(shapes: dict) -> dict:
    """numpy arrays of such shapes that keep the size of signals."""
    import jax

    from unclip_jax.weights import STATISTICS

    noise = np.random.default_rng(0).standard_normal(2**22, np.float32)

    def fill(path, leaf):
        name = jax.tree_util.keystr(path[-1:], simple=True)
        if name in STATISTICS or name in ("scale", "bias"):
            return np.full(leaf.shape, name in ("scale", "std"), leaf.dtype)
        width = max(1.0, leaf.size / leaf.shape[-1]) ** -0.5 if name == "kernel" else 0.02
        return np.resize((noise * np.float32(width)).astype(leaf.dtype), leaf.shape)

    return jax.tree_util.tree_map_with_path(fill, shapes)


def diffusers_model(cls: str, config: dict, device: Device, training: bool = False):
    """A network of diffusers with random weights."""
    import diffusers
    from diffusers.pipelines.deprecated.unclip import UnCLIPTextProjModel

    diffusers.utils.logging.set_verbosity_error()  # it warns of every cast
    made = UnCLIPTextProjModel if cls == "UnCLIPTextProjModel" else getattr(diffusers, cls)
    return device.network(lambda: made.from_config(config).eval(), training)


def diffusers_stage(s: dict, stage: str, device: Device, training: bool = False) -> tuple:
    """diffusers' networks of one stage, in the order that the converter wants them in."""
    from unclip_jax.interop import karlo_json

    if stage == "prior":
        made = [("PriorTransformer", karlo_json.prior_json(s["prior"]))]
    elif stage == "decoder":
        unet, text_proj = karlo_json.decoder_json(s["decoder"], s["side"])
        made = [("UnCLIPTextProjModel", text_proj), ("UNet2DConditionModel", unet)]
    else:
        made = [("UNet2DModel", karlo_json.upsampler_json(s["upsampler"], s["large"]))] * 2
    return tuple(diffusers_model(cls, config, device, training) for cls, config in made)


def our_task(s: dict, stage: str, device: Device, steps: int = 1, **more):
    """Our task of one stage, in Karlo's form; without a CLIP, as what CLIP says is given. `more`: of a prior."""
    from types import SimpleNamespace

    from unclip_jax.diffusion.schedule import make_schedule
    from unclip_jax.models.decoder import Decoder
    from unclip_jax.models.prior import Prior
    from unclip_jax.models.unet import UNet
    from unclip_jax.tasks.decoder import DecoderTask
    from unclip_jax.tasks.prior_diffusion import PriorTask
    from unclip_jax.tasks.upsampler import UpsamplerTask

    schedule, width, dtype = make_schedule("cosine"), s["prior"]["embed_dim"], device.dtype
    clip = SimpleNamespace(embed_dim=width, text={"max_len": LENGTH, "width": width}, vision=None)
    sampler = {"name": "ddpm", "steps": steps}
    if stage == "prior":
        sampler |= {"guidance": GUIDANCE["prior"], "candidates": 1}
        return PriorTask(Prior(**s["prior"], dtype=dtype, **more), schedule, clip, sampler, empty_caption=True)
    if stage == "decoder":
        sampler |= {"guidance": GUIDANCE["decoder"]}
        net = Decoder(**s["decoder"], dtype=dtype)
        return DecoderTask(net, schedule, clip, s["side"], sampler, empty_caption=True)
    net, factor = UNet(**s["upsampler"], dtype=dtype), s["large"] // s["side"]
    return UpsamplerTask(net, schedule, s["large"], sampler, factor=factor, last_steps=1)


def our_shapes(task, device: Device):
    """What our programs are compiled for before there are parameters, as `UnCLIP` does with `low_memory`."""
    import jax

    from unclip_jax.nn.drawing import foreseen

    return foreseen(shapes(task, device.dtype), jax.local_devices()[0])


def our_params(stage: str, models: tuple | None, task, device: Device):
    """Our parameters of one stage, to draw with: those of diffusers' networks if given, zeros, or random ones."""
    import jax

    from unclip_jax.nn.drawing import placed

    if models is not None:
        params = converted(task, stage, models)
    elif device.half:
        params = random_params(shapes(task, device.dtype))
    else:
        params = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), shapes(task, device.dtype))
    return jax.block_until_ready(placed(params, jax.local_devices()[0]))


def our_sampling(s: dict, stage: str, models: tuple | None, steps: int, cond: dict, batch: int, device: Device) -> Work:
    """One compiled program, all steps in it."""
    import jax

    task = our_task(s, stage, device, steps)
    keys = jax.random.split(jax.random.key(0), batch)
    program, cond = Program(task.sample), jax.device_put(cond)
    program.compile(our_shapes(task, device), cond, keys)
    params = our_params(stage, models, task, device)
    return Work(lambda: program(params, cond, keys), program)


# diffusers' loops, those of UnCLIPPipeline.


def scheduler(stage: str, steps: int, device: Device):
    """UnCLIPScheduler as Karlo's pipelines set it."""
    from diffusers import UnCLIPScheduler

    kinds = {
        "prior": dict(variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=5.0),
        "decoder": dict(variance_type="learned_range", prediction_type="epsilon"),
        "upsampler": dict(variance_type="fixed_small_log", prediction_type="epsilon"),
    }
    made = UnCLIPScheduler(**kinds[stage])
    made.set_timesteps(steps, device.torch)
    return made


def their_loop(stage: str, steps: int, shape: tuple, predict: Callable, device: Device):
    """predict(x, t, last) → what the scheduler takes, at each step."""
    import torch

    def run():
        made = scheduler(stage, steps, device)
        times = made.timesteps
        x = device.noise(shape)
        with torch.inference_mode():
            for i, t in enumerate(times):
                before = times[i + 1] if i + 1 < len(times) else None
                x = made.step(predict(x, t, before is None), t, x, prev_timestep=before).prev_sample
        device.wait()
        return x

    return run
