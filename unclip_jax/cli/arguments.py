"""What the commands share: the parser, its kinds of texts and numbers, and the flags of a stack and its sampling."""

import argparse
import math
import unicodedata
from pathlib import Path

from unclip_jax.cli.programs import keep
from unclip_jax.errors import UserError, suggest
from unclip_jax.storage import read_text

MAX_PICTURES = 10_000
MAX_PROMPT_FILE = 16 << 20  # bytes


class Parser(argparse.ArgumentParser):
    """Argparse that raises its complaints."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str):
        raise UserError(message, f"see {self.prog} --help")

    def _check_value(self, action, value):
        if action.choices is not None and value not in action.choices:
            name = "command" if action.option_strings == [] and action.dest in ("command", "what") else None
            name = name or (action.option_strings or [action.dest])[0]
            raise UserError(f"{name} {value!r} is unknown", suggest(value, action.choices))


def command(commands, run, name: str, about: str, **kwargs) -> Parser:
    """A command `name` that runs `run(args)`."""
    sub = commands.add_parser(name, help=about, description=about, **kwargs)
    sub.add_argument("--debug", action="store_true", help="show a traceback on errors")
    sub.set_defaults(run=run, parser=sub)
    return sub


def add_model(sub: Parser) -> None:
    """The flags that `load` reads, but for the settings."""
    sub.add_argument(
        "--model", default="shapes", metavar="NAME|DIR", help="shapes (bundled, the default) or a stack"
    )
    sub.add_argument("--seed", type=seed, default=0, help="0 … 4294967295 (0)")
    sub.add_argument("--batch-size", type=count, default=8, help="pictures drawn at once (8)")
    sub.add_argument("--low-memory", action="store_true", help="one stage's weights on the device at a time")
    sub.add_argument("--overwrite", action="store_true", help="replace what is there")


def add_output(sub: Parser, default: str | None = None, required: bool | None = None) -> None:
    """Where pictures go, and how; required unless there is a default, or as said."""
    about = "folder for the pictures" + (f" (default {default})" if default else "")
    required = default is None if required is None else required
    sub.add_argument("--out", required=required, default=default, metavar="DIR", help=about)
    sub.add_argument("--html", action="store_true", help="write index.html too: all pictures and how they were made")


def add_settings(sub: Parser) -> None:
    """The flags of `settings.Settings`."""
    group = sub.add_argument_group("sampling (the default is what each stage's config says)")
    group.add_argument("--prior", metavar="KIND", help="diffusion (the default where there is one) or ar")
    for prefix, stage in (("prior-", "the prior"), ("", "the decoder"), ("upsample-", "each upsampler")):
        group.add_argument(f"--{prefix}steps", type=count, metavar="N", help=f"steps of {stage}")
        group.add_argument(
            f"--{prefix}sampler", metavar="NAME", help=f"of {stage}: ddpm, analytic, ddim, dpm or heun"
        )
        group.add_argument(
            f"--{prefix}threshold", type=share, metavar="Q", help="dynamic thresholding at this quantile, as 0.995"
        )
        if prefix == "upsample-":
            continue
        group.add_argument(f"--{prefix}guidance", type=scale, metavar="S", help=f"guidance of {stage}; 1 is none")
        group.add_argument(
            f"--{prefix}rescale", type=share, metavar="PHI", help="bring the guided spread back, 0 (none) … 1"
        )
        group.add_argument(
            f"--{prefix}interval", type=pair, metavar="LOW,HIGH", help="guide at these noise levels only, within 0,1"
        )
    group.add_argument("--prior-temperature", type=warmth, metavar="T", help="of the autoregressive prior")
    group.add_argument("--prior-top-p", type=part, metavar="P", help="of the autoregressive prior; 1 is all")
    group.add_argument("--tile", type=count, metavar="N", help="upsample in tiles of N pixels, for little memory")
    group.add_argument("--overlap", type=count, metavar="N", help="of neighbouring tiles, in pixels (a quarter of one)")
    group.add_argument("--candidates", type=count, metavar="N", help="embeddings to choose the best from")


def given_settings(args) -> dict:
    """The settings of sampling that were given as flags, each known to be possible."""
    import dataclasses

    from unclip_jax.settings import Settings

    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(Settings)}
    given = {name: value for name, value in given.items() if value is not None}
    Settings(**given)
    return given


def load(args):
    """The stack, and the settings that were given; checked as far as can be before the weights are read."""
    from unclip_jax.pipeline import UnCLIP

    settings = given_settings(args)
    keep()
    pipe = UnCLIP.load(args.model, low_memory=args.low_memory)
    pipe.settings(**settings)
    return pipe, settings


def prompts_of(args) -> list[str]:
    """The prompts of the command line or of the file, every one known to be drawable."""
    if args.prompts is not None and args.prompt:
        raise UserError("prompts were given both as arguments and by --prompts", "give one of the two")
    if args.prompts is not None:
        prompts = _read_prompts(args.prompts)
    else:
        prompts = args.prompt
    if not prompts:
        raise UserError("no prompt was given", 'write unclip sample "a red circle" --out DIR')
    return [checked_text(prompt) for prompt in prompts]


def checked_text(text: str, what: str = "prompt") -> str:
    """The text without space around it; UserError if nothing is left, or it holds a control character."""
    if not text.strip():
        raise UserError(f"{what} {text!r} must not be empty", "say what to draw" if what == "prompt" else None)
    bad = [c for c in text if unicodedata.category(c) in ("Cc", "Cs")]
    if bad:
        raise UserError(f"{what} {text[:60]!r} holds the control character {bad[0]!r}", "remove it")
    return text.strip()


def _read_prompts(path: str) -> list[str]:
    """The lines of a UTF-8 file that are not blank."""
    text = read_text(Path(path), "a file of prompts", MAX_PROMPT_FILE)
    prompts = [line for line in text.split("\n") if line.strip()]
    prompts = [line.removesuffix("\r") for line in prompts]
    if not prompts:
        raise UserError(f"prompt file {path!r} holds no prompt", "write one prompt a line")
    return prompts


def count(text: str) -> int:
    """At least 1."""
    return _number(text, int, 1, 2**31 - 1, "a whole number in 1 … 2147483647")


def number_from(low: int):
    """A whole number of at least `low`."""
    return lambda text: _number(text, int, low, 2**31 - 1, f"a whole number in {low} … 2147483647")


def seed(text: str) -> int:
    """Of the noise and the order of examples."""
    return _number(text, int, 0, 2**32 - 1, "a whole number in 0 … 4294967295")


def scale(text: str) -> float:
    """A guidance."""
    return _number(text, float, 0, 1e6, "a number in 0 … 1000000 (1 is no guidance)")


def share(text: str) -> float:
    """Within 0 … 1."""
    return _number(text, float, 0, 1, "a number in 0 … 1")


def pair(text: str) -> tuple[float, float]:
    """Two shares with a comma between them."""
    parts = text.split(",")
    if len(parts) != 2:
        raise argparse.ArgumentTypeError(f"{text!r} must be two numbers with a comma between them, such as 0.2,0.8")
    return share(parts[0]), share(parts[1])


def frames(text: str) -> int:
    """Of a way from one picture to another, both counted."""
    return _number(text, int, 2, 1000, "a whole number in 2 … 1000")


def warmth(text: str) -> float:
    """A temperature."""
    return _number(text, float, 0, 100, "a number in 0 … 100 (1 is as learned)")


def part(text: str) -> float:
    """A share that is not nothing."""
    return _number(text, float, 1e-6, 1, "a number in 0 … 1, above 0")


def counts(text: str) -> list[int]:
    """Numbers of at least 1 with commas between them."""
    return [count(one) for one in listed(text)]


def listed(text: str) -> list[str]:
    """Names with commas between them."""
    parts = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not parts:
        raise argparse.ArgumentTypeError(f"{text!r} must be names with commas between them")
    return parts


def _number(text: str, kind, low, high, what: str):
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not low <= value <= high:
        raise argparse.ArgumentTypeError(f"{text!r} must be {what}")
    return value
