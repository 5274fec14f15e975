"""Karlo (Kakao Brain's open unCLIP) in the layout of diffusers' UnCLIPPipeline, in and out.

Karlo's networks are ours with other settings (`karlo_json`) and other names (`karlo_tables`). diffusers 0.42.1 computes
two things otherwise. It masks by adding -1e4, which the softmax rounds to the nothing that it is here. Its tables of
noise levels are float32, ours float64: its last step multiplies x0 by 0.99947, where by its own formula it returns x0,
as ours does.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

import unclip_jax
from unclip_jax import tasks
from unclip_jax.errors import UserError, said_of
from unclip_jax.interop import hf_clip, hf_clip_write, karlo_json
from unclip_jax.interop.files import Source, open_weights, spare_others
from unclip_jax.interop.karlo_tables import TABLES
from unclip_jax.interop.layout import read, views
from unclip_jax.interop.stages import Converted, clip_stage, network_shapes, provenance, stated_licence, whole
from unclip_jax.models.clip import CLIP
from unclip_jax.storage import new_directory, read_json
from unclip_jax.tensors import write_arrays
from unclip_jax.weights import FLOATS, Stage, load_one, tasks_of

OWN = "_unclip_jax"  # the key of a model_index.json of ours; diffusers leaves such with an underscore alone
PARTS = {"prior": ("prior",), "decoder": ("decoder", "text_proj"), "upsampler": ("super_res_first", "super_res_last")}
# Folder of the scheduler, what it predicts, its variance.
SCHEDULERS = {
    "prior": ("prior_scheduler", "sample", "fixed_small_log"),
    "decoder": ("decoder_scheduler", "epsilon", "learned_range"),
    "upsampler": ("super_res_scheduler", "epsilon", "fixed_small_log"),
}
# Karlo's 25 + 25 + 7 steps.
SAMPLERS = {
    "prior": dict(name="ddpm", steps=25, guidance=4.0, candidates=1),
    "decoder": dict(name="ddpm", steps=25, guidance=8.0),
    "upsampler": dict(name="ddpm", steps=7),
}
# Shares dropped in Karlo's training, for training on; and how its schedule is trained.
OBJECTIVES = {
    "prior": dict(text_drop=0.2, empty_caption=True),
    "decoder": dict(target="eps", clip_drop=0.1, text_drop=0.3, vlb_weight=0.001, empty_caption=True),
    "upsampler": dict(target="eps", vlb_weight=0.0, last_steps=1),
}
# What model_index.json calls each part: library, class; as diffusers 0.42.1 writes and finds them.
COMPONENTS = {
    "prior": ("diffusers", "PriorTransformer"),
    "decoder": ("diffusers", "UNet2DConditionModel"),
    "text_proj": ("diffusers.pipelines.deprecated.unclip.text_proj", "UnCLIPTextProjModel"),
    "super_res_first": ("diffusers", "UNet2DModel"),
    "super_res_last": ("diffusers", "UNet2DModel"),
    "text_encoder": ("transformers", "CLIPTextModelWithProjection"),
    "image_encoder": ("transformers", "CLIPVisionModelWithProjection"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "feature_extractor": ("transformers", "CLIPImageProcessor"),
    **{part: ("diffusers", "UnCLIPScheduler") for part, *_ in SCHEDULERS.values()},
}
PLACES = ("clip", "prior_diffusion", "decoder", "upsampler")  # the tasks that a pipeline takes, one stage of each
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"


def read_stack(source: Source, tokenizer: str | None = None) -> Converted:
    """A stack of ours of a whole pipeline's folder, for `convert`; stages are read one by one.

    The CLIP is its text_encoder, with the image_encoder where there is one (UnCLIPImageVariationPipeline).

    Args:
      source: of `files.locate`.
      tokenizer: a folder with CLIP's tokenizer, where the pipeline's has none.
    """
    folder = source.path
    image = folder / "image_encoder"
    halves = (folder / "text_encoder", image if image.is_dir() else None)
    words_at = Path(tokenizer).expanduser() if tokenizer else folder / "tokenizer"
    params, config, words = hf_clip.read_halves(*halves, words_at, folder / "feature_extractor")
    licence = stated_licence(folder, {})
    clip = clip_stage(params, config, source.name, "karlo", licence)
    own = {"clip": "", "clip_identity": clip[3]["clip_identity"]}
    facts = provenance(source.name, "karlo", licence)

    def stages():
        yield "clip", clip
        for name, stage in read_stages(folder):
            yield name, (stage.params, ConfigDict({**stage.config.to_dict(), **own}), 0, facts)

    return Converted(stages(), words.to_json())


def write_stack(stack, out, dtype: str = "float32", overwrite: bool = False) -> Path:
    """A folder that diffusers' UnCLIPPipeline.from_pretrained loads, from a stack of Karlo's kind; returns its path.

    Without a prior it is UnCLIPImageVariationPipeline's.

    Raises:
      UserError: a stage that the pipeline has no place for or cannot express, or `out` exists; nothing is written then.
    """
    out = Path(out).expanduser().resolve()
    spare_others(out, "model_index.json", OWN, overwrite)
    names = {}
    for name, task in tasks_of(stack).items():
        names.setdefault(task, name)
    with new_directory(out, "pipeline of diffusers", "model_index.json", overwrite) as folder:
        words, (params, config, _, _) = load_one(stack, names.get("clip", "clip"))
        parts = hf_clip_write.write_halves(folder, params, config, words, dtype)
        del params
        _check_places(names, tasks_of(stack), config)
        for name, task in (("prior", "prior_diffusion"), ("decoder", "decoder"), ("upsampler", "upsampler")):
            if task in names:
                _write_stage(name, load_one(stack, names[task])[1], folder, np.dtype(FLOATS[dtype]))
                parts += [*PARTS[name], SCHEDULERS[name][0]]
        index = {"_class_name": "UnCLIPPipeline" if "prior" in parts else "UnCLIPImageVariationPipeline"}
        classes = {part: COMPONENTS[part] for part in parts if part in COMPONENTS and not (
            index["_class_name"] == "UnCLIPPipeline" and part in ("image_encoder", "feature_extractor"))}
        index |= {OWN: unclip_jax.__version__, **classes}
        (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return out


def read_stages(folder: Path) -> Iterator[tuple[str, Stage]]:
    """Pairs (name, stage) of "prior", "decoder" and "upsampler", one by one; one whose parts are absent is left out.

    Args:
      folder: of UnCLIPPipeline, or of UnCLIPImageVariationPipeline, which has no prior.

    Raises:
      UserError: a network that ours cannot express, or arrays that are not its.
    """
    for name, parts in PARTS.items():
        if not all((folder / part / "config.json").is_file() for part in parts):
            continue
        with said_of(f"the configs of the {name} in {folder} make no network", "copy Karlo's own"):
            config, clip = _READ[name](folder)
            shapes, arrays = network_shapes(config, clip), {}
        for part, table in TABLES[name](shapes).items():
            with open_weights(folder / part) as weights:
                own = {entry.path: shapes[entry.path] for entry in table}
                arrays |= read(table, own, weights.names, weights.take)
        yield name, Stage(unflatten_dict(arrays, sep="/"), config, 0, {})


def _check_places(names: Mapping[str, str], stages: Mapping[str, str], clip: ConfigDict) -> None:
    """Raises unless the pipeline takes every stage, of which `names` has the first of each task, and all it needs."""
    for name, task in stages.items():
        if names[task] != name or task not in PLACES:
            what = f"the stack's {name} has no place in a pipeline of diffusers, which takes one each of"
            raise UserError(f"{what} {', '.join(PLACES)}", "collect the stack without it, by `unclip export`")
    for task in ("decoder", "upsampler"):
        if task not in names:
            what = f"the stack has no {task}, without which diffusers loads no pipeline"
            raise UserError(what, "collect the stack with one, by `unclip export`")
    if "prior_diffusion" not in names and clip.model.vision is None:
        what = "a stack without a prior is written as UnCLIPImageVariationPipeline, whose CLIP must have an image tower"
        raise UserError(what, "collect the stack with a prior, or with a CLIP that has one, by `unclip export`")


def _write_stage(name: str, stage: Stage, folder: Path, dtype: np.dtype) -> None:
    """One stage's JSON files and arrays, all in `dtype`: of a mixture diffusers would cast some alone."""
    ours = {path: np.asarray(a) for path, a in flatten_dict(stage.params, sep="/").items()}
    for path, content in _WRITE[name](stage.config, ours).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for part, table in TABLES[name]({path: a.shape for path, a in ours.items()}).items():
        arrays = views(table, ours)
        write_arrays(folder / part / WEIGHTS_FILE, arrays, dict.fromkeys(arrays, dtype), {"format": "pt"})


