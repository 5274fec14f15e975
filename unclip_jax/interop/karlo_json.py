"""The JSON files of Karlo as diffusers writes them, and the keywords of our modules: each says all the other does.

    prior/config.json                        PriorTransformer       → Prior
    decoder/config.json, text_proj/…         UNet2DConditionModel,  → Decoder
                                             UnCLIPTextProjModel
    super_res_first/config.json, …_last/…    UNet2DModel            → UNet
    {prior,decoder,super_res}_scheduler/…    UnCLIPScheduler        → schedule and sampler

A value that our modules cannot express is refused, an unknown key too. A key that is absent has the default that
diffusers 0.42.1 gives it.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from unclip_jax.errors import UserError, is_whole

MOST = 64  # levels of a UNet, and blocks in one: each is traced by itself
PRIOR_EXTRA = 4  # tokens beside the caption's: text embedding, time, noised embedding, query
DOWN, UP = "ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"
ATTENTION_DOWN, ATTENTION_UP = "SimpleCrossAttnDownBlock2D", "SimpleCrossAttnUpBlock2D"
REPO = "https://huggingface.co/kakaobrain/karlo-v1-alpha"


class Format(NamedTuple):
    """One class of diffusers: {key: default} of what is read, {key: value} of what must be so, {key: value} of what
    says nothing about the arrays or what is computed, and the defaults of required keys where they are other values.
    """

    cls: str
    read: Mapping[str, Any]
    required: Mapping[str, Any]
    idle: Mapping[str, Any] = {}
    absent: Mapping[str, Any] = {}


PRIOR = Format(
    "PriorTransformer",
    dict(num_attention_heads=32, attention_head_dim=64, num_layers=20, embedding_dim=768, num_embeddings=77),
    dict(
        additional_embeddings=PRIOR_EXTRA,
        dropout=0.0,
        time_embed_act_fn="silu",
        norm_in_type=None,
        embedding_proj_norm_type=None,
        encoder_hid_proj_type="linear",
        added_emb_type="prd",
        time_embed_dim=None,
        embedding_proj_dim=None,
        clip_embed_dim=None,
    ),
)
TEXT_PROJ = Format(
    "UnCLIPTextProjModel",
    dict(clip_extra_context_tokens=4, clip_embeddings_dim=768, time_embed_dim=None, cross_attention_dim=None),
    {},
)
SCHEDULER = Format(
    "UnCLIPScheduler",
    dict(num_train_timesteps=1000, clip_sample_range=1.0, variance_type="fixed_small_log", prediction_type="epsilon"),
    dict(clip_sample=True, beta_schedule="squaredcos_cap_v2"),
)
_UNET_READ = dict(
    sample_size=None,
    block_out_channels=None,
    layers_per_block=2,
    dropout=0.0,
    norm_num_groups=32,
    resnet_time_scale_shift="default",
    down_block_types=None,
    up_block_types=None,
)
_UNET_REQUIRED = dict(
    center_input_sample=False,
    flip_sin_to_cos=True,
    freq_shift=0,
    mid_block_scale_factor=1,
    act_fn="silu",
    norm_eps=1e-5,
    num_class_embeds=None,
    time_embedding_type="positional",
    time_embedding_dim=None,
)
DECODER = Format(
    "UNet2DConditionModel",
    {**_UNET_READ, "attention_head_dim": 8, "cross_attention_dim": 1280},
    dict(
        _UNET_REQUIRED,
        in_channels=3,
        out_channels=6,
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        class_embed_type="identity",
        class_embeddings_concat=False,
        only_cross_attention=False,
        mid_block_only_cross_attention=None,
        num_attention_heads=None,
        cross_attention_norm=None,
        encoder_hid_dim=None,
        encoder_hid_dim_type=None,
        addition_embed_type=None,
        projection_class_embeddings_input_dim=None,
        resnet_skip_time_act=False,
        resnet_out_scale_factor=1.0,
        time_embedding_act_fn=None,
        timestep_post_act=None,
        time_cond_proj_dim=None,
        conv_in_kernel=3,
        conv_out_kernel=3,
    ),
    dict(
        downsample_padding=1,
        dual_cross_attention=False,
        use_linear_projection=False,
        upcast_attention=False,
        transformer_layers_per_block=1,
        reverse_transformer_layers_per_block=None,
        attention_type="default",
        addition_time_embed_dim=None,
        addition_embed_type_num_heads=64,
    ),
    dict(in_channels=4, out_channels=4, mid_block_type="UNetMidBlock2DCrossAttn", class_embed_type=None),
)
UPSAMPLER = Format(
    "UNet2DModel",
    _UNET_READ,
    dict(
        _UNET_REQUIRED,
        in_channels=6,
        out_channels=3,
        mid_block_type="UNetMidBlock2D",
        class_embed_type=None,
        add_attention=False,
    ),
    dict(
        attention_head_dim=8,
        attn_norm_num_groups=None,
        downsample_padding=1,
        downsample_type="conv",
        upsample_type="conv",
        num_train_timesteps=None,
    ),
    dict(in_channels=3, add_attention=True),
)


def prior(config: Mapping) -> dict[str, Any]:
    """prior/config.json → keywords of `Prior`."""
    v = _values(PRIOR, "prior", config)
    return dict(
        embed_dim=v["embedding_dim"],
        max_len=v["num_embeddings"],
        width=v["num_attention_heads"] * v["attention_head_dim"],
        layers=v["num_layers"],
        heads=v["num_attention_heads"],
        learned_null=False,
    )


def prior_json(model: Mapping) -> dict[str, Any]:
    """Keywords of `Prior` → prior/config.json; the inverse of `prior`."""
    _needs("prior", model, vocab_size=0, activation="gelu", learned_null=False)
    return _json(
        PRIOR,
        num_attention_heads=model["heads"],
        attention_head_dim=model["width"] // model["heads"],
        num_layers=model["layers"],
        embedding_dim=model["embed_dim"],
        num_embeddings=model["max_len"],
    )


def decoder(config: Mapping, text_proj: Mapping) -> tuple[dict[str, Any], int]:
    """decoder/config.json and text_proj/config.json → keywords of `Decoder`, and the side of its images."""
    v, t = _values(DECODER, "decoder", config), _values(TEXT_PROJ, "text_proj", text_proj)
    unet = {**_unet("decoder", v), "head_channels": v["attention_head_dim"], "out_channels": 6}
    if not unet["attention"]:
        raise _refusal("decoder", "down_block_types", v["down_block_types"], f"with at least one {ATTENTION_DOWN}")
    for key, value in (("time_embed_dim", 4 * unet["channels"]), ("cross_attention_dim", v["cross_attention_dim"])):
        if t[key] != value:
            raise _refusal("text_proj", key, t[key], f"{value}, as the decoder's")
    model = dict(
        embed_dim=t["clip_embeddings_dim"],
        unet=unet,
        text=None,
        context_width=t["cross_attention_dim"],
        image_tokens=t["clip_extra_context_tokens"],
        add_text_embedding=True,
    )
    return model, v["sample_size"]


def decoder_json(model: Mapping, size: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keywords of `Decoder` and the side of its images → decoder/config.json, text_proj/config.json."""
    _needs("decoder", {"add_text_embedding": False, **model}, text=None, add_text_embedding=True)
    unet, width = model["unet"], model["context_width"]
    _needs("decoder", unet, out_channels=6)
    if not unet.get("attention"):
        what = "the decoder's attention=() must name a resolution, as the middle of diffusers' always has attention"
        raise UserError(what, "export it as a stack of unclip_jax")
    heads = dict(attention_head_dim=unet.get("head_channels", 64), cross_attention_dim=width)
    text_proj = dict(
        clip_extra_context_tokens=model.get("image_tokens", 4),
        clip_embeddings_dim=model["embed_dim"],
        time_embed_dim=4 * unet["channels"],
        cross_attention_dim=width,
    )
    return _json(DECODER, **_unet_json("decoder", unet, size), **heads), _json(TEXT_PROJ, **text_proj)


