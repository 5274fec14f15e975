"""Training runs of the smallest networks that still have every part: 16-pixel shapes, one block, one layer."""

import functools
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest

from tests import tiny_stack
from unclip_jax import checkpoint, sharding
from unclip_jax import config as configs
from unclip_jax.run import Run, make_run
from unclip_jax.train_step import TrainState

ROOT = Path(__file__).resolve().parent.parent
WITH_CLIP = ("prior_diffusion", "prior_ar", "decoder")
STAGES = ("clip", "prior_diffusion", "prior_ar", "decoder", "upsampler")
# The same for a test that takes long: quick runs have it of one stage.
STAGES_SLOWLY = [*(pytest.param(stage, marks=pytest.mark.slow) for stage in STAGES if stage != "prior_ar"), "prior_ar"]
RUN = {
    "batch_size": 8,
    "num_steps": 8,
    "data.size": 16,
    "optim.warmup": 0,
    "every.log": 1,
    "every.save": 4,
    "every.preview": 0,
    "every.eval": 0,
    "eval.batches": 1,
    "eval.preview": 2,
}
UNET = {"channels": 8, "multipliers": (1,), "blocks": 1, "groups": 4, "patch": 1}
NETWORK = {
    "clip": {
        "model.embed_dim": 8,
        "model.vision.image_size": 16,
        "model.vision.patch": 8,
        **{f"model.{tower}.{name}": n for tower in ("vision", "text") for name, n in tiny_stack.BLOCKS.items()},
    },
    "prior_diffusion": {f"model.{name}": n for name, n in tiny_stack.BLOCKS.items()} | {"sampler.steps": 4},
    "prior_ar": {f"model.{name}": n for name, n in tiny_stack.BLOCKS.items()} | {"model.dims": 5, "model.buckets": 16},
    "decoder": {
        **{f"model.unet.{name}": n for name, n in UNET.items()},
        "model.unet.attention": (1,),  # no such level: only the middle attends
        "model.unet.head_channels": 8,
        "model.context_width": 16,
        "model.text.layers": 1,
        "model.text.heads": 2,
        "objective.target": "v",
        "objective.vlb_weight": 0.001,
        "sampler.steps": 4,
    },
    "upsampler": {
        **{f"model.{name}": n for name, n in UNET.items()},
        "loader.crop": None,
        "objective.target": "v",
        "sampler.steps": 4,
    },
}


def config(stage: str, **changes):
    """The config of configs/shapes/STAGE.py:tiny made tinier; in the names of `changes` "__" stands for a dot."""
    file, overrides = spec(stage, **changes)
    return configs.load_config(file, overrides)


def spec(stage: str, **changes) -> tuple[str, list[str]]:
    """What the command line would be given for `config`: FILE:VARIANT, and the overrides."""
    settings = {**RUN, **NETWORK[stage]}
    if stage == "clip":
        settings["tokenizer.path"] = str(folder() / "tokenizer.json")
    if stage in WITH_CLIP:
        settings["clip"] = str(folder() / "clip")
    settings |= {name.replace("__", "."): value for name, value in changes.items()}
    return f"{ROOT}/configs/shapes/{stage}.py:tiny", [f"{name}={value}" for name, value in settings.items()]


@functools.cache
def folder() -> Path:
    """Holds tokenizer.json, and in clip/ a checkpoint of a CLIP with random weights."""
    root = Path(tempfile.mkdtemp(prefix="tiny-runs-"))
    words = tiny_stack.tokenizer()
    words.save(root / "tokenizer.json")
    settings = {**RUN, **NETWORK["clip"]}
    made = configs.load_config(f"{ROOT}/configs/shapes/clip.py:tiny", [f"{k}={v}" for k, v in settings.items()])
    with made.unlocked():
        made.tokenizer.update(vocab_size=words.vocab_size, max_len=words.max_len)
    save(root / "clip", made, tiny_stack.weights(made), words.to_json())
    return root


def save(workdir: Path, made, params, tokenizer_json: str | None) -> None:
    """A workdir as training leaves it, with these averaged weights."""
    meta = {"config": configs.to_json(made), "tokenizer": tokenizer_json}
    with checkpoint.Checkpoints(workdir, async_=False) as saved:
        saved.save(1, {"params": jax.tree.map(np.zeros_like, params), "ema": params}, meta)


def make(stage: str, **changes) -> Run:
    """`make_run` of `config`, for a folder that does not exist."""
    return make_run(config(stage, **changes), folder() / "none")


def state(run: Run) -> TrainState:
    """A first state of random numbers, none of the weights zero; nothing is compiled for it."""
    params = tiny_stack.weights(run.config, getattr(run.task, "clip", None))
    opt = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), run.shapes.opt)
    return TrainState(np.zeros((), np.int32), params, params, opt)


@pytest.fixture
def one_device(monkeypatch):
    """Runs take the first device only."""
    mesh = functools.partial(sharding.make_mesh, devices=jax.devices()[:1])
    monkeypatch.setattr(sharding, "make_mesh", mesh)


def memorise(stage: str, **changes):
    """A config that sees the same eight pictures in every step, long enough to know them by heart."""
    learn = {"optim.schedule": "constant", "optim.weight_decay": 0.0, "every.save": 80, "num_steps": 240}
    own = {
        "clip": {"optim.lr": 5e-3},
        "prior_diffusion": {"optim.lr": 5e-3, "objective.text_drop": 0.0, "sampler.steps": 10, "sampler.candidates": 1},
        "prior_ar": {"optim.lr": 5e-3, "objective.text_drop": 0.0, "sampler.candidates": 1},
        "decoder": {"optim.lr": 1e-2, "objective.text_drop": 0.0, "objective.clip_drop": 0.0},
        "upsampler": {"optim.lr": 1e-2},
    }
    made = config(stage, **{name.replace(".", "__"): v for name, v in {**learn, **own[stage]}.items()} | changes)
    with made.unlocked():
        made.data.length = 8
        if stage == "prior_ar":
            made.model.dot_buckets = 2  # of more, most of those asked for in sampling would be news beside a caption
    return made
