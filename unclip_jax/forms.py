"""The tabs of the web page (`ui`) over a stack: their fields, and what is drawn from the values in them."""

import dataclasses
import io
import re
import secrets
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from unclip_jax.data.images import decode_image
from unclip_jax.edits import TEXT_GUIDANCE
from unclip_jax.errors import UserError, is_number, is_whole
from unclip_jax.pipeline import UnCLIP
from unclip_jax.settings import PRIORS, SETTINGS, Settings

MOST = {"num": 64, "frames": 64, "batch_size": 64, "candidates": 1024}
MAX_TEXT = 10_000  # characters
SURROGATE = re.compile("[\ud800-\udfff]")
UPLOADED = dict(type="filepath", image_mode=None, sources=["upload", "clipboard"], height=240)
UPLOAD = ("Image", dict(label="picture", **UPLOADED))
NUM = ("Slider", dict(label="pictures of each", minimum=1, maximum=16, step=1, value=4))
FRAMES = ("Slider", dict(label="frames, both ends counted", minimum=2, maximum=MOST["frames"], step=1, value=9))
PICTURES = ("Image", "ImageEditor")
CANVAS = dict(label="paint over what is to be drawn anew", transforms=(), sources=["upload", "clipboard"])
# {tab: {field: (component of gradio, its keywords)}}
TABS = {
    "Prompts": {"prompts": ("Textbox", dict(label="prompts, one a line", lines=4, value="a red circle")), "num": NUM},
    "Variations": {
        "image": UPLOAD,
        "eta": ("Slider", dict(label="chance in each step; 0 is the picture", minimum=0, maximum=1, value=0.5)),
        "white_noise": ("Checkbox", dict(label="keep what CLIP sees and nothing else")),
        "num": NUM,
    },
    "Blend": {
        "image": ("Image", dict(label="from a picture", **UPLOADED)),
        "prompt": ("Textbox", dict(label="or from a prompt")),
        "to_image": ("Image", dict(label="to a picture", **UPLOADED)),
        "to_prompt": ("Textbox", dict(label="or to a prompt")),
        "frames": FRAMES,
    },
    "Edit": {
        "image": UPLOAD,
        "source": ("Textbox", dict(label="what the picture shows, as: red")),
        "target": ("Textbox", dict(label="what it should show, as: green")),
        "theta": ("Slider", dict(label="how far at the last frame", minimum=0, maximum=1, value=0.5)),
        "frames": FRAMES,
    },
    "Inpaint": {
        "canvas": ("ImageEditor", CANVAS),
        "prompt": ("Textbox", dict(label="what the whole picture is to show")),
        "strength": ("Slider", dict(label="below 1: begin from the picture", minimum=0.05, maximum=1, value=1)),
        "num": NUM,
    },
}
COMMON = {
    "seed": ("Number", dict(label="seed", value=None, placeholder="another each time")),
    "batch_size": ("Number", dict(label="pictures drawn at once", value=8)),
}


def tabs(pipe: UnCLIP) -> dict[str, dict]:
    """Those of TABS that a stack can do, without the fields that are of no use to it."""
    clip, prior = "clip" in pipe.tasks, bool(_priors(pipe))
    looks = clip and pipe.tasks["clip"].model.vision is not None
    can = dict(Prompts=pipe.prompted, Variations=looks, Blend=looks or prior, Edit=looks)
    can["Inpaint"] = looks or pipe.prompted
    useless = set() if looks else {"image", "to_image"}
    useless |= set() if pipe.prompted else {"prompt", "to_prompt"}
    return {tab: {f: TABS[tab][f] for f in TABS[tab] if f not in useless} | COMMON for tab in TABS if can[tab]}


def offered(pipe: UnCLIP, tab: str) -> dict:
    """{setting that a tab takes: what the stack draws with where none is given}."""
    kinds = [] if tab in ("Variations", "Edit") else _priors(pipe)
    if tab in ("Prompts", "Inpaint"):
        used = pipe.settings() if tab == "Prompts" else pipe.painting_settings({}, bool(kinds))
    else:
        used = pipe.exact_settings({}, TEXT_GUIDANCE if tab == "Edit" else 1.0)
    defaults = {"prior": kinds[0]} if len(kinds) > 1 else {}
    for stage in [*(PRIORS[kind] for kind in kinds), "decoder", *pipe.upsamplers]:
        for key, name in SETTINGS["upsampler" if stage in pipe.upsamplers else stage].items():
            defaults.setdefault(name, used.get(stage, pipe.configs[stage].sampler).get(key))
    return defaults


def _priors(pipe: UnCLIP) -> list[str]:
    """Those of PRIORS that the stack has, the first being what it draws with."""
    return [kind for kind, stage in PRIORS.items() if stage in pipe.tasks]


def given(values: Mapping) -> dict:
    """The settings among a form's values, each known to be possible; what is empty is not given."""
    kinds = {field.name: str(field.type).split(" | ")[0] for field in dataclasses.fields(Settings)}
    chosen = {name: value for name, value in values.items() if name in kinds and value not in (None, "")}
    for name, value in chosen.items():
        if kinds[name].startswith("tuple"):
            try:
                chosen[name] = tuple(map(float, str(value).split(",")))
            except ValueError:
                what = f"{name}={value!r} must be two numbers with a comma between them"
                raise UserError(what, "write it like 0.2,0.8") from None
        elif kinds[name] == "int":
            chosen[name] = _whole(value)
    _bounded(chosen)
    Settings(**chosen)
    return chosen