def upsampler(first: Mapping, last: Mapping) -> tuple[dict[str, Any], int]:
    """super_res_first/config.json and super_res_last/… → keywords of `UNet` for both, and the side of their images."""
    models = []
    for name, config in (("super_res_first", first), ("super_res_last", last)):
        v = _values(UPSAMPLER, name, config)
        models.append({**_unet(name, v), "out_channels": 3})
        if models[-1]["attention"]:
            raise _refusal(name, "down_block_types", v["down_block_types"], f"{DOWN} alone")
    for key, value in models[0].items():
        if models[1][key] != value:
            raise _refusal("super_res_last", key, models[1][key], f"{value}, as in super_res_first")
    size = first.get("sample_size") or last.get("sample_size")
    if not is_whole(size, 1):
        raise _refusal("super_res_first", "sample_size", size, "a whole number of at least 1")
    return models[0], size


def upsampler_json(model: Mapping, size: int) -> dict[str, Any]:
    """Keywords of `UNet` and the side of its images → super_res_first/config.json and super_res_last/config.json."""
    _needs("upsampler", model, out_channels=3, attention=())
    return _json(UPSAMPLER, **_unet_json("upsampler", model, size))


def scheduler(name: str, config: Mapping, prediction: str, variance: str) -> tuple[int, float]:
    """A scheduler_config.json that predicts and varies so → steps trained, and the bound of x0 in each step."""
    v = _values(SCHEDULER, name, config)
    for key, value in (("prediction_type", prediction), ("variance_type", variance)):
        if v[key] != value:
            raise _refusal(name, key, v[key], repr(value))
    return v["num_train_timesteps"], v["clip_sample_range"]


