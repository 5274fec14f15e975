"""Karlo's own JSON files, as published, and folders and stacks of its form for tests."""

import json

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save_file

from tests import tiny_stack
from unclip_jax import tasks
from unclip_jax.interop import karlo
from unclip_jax.interop.karlo_json import ATTENTION_DOWN, ATTENTION_UP, DOWN, UP
from unclip_jax.interop.karlo_tables import TABLES
from unclip_jax.interop.layout import views
from unclip_jax.interop.stages import clip_config, network_shapes
from unclip_jax.weights import Stage, save_stack

PRIOR = dict(
    _class_name="PriorTransformer",
    _diffusers_version="0.12.0.dev0",
    additional_embeddings=4,
    attention_head_dim=64,
    dropout=0.0,
    embedding_dim=768,
    num_attention_heads=32,
    num_embeddings=77,
    num_layers=20,
)
TEXT_PROJ = dict(
    _class_name="UnCLIPTextProjModel",
    clip_embeddings_dim=768,
    clip_extra_context_tokens=4,
    cross_attention_dim=1536,
    time_embed_dim=1280,
)
_UNET = dict(
    act_fn="silu",
    block_out_channels=[320, 640, 960, 1280],
    center_input_sample=False,
    downsample_padding=1,
    flip_sin_to_cos=True,
    freq_shift=0,
    layers_per_block=3,
    mid_block_scale_factor=1,
    norm_eps=1e-05,
    norm_num_groups=32,
)
DECODER = dict(
    _UNET,
    _class_name="UNet2DConditionModel",
    attention_head_dim=64,
    class_embed_type="identity",
    cross_attention_dim=1536,
    down_block_types=[DOWN, *[ATTENTION_DOWN] * 3],
    dual_cross_attention=False,
    in_channels=3,
    mid_block_type="UNetMidBlock2DSimpleCrossAttn",
    num_class_embeds=None,
    only_cross_attention=False,
    out_channels=6,
    resnet_time_scale_shift="scale_shift",
    sample_size=64,
    up_block_types=[*[ATTENTION_UP] * 3, UP],
    upcast_attention=False,
    use_linear_projection=False,
)
SUPER_RES_FIRST = dict(
    _UNET,
    _class_name="UNet2DModel",
    add_attention=False,
    attention_head_dim=8,
    down_block_types=[DOWN] * 4,
    in_channels=6,
    out_channels=3,
    resnet_time_scale_shift="default",
    sample_size=256,
    time_embedding_type="positional",
    up_block_types=[UP] * 4,
)
SUPER_RES_LAST = {**SUPER_RES_FIRST, "sample_size": None}
_SCHEDULER = dict(_class_name="UnCLIPScheduler", clip_sample=True, num_train_timesteps=1000)
PRIOR_SCHEDULER = dict(
    _SCHEDULER, clip_sample_range=5.0, prediction_type="sample", variance_type="fixed_small_log"
)
DECODER_SCHEDULER = dict(
    _SCHEDULER, clip_sample_range=1.0, prediction_type="epsilon", variance_type="learned_range"
)
SUPER_RES_SCHEDULER = dict(
    _SCHEDULER, clip_sample_range=1.0, prediction_type="epsilon", variance_type="fixed_small_log"
)
FILES = {
    "prior/config.json": PRIOR,
    "decoder/config.json": DECODER,
    "text_proj/config.json": TEXT_PROJ,
    "super_res_first/config.json": SUPER_RES_FIRST,
    "super_res_last/config.json": SUPER_RES_LAST,
    "prior_scheduler/scheduler_config.json": PRIOR_SCHEDULER,
    "decoder_scheduler/scheduler_config.json": DECODER_SCHEDULER,
    "super_res_scheduler/scheduler_config.json": SUPER_RES_SCHEDULER,
}
# The same networks, small: of 3 levels and 2.
SMALL = {
    "prior/config.json": {**PRIOR, "attention_head_dim": 4, "num_attention_heads": 2, "num_layers": 3,
                          "embedding_dim": 6, "num_embeddings": 5},
    "decoder/config.json": {**DECODER, "block_out_channels": [8, 16, 24], "layers_per_block": 1,
                            "attention_head_dim": 8, "cross_attention_dim": 10, "norm_num_groups": 4,
                            "sample_size": 16, "down_block_types": [DOWN, *[ATTENTION_DOWN] * 2],
                            "up_block_types": [*[ATTENTION_UP] * 2, UP]},
    "text_proj/config.json": {**TEXT_PROJ, "clip_embeddings_dim": 6, "cross_attention_dim": 10, "time_embed_dim": 32},
    **{f"super_res_{name}/config.json": {**config, "block_out_channels": [8, 16], "layers_per_block": 1,
                                         "norm_num_groups": 4, "sample_size": config["sample_size"] and 64,
                                         "down_block_types": [DOWN] * 2, "up_block_types": [UP] * 2}
       for name, config in (("first", SUPER_RES_FIRST), ("last", SUPER_RES_LAST))},
}  # fmt: skip
SMALL = {**FILES, **SMALL}


def lay(folder, contents, **changed):
    """Writes JSON files; `changed` is {"decoder/config.json": {key: value}}."""
    for path, content in contents.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(json.dumps({**content, **changed.get(path, {})}))
    return folder


def shapes_of(folder):
    """{stage: {path: shape}} of the JSON files in a folder."""
    parts = {name: folder / parts[0] for name, parts in karlo.PARTS.items()}
    return {name: network_shapes(*karlo._READ[name](folder)) for name, part in parts.items() if part.is_dir()}


def drawn(folder, fill):
    """{stage: ours} of the JSON files in a folder, of the numbers fill(path, shape)."""
    made = {}
    for name, shapes in shapes_of(folder).items():
        arrays = {path: fill(path, shape).astype(np.float32) for path, shape in shapes.items()}
        made[name] = Stage(unflatten_dict(arrays, sep="/"), karlo._READ[name](folder)[0], 0, {})
    return made


def publish(folder, contents, fill):
    """Lays a pipeline's JSON files and arrays as diffusers does; returns the `drawn` stages that it holds."""
    stages = drawn(lay(folder, contents), fill)
    for name, stage in stages.items():
        arrays = flatten_dict(stage.params, sep="/")
        for part, table in TABLES[name]({path: a.shape for path, a in arrays.items()}).items():
            theirs = {key: np.array(a, order="C") for key, a in views(table, arrays).items()}
            save_file(theirs, folder / part / karlo.WEIGHTS_FILE)
    return stages


def save(out, stages, vision=None):
    """A stack of such stages, and of a CLIP, by default of captions only: a pipeline cannot be without that half."""
    words, width = tiny_stack.tokenizer(), 8
    text = {"width": width, "layers": 1, "heads": 1}
    config = clip_config({"embed_dim": width, "vision": vision, "text": text}, words, words.vocab_size)
    shapes = jax.eval_shape(tasks.make(config).init, jax.random.key(0))
    clip = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    return save_stack(out, {"clip": (clip, config, 0, {}), **stages}, words.to_json(), "float32")