# Each reader gives a stage's config and what its network takes of the CLIP, as `network_shapes` wants them.


def _read_prior(folder: Path) -> tuple[ConfigDict, CLIP]:
    model = karlo_json.prior(read_json(folder / "prior/config.json"))
    block = {"caption": "states", **{k: model[k] for k in ("width", "layers", "heads")}}
    diffusion, clip_x0 = _scheduler(folder, "prior")
    clip = _clip(model["embed_dim"], model["max_len"])
    return _config("prior", "prior_diffusion", block, diffusion, clip_x0=clip_x0), clip


def _read_decoder(folder: Path) -> tuple[ConfigDict, CLIP]:
    model, size = karlo_json.decoder(*(read_json(folder / part / "config.json") for part in PARTS["decoder"]))
    block = {**_without(model, "embed_dim"), "unet": _without(model["unet"], "out_channels")}
    diffusion = _scheduler_of_images(folder, "decoder")
    return _config("decoder", "decoder", block, diffusion, size, image_size=size), _clip(model["embed_dim"])


def _read_upsampler(folder: Path) -> tuple[ConfigDict, None]:
    first, last = (read_json(folder / part / "config.json") for part in PARTS["upsampler"])
    model, size = karlo_json.upsampler(first, last)
    factor = 4
    if (folder / "decoder/config.json").is_file():
        factor = size // whole(read_json(folder / "decoder/config.json"), "sample_size", "decoder")
    diffusion, block = _scheduler_of_images(folder, "upsampler"), _without(model, "out_channels")
    return _config("upsampler", "upsampler", block, diffusion, size, factor=factor), None