def scheduler_json(num_steps: int, clip_x0: float, prediction: str, variance: str) -> dict[str, Any]:
    """The inverse of `scheduler`."""
    return _json(
        SCHEDULER,
        num_train_timesteps=num_steps,
        clip_sample_range=clip_x0,
        prediction_type=prediction,
        variance_type=variance,
    )


def _unet(name: str, v: Mapping) -> dict[str, Any]:
    """Keywords of `UNet` from values of the two UNet classes."""
    widths, downs = v["block_out_channels"], v["down_block_types"]
    for key in ("down_block_types", "up_block_types"):
        if not isinstance(v[key], list):
            raise _refusal(name, key, v[key], "a list of blocks, one for each level")
    sound = isinstance(widths, list) and 0 < len(widths) <= MOST and all(is_whole(width, 1) for width in widths)
    if not sound or any(width % widths[0] for width in widths):
        raise _refusal(name, "block_out_channels", widths, "a list of multiples of its first number")
    attends = [kind == ATTENTION_DOWN for kind in downs]
    for key, kinds in (("down_block_types", (DOWN, ATTENTION_DOWN)), ("up_block_types", (UP, ATTENTION_UP))):
        expected = [kinds[a] for a in (attends if kinds[0] == DOWN else reversed(attends))]
        if list(v[key] or []) != expected or len(expected) != len(widths):
            what = f"one for each of {len(widths)} levels, {kinds[0]} or {kinds[1]}, the way up as the way down"
            raise _refusal(name, key, v[key], what)
    if not is_whole(v["layers_per_block"], 1, MOST):
        raise _refusal(name, "layers_per_block", v["layers_per_block"], f"one whole number in 1 … {MOST}")
    if v["resnet_time_scale_shift"] not in ("default", "scale_shift"):
        raise _refusal(name, "resnet_time_scale_shift", v["resnet_time_scale_shift"], "'default' or 'scale_shift'")
    if any(attends) and not isinstance(v["sample_size"], int):
        raise _refusal(name, "sample_size", v["sample_size"], "a whole number")
    return dict(
        channels=widths[0],
        multipliers=tuple(width // widths[0] for width in widths),
        blocks=v["layers_per_block"],
        attention=tuple(v["sample_size"] >> level for level, attend in enumerate(attends) if attend),
        dropout=v["dropout"],
        scale_shift=v["resnet_time_scale_shift"] == "scale_shift",
        groups=v["norm_num_groups"],
    )


def _unet_json(name: str, unet: Mapping, size: int) -> dict[str, Any]:
    _needs(name, unet, patch=1, outer=0, positions=False, extra=0)
    attends = [size >> level in unet.get("attention", ()) for level in range(len(unet["multipliers"]))]
    return dict(
        sample_size=size,
        block_out_channels=[unet["channels"] * multiplier for multiplier in unet["multipliers"]],
        layers_per_block=unet["blocks"],
        dropout=unet.get("dropout", 0.0),
        norm_num_groups=unet.get("groups", 32),
        resnet_time_scale_shift="scale_shift" if unet.get("scale_shift", True) else "default",
        down_block_types=[ATTENTION_DOWN if attend else DOWN for attend in attends],
        up_block_types=[ATTENTION_UP if attend else UP for attend in reversed(attends)],
    )


def _values(form: Format, name: str, config: Mapping) -> dict[str, Any]:
    """What is read of a JSON, after all else was found to be as required."""
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    for key, value in config.items():
        if key not in {**form.read, **form.required, **form.idle}:
            fix = f"this reads {form.cls} of diffusers 0.42.1; update unclip_jax"
            raise UserError(f"{name}/config.json: {key}={value!r} is a key not known of {form.cls}", fix)
    for key, required in form.required.items():
        value = config.get(key, form.absent.get(key, required))
        if value != required:
            raise _refusal(name, key, value, repr(required))
    return {key: config.get(key, default) for key, default in form.read.items()}


def _json(form: Format, **values) -> dict[str, Any]:
    return {"_class_name": form.cls, **form.idle, **form.required, **values}


def _needs(name: str, model: Mapping, **required) -> None:
    """Raises unless the keywords of a module of ours are such as diffusers' class can express."""
    for key, value in required.items():
        if key in model and model[key] != value:
            what = f"the {name}'s {key}={model[key]!r} must be {value!r} to be written for diffusers"
            raise UserError(what, "export it as a stack of unclip_jax")


def _refusal(name: str, key: str, value: Any, requirement: str) -> UserError:
    what = f"{name}: {key}={value!r} must be {requirement}"
    return UserError(what, f"convert a network of Karlo's form, as in {REPO}")
