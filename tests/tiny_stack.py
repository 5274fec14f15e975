"""A whole stack of tiny networks with random weights: 16 pixels from the decoder, 32 from the upsampler."""

import functools
import tempfile
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from unclip_jax import tasks
from unclip_jax.data import shapes
from unclip_jax.tokenizer import Tokenizer
from unclip_jax.weights import save_stack

BLOCKS = {"width": 16, "layers": 1, "heads": 2}
UNET = {"channels": 8, "multipliers": (1,), "blocks": 1, "head_channels": 8, "groups": 4}
TRAINED_STEPS = 20


@functools.cache
def tokenizer() -> Tokenizer:
    """Few pieces and short, so that a long prompt is easily made."""
    captions = [prompt for kind in ("one", "two") for prompt in shapes.prompts(kind, False, 50)]
    return Tokenizer.train(captions, vocab_size=400, max_len=32)


def configs() -> dict[str, ConfigDict]:
    """The configs of all stages, by the names they have in a stack."""
    words = {"path": "", "vocab_size": tokenizer().vocab_size, "max_len": tokenizer().max_len}
    diffusion = {"name": "cosine", "num_steps": TRAINED_STEPS}
    clip = {
        "embed_dim": 8,
        "vision": {"image_size": 16, "patch": 8, **BLOCKS},
        "text": dict(BLOCKS),
        "norm": 17.2,
    }
    stages = {
        "clip": {"task": "clip", "model": clip, "data": {"size": 16}},
        "prior": {
            "task": "prior_diffusion",
            "model": {"caption": "tokens", **BLOCKS},
            "objective": {"text_drop": 0.1, "clip_x0": 5.0},
            "sampler": {"name": "ddpm", "steps": 4, "guidance": 2.0, "candidates": 2},
            "data": {"size": 16},
        },
        "prior_ar": {
            "task": "prior_ar",
            "model": {"caption": "tokens", "dims": 6, "buckets": 16, "dot_buckets": 4, **BLOCKS},
            "objective": {"text_drop": 0.1},
            "sampler": {"temperature": 1.0, "top_p": 1.0, "guidance": 2.0, "candidates": 2},
            "data": {"size": 16},
        },
        "decoder": {
            "task": "decoder",
            "model": {
                "unet": {**UNET, "attention": (16,)},
                "text": {"layers": 1, "heads": 2},
                "context_width": 16,
                "image_tokens": 2,
            },
            "objective": {"target": "v", "vlb_weight": 0.001},
            "sampler": {"name": "ddpm", "steps": 4, "guidance": 2.0},
            "data": {"size": 16},
        },
        "upsampler": {
            "task": "upsampler",
            "model": dict(UNET),
            "objective": {"target": "v", "factor": 2, "vlb_weight": 0.0},
            "sampler": {"name": "ddim", "steps": 3},
            "data": {"size": 32},
        },
    }
    for stage in stages.values():
        stage |= {"tokenizer": words, "diffusion": diffusion, "clip_identity": "a", "clip": ""}
        stage["data"] |= {"source": "shapes", "split": "train", "seed": 0}
        stage |= {"batch_size": 4, "loader": {"num_workers": 0, "crop": None}, "eval": {"split": "test"}}
    return {name: ConfigDict(stage) for name, stage in stages.items()}


def weights(config: ConfigDict, clip=None, seed: int = 0) -> dict:
    """Random parameters of the right shapes, none of them zero; nothing is compiled for it."""
    shapes_ = jax.eval_shape(tasks.make(config, clip=clip).init, jax.random.key(0))
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        noise = rng.standard_normal(leaf.shape).astype(np.float32)
        name = jax.tree_util.keystr(path[-1:], simple=True)
        if name == "kernel":
            return noise / np.sqrt(max(1, leaf.size // leaf.shape[-1]))
        return 0.1 * noise + (name in ("scale", "std"))

    return jax.tree_util.tree_map_with_path(fill, shapes_)


@functools.cache
def path() -> Path:
    """The stack's directory, made once in a process."""
    made = configs()
    clip = tasks.make(made["clip"]).model
    extra = {"clip_identity": "a"}
    stages = {name: (weights(config, clip), config, 100, extra) for name, config in made.items()}
    out = Path(tempfile.mkdtemp(prefix="tiny-stack-")) / "tiny"
    return save_stack(out, stages, tokenizer().to_json())