def _clip(width: int, max_len: int = 1) -> CLIP:
    """A CLIP whose embeddings and text states are of that width, as Karlo's; the decoder asks for no caption length."""
    return CLIP(width, None, {"vocab_size": 0, "max_len": max_len, "width": width})


def _config(name: str, task: str, model: Mapping, diffusion: Mapping, size: int = 64, **objective) -> ConfigDict:
    return ConfigDict(
        dict(
            task=task,
            model=dict(model),
            diffusion=dict(diffusion),
            objective={**OBJECTIVES[name], **objective},
            sampler=SAMPLERS[name],
            data=dict(size=size),
        )
    )


def _scheduler(folder: Path, name: str) -> tuple[dict[str, Any], float]:
    """The stage's `diffusion` block, and the bound of x0."""
    part, prediction, variance = SCHEDULERS[name]
    config = read_json(folder / part / "scheduler_config.json")
    steps, clip_x0 = karlo_json.scheduler(part, config, prediction, variance)
    return dict(name="cosine", num_steps=steps), clip_x0


def _scheduler_of_images(folder: Path, name: str) -> dict[str, Any]:
    diffusion, clip_x0 = _scheduler(folder, name)
    if clip_x0 != 1:
        what = f"{SCHEDULERS[name][0]}: clip_sample_range={clip_x0} must be 1.0, as images are in [-1, 1]"
        raise UserError(what, "convert a stack whose images are scaled so")
    return diffusion