def draw(pipe: UnCLIP, tab: str, values: Mapping) -> tuple[list[tuple[np.ndarray, str]], dict]:
    """What a tab's form asks for: ([(u8[H, W, 3], what it shows), …], {"seed": …, …} with which to have it again).

    Raises:
      UserError: a value that is missing or out of its range, or more than one drawing may be.
    """
    form = {name: _whole(value) for name, value in values.items() if name in {**TABS[tab], **COMMON}}
    form["seed"] = secrets.randbelow(2**32) if form["seed"] in (None, "") else form["seed"]
    _bounded(form)
    if any(isinstance(value, str) and len(value) > MAX_TEXT for value in form.values()):
        raise UserError(f"a text has more than {MAX_TEXT} characters", "shorten it")
    if any(isinstance(value, str) and SURROGATE.search(value) for value in form.values()):
        raise UserError("a text holds half of a surrogate pair, which is no text", "write it anew")
    settings = given(values)
    more = {"seed": form["seed"], "batch_size": form["batch_size"], **settings}
    images, labels = DRAW[tab](pipe, form, more)
    asked = {name: form[name] for name in TABS[tab] if name in form and TABS[tab][name][0] not in PICTURES}
    return list(zip(images, labels, strict=True)), {**asked, "seed": form["seed"], "settings": settings}


def _prompts(pipe, form, more):
    prompts = [line.strip() for line in (form["prompts"] or "").splitlines() if line.strip()]
    if not prompts:
        raise UserError("no prompt was given", "write one a line")
    _bounded({"num": len(prompts) * form["num"]}, "prompts by pictures of each")
    return pipe.generate(prompts, num=form["num"], **more), [p for p in prompts for _ in range(form["num"])]


def _vary(pipe, form, more):
    _fraction(form, "eta")
    eta = None if form["white_noise"] else form["eta"]
    label = "white noise" if eta is None else f"eta {eta:g}"
    return pipe.variations([_picture(form["image"])], num=form["num"], eta=eta, **more), [label] * form["num"]


def _blend(pipe, form, more):
    ends = [(form.get(f"{to}image"), (form.get(f"{to}prompt") or "").strip()) for to in ("", "to_")]
    if any(bool(path) == bool(prompt) for path, prompt in ends):
        raise UserError("each end of a blend must be one picture or one prompt", "give one of the two")
    frames, inputs = form["frames"], [_picture(path) if path else prompt for path, prompt in ends]
    return pipe.interpolate(inputs, frames, **more), [f"{k / max(1, frames - 1):.2f}" for k in range(frames)]


def _edit(pipe, form, more):
    _fraction(form, "theta")
    thetas = np.linspace(0, form["theta"], form["frames"]).round(6).tolist()
    texts = [(form[name] or "").strip() for name in ("source", "target")]
    images = pipe.text_diff([_picture(form["image"])], *texts, thetas, **more)
    return images, [f"theta {theta:.2f}" for theta in thetas]


def _inpaint(pipe, form, more):
    canvas = form["canvas"] or {}
    if not canvas.get("background"):
        raise UserError("no picture was given", "put one into the field, and paint over a part of it")
    image, layers = _picture(canvas["background"]), [_painted(layer) for layer in canvas["layers"] if layer]
    if any(layer.shape != image.shape[:2] for layer in layers):
        raise UserError("what was painted is not of the picture's size", "put the picture into the field once more")
    marked = [layer for layer in layers if layer.any()]
    if not marked and form["strength"] == 1:
        raise UserError("nothing is painted over", "mark what is to be drawn anew, or lower the strength")
    holes = [np.any(marked, axis=0)] if marked else None
    prompt = (form.get("prompt") or "").strip()
    prompts, own = [prompt] if prompt else None, ("strength", "num")
    painted = pipe.inpaint([image], holes, prompts, **{name: form[name] for name in own}, **more)
    return painted, [prompt or "as it is"] * form["num"]


DRAW = {"Prompts": _prompts, "Variations": _vary, "Blend": _blend, "Edit": _edit, "Inpaint": _inpaint}


def _picture(upload: str | bytes | None) -> np.ndarray:
    """An uploaded file, its path or what is in it, as u8[h, w, 3]."""
    if not upload:
        raise UserError("no picture was given", "put one into the field")
    return np.asarray(decode_image(_content(upload), "the picture" if isinstance(upload, bytes) else Path(upload).name))


def _painted(layer: str | bytes) -> np.ndarray:
    """Where a canvas's layer was painted on, as bool[h, w]."""
    _picture(layer)  # tells what is none
    with Image.open(io.BytesIO(_content(layer))) as image:
        return np.asarray(image.convert("RGBA"))[..., 3] > 0


def _content(upload: str | bytes) -> bytes:
    return upload if isinstance(upload, bytes) else Path(upload).read_bytes()


def _fraction(form: Mapping, name: str) -> None:
    """Raises UserError for what is not in 0 … 1, as what a slider's emptied box holds."""
    if not is_number(form[name], 0, 1):
        raise UserError(f"{name}={form[name]!r} must be a number in 0 … 1")


def _whole(value):
    """A whole number as int, for a page has one kind of numbers alone; others as they are."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _bounded(values: Mapping, what: str = "") -> None:
    """Raises UserError for a number that is too large to be meant."""
    for name in [name for name in MOST if name in values]:
        if not is_whole(values[name], 1, MOST[name]):
            raise UserError(f"{what or name}={values[name]!r} must be a whole number in 1 … {MOST[name]}")
