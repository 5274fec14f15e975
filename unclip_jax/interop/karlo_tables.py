"""Where each array of Karlo lies: in our prior, decoder and upsampler, and in the parts of diffusers' UnCLIPPipeline.

    here          part there
    prior         prior (clip_mean and clip_std lie beside the network: {"net", "mean", "std"})
    decoder       text_proj, decoder
    upsampler     super_res_first ("net"), super_res_last ("last")

A UNet's names are made from its paths, so depth, width and attention are those of the shapes given.
"""

from collections.abc import Mapping

from unclip_jax.interop.layout import (
    CONV,
    DENSE,
    DENSE_OUT,
    FLAT,
    ROW,
    SAME,
    Entry,
    Turn,
    UNetPart,
    blocks,
    layer,
    norm,
    prefixed,
    unet_levels,
    unet_part,
)

Shapes = Mapping[str, tuple[int, ...]]

# Two leading axes of 1 there.
TOKEN = Turn(lambda a, shape: a.reshape(shape), lambda a: a[None, None])
BLOCK = dict(
    {name: f"attn1.to_{name[0]}" for name in ("query", "key", "value")},
    **dict(norm1="norm1", norm2="norm3", out="attn1.to_out.0", fc1="ff.net.0.proj", fc2="ff.net.2"),
)
PRIOR_LAYERS = {
    "states_in": "encoder_hidden_states_proj",
    "text_in": "embedding_proj",
    "time/fc1": "time_embedding.linear_1",
    "time/fc2": "time_embedding.linear_2",
    "image_in": "proj_in",
    "out": "proj_to_clip_embeddings",
}
TEXT_PROJ_LAYERS = {
    "image_to_time": "clip_image_embeddings_project_to_time_embeddings",
    "text_to_time": "embedding_proj",
    "image_to_tokens": "clip_extra_context_tokens_proj",
    "states_in": "encoder_hidden_states_proj",
}
UNET_ENDS = {
    "stem": "conv_in",
    "time/fc1": "time_embedding.linear_1",
    "time/fc2": "time_embedding.linear_2",
    "out_norm": "conv_norm_out",
    "out": "conv_out",
}
RES_BLOCK = {
    "norm1": "norm1",
    "conv1": "conv1",
    "emb": "time_emb_proj",
    "norm2": "norm2",
    "conv2": "conv2",
    "skip": "conv_shortcut",
}
ATTENTION = {
    "norm": "group_norm",
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "context_key": "add_k_proj",
    "context_value": "add_v_proj",
    "out": "to_out.0",
}


def prior_tables(shapes: Shapes) -> dict[str, list[Entry]]:
    """{"prior": …} of the prior's parameters {"net", "mean", "std"}."""
    net = [Entry("query", "prd_embedding", TOKEN), Entry("position", "positional_embedding", ROW)]
    net += norm("final_norm/norm", "norm_out") + blocks("transformer/blocks", "transformer_blocks.{}", BLOCK)
    for ours, theirs in PRIOR_LAYERS.items():
        net += layer(ours, theirs)
    return {"prior": [*prefixed("net/", "", net), Entry("mean", "clip_mean", ROW), Entry("std", "clip_std", ROW)]}


def decoder_tables(shapes: Shapes) -> dict[str, list[Entry]]:
    """{"text_proj": …, "decoder": …} of `Decoder`'s parameters."""
    table = [Entry("null_image", "learned_classifier_free_guidance_embeddings", SAME)]
    for ours, theirs in TEXT_PROJ_LAYERS.items():
        table += layer(ours, theirs)
    table += norm("states_norm/norm", "text_encoder_hidden_states_norm")
    return {"text_proj": table, "decoder": prefixed("net/", "", unet_table(_below("net/", shapes)))}


def upsampler_tables(shapes: Shapes) -> dict[str, list[Entry]]:
    """{"super_res_first": …, "super_res_last": …} of two `UNet`s' parameters {"net", "last"}."""
    table = unet_table(_below("net/", shapes))
    return {"super_res_first": prefixed("net/", "", table), "super_res_last": prefixed("last/", "", table)}


def unet_table(shapes: Shapes) -> list[Entry]:
    """Of a `UNet`'s parameters and UNet2DModel or UNet2DConditionModel."""
    levels = unet_levels(shapes)
    return [_unet_entry(path, shape, levels) for path, shape in shapes.items()]


TABLES = {"prior": prior_tables, "decoder": decoder_tables, "upsampler": upsampler_tables}


def _below(prefix: str, shapes: Shapes) -> dict[str, tuple[int, ...]]:
    return {path.removeprefix(prefix): shape for path, shape in shapes.items() if path.startswith(prefix)}


def _unet_entry(path: str, shape: tuple[int, ...], levels: int) -> Entry:
    place, leaf = path.rsplit("/", 1)
    part = unet_part(place)
    attends = part is not None and part.kind == "attn"
    name = _unet_layer(part, place.rpartition("/")[2], levels) if part else UNET_ENDS[place]
    if leaf == "bias":
        return Entry(path, f"{name}.bias", FLAT)
    if leaf == "scale":
        return Entry(path, f"{name}.weight", SAME)
    dense = DENSE_OUT if attends and place.endswith("/out") else DENSE
    return Entry(path, f"{name}.weight", CONV if len(shape) == 4 else dense)


def _unet_layer(part: UNetPart, inner: str, levels: int) -> str:
    """Their name of layer `inner` in one of our parts; their way up is counted from the lowest level."""
    way, level, kind, index = part
    place = {"down": f"down_blocks.{level}", "mid": "mid_block", "up": f"up_blocks.{levels - 1 - level}"}
    unit = {
        "block": f"resnets.{index}",
        "attn": f"attentions.{index}",
        "pool": "downsamplers.0",
        "repeat": "upsamplers.0",
    }
    return f"{place[way]}.{unit[kind]}.{(ATTENTION if kind == 'attn' else RES_BLOCK)[inner]}"