def _without(block: Mapping, key: str) -> dict[str, Any]:
    return {k: v for k, v in block.items() if k != key}


def _write_prior(config: ConfigDict, arrays: Mapping[str, np.ndarray]) -> dict[str, dict]:
    block = config.model.to_dict()
    if block.pop("caption") != "states" or not config.objective.get("empty_caption"):
        what = "the prior must read CLIP's text states and drop captions by the empty one, to be written for diffusers"
        raise UserError(what, "train it with configs/karlo/prior_diffusion.py")
    max_len = len(arrays["net/position"]) - karlo_json.PRIOR_EXTRA
    model = {**block, "embed_dim": len(arrays["mean"]), "max_len": max_len}
    return {"prior/config.json": karlo_json.prior_json(model), **_write_scheduler("prior", config)}


def _write_decoder(config: ConfigDict, arrays: Mapping[str, np.ndarray]) -> dict[str, dict]:
    if config.objective.get("inpaint"):
        raise UserError("a decoder with channels for inpainting cannot be written for diffusers", "export one without")
    if not config.objective.get("empty_caption"):
        what = "the decoder must drop captions by the empty one, to be written for diffusers, whose guidance is from it"
        raise UserError(what, "train it with configs/karlo/decoder.py")
    model = {**config.model.to_dict(), "embed_dim": len(arrays.get("null_image", ()))}
    model["unet"]["out_channels"] = arrays["net/out/bias"].shape[0]
    size = config.objective.get("image_size", config.data.size)
    decoder, text_proj = karlo_json.decoder_json(model, size)
    jsons = {"decoder/config.json": decoder, "text_proj/config.json": text_proj}
    return {**jsons, **_write_scheduler("decoder", config)}


def _write_upsampler(config: ConfigDict, arrays: Mapping[str, np.ndarray]) -> dict[str, dict]:
    if config.objective.get("last_steps") != 1:
        what = "the upsampler must have a second network for its last step, to be written for diffusers"
        raise UserError(what, "export it as a stack of unclip_jax")
    enlarge = config.objective.get("enlarge", tasks.TASKS[config.task].enlarge)
    if enlarge != "bicubic":
        what = f"the upsampler's objective.enlarge={enlarge!r} must be 'bicubic' to be written for diffusers"
        raise UserError(what, "export it as a stack of unclip_jax")
    model = {**config.model.to_dict(), "out_channels": arrays["net/out/bias"].shape[0]}
    config_json = karlo_json.upsampler_json(model, config.data.size)
    parts = {f"{part}/config.json": config_json for part in PARTS["upsampler"]}
    return {**parts, **_write_scheduler("upsampler", config)}


def _write_scheduler(name: str, config: ConfigDict) -> dict[str, dict]:
    part, prediction, variance = SCHEDULERS[name]
    task, objective, fix = tasks.TASKS[config.task], config.objective, "export it as a stack of unclip_jax"
    target = objective.get("target", getattr(task, "target", "x0"))
    if config.diffusion.name != "cosine" or target != {"sample": "x0", "epsilon": "eps"}[prediction]:
        what = f"the {name} has the schedule {config.diffusion.name} and the target {target}; diffusers' is for cosine"
        raise UserError(f"{what} and {prediction}", fix)
    shift = config.diffusion.get("shift", 1.0)
    if shift != 1:
        raise UserError(f"the {name}'s diffusion.shift={shift} must be 1, as diffusers shifts no schedule", fix)
    bound = objective.get("clip_x0", getattr(task, "clip_x0", 1.0))
    if bound is None:
        raise UserError(f"the {name}'s objective.clip_x0=None must be a number", "set one, Karlo's is 5.0")
    content = karlo_json.scheduler_json(config.diffusion.num_steps, bound, prediction, variance)
    return {f"{part}/scheduler_config.json": content}


_READ = {"prior": _read_prior, "decoder": _read_decoder, "upsampler": _read_upsampler}
_WRITE = {"prior": _write_prior, "decoder": _write_decoder, "upsampler": _write_upsampler}
