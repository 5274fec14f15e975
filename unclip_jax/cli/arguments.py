"""What the commands share: the parser, its kinds of numbers, and the flags that choose a stack and how it samples."""

import argparse
import math
import os
import unicodedata
from pathlib import Path

from unclip_jax.errors import UserError, suggest

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
    sub.set_defaults(run=run)
    return sub


def done(sub: Parser) -> None:
    """Remembers the flags, for suggestions."""
    sub.set_defaults(flags=[flag for action in sub._actions for flag in action.option_strings])


def add_model(sub: Parser) -> None:
    """The flags that `load` reads, but for the settings."""
    sub.add_argument(
        "--model", default="shapes", metavar="NAME|DIR", help="shapes (bundled, the default) or a stack"
    )
    sub.add_argument("--seed", type=seed, default=0, help="0 … 4294967295 (0)")
    sub.add_argument("--batch-size", type=count, default=8, help="pictures drawn at once (8)")
    sub.add_argument("--low-memory", action="store_true", help="one stage's weights on the device at a time")
    sub.add_argument("--overwrite", action="store_true", help="replace what is there")


def add_settings(sub: Parser) -> None:
    """The flags of `pipeline.Settings`."""
    group = sub.add_argument_group("sampling (the default is what each stage's config says)")
    group.add_argument("--prior-steps", type=count, metavar="N", help="steps of the prior")
    group.add_argument("--prior-guidance", type=scale, metavar="S", help="guidance of the prior; 1 is none")
    group.add_argument("--candidates", type=count, metavar="N", help="embeddings to choose the best from")
    group.add_argument("--steps", type=count, metavar="N", help="steps of the decoder")
    group.add_argument("--guidance", type=scale, metavar="S", help="guidance of the decoder; 1 is none")
    group.add_argument("--sampler", metavar="NAME", help="of the decoder: ddpm, ddim, dpm or heun")
    group.add_argument("--upsample-steps", type=count, metavar="N", help="steps of each upsampler")


def load(args):
    """The stack, and the settings that were given; checked as far as can be before the weights are read."""
    import dataclasses

    from unclip_jax.pipeline import Settings, UnCLIP

    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(Settings)}
    settings = {name: value for name, value in given.items() if value is not None}
    Settings(**settings)
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
    for prompt in prompts:
        if not prompt.strip():
            raise UserError(f"prompt {prompt!r} must not be empty", "say what to draw")
        bad = [c for c in prompt if unicodedata.category(c) in ("Cc", "Cs")]
        if bad:
            raise UserError(f"prompt {prompt[:60]!r} holds the control character {bad[0]!r}", "remove it")
    return [prompt.strip() for prompt in prompts]


def _read_prompts(path: str) -> list[str]:
    """The lines of a UTF-8 file that are not blank."""
    try:
        if not os.path.isfile(path):
            raise UserError(
                f"prompt file {path!r} " + ("is no file" if os.path.exists(path) else "does not exist")
            )
        if os.path.getsize(path) > MAX_PROMPT_FILE:
            raise UserError(f"prompt file {path!r} is larger than {MAX_PROMPT_FILE} bytes")
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"prompt file {path!r} is not UTF-8 text ({error.reason} at byte {error.start})",
                        "save it as UTF-8") from error  # fmt: skip
    except (OSError, ValueError) as error:
        raise UserError(f"prompt file {path!r} cannot be read ({error})") from error
    prompts = [line for line in text.split("\n") if line.strip()]
    prompts = [line.removesuffix("\r") for line in prompts]
    if not prompts:
        raise UserError(f"prompt file {path!r} holds no prompt", "write one prompt a line")
    return prompts


def count(text: str) -> int:
    """At least 1."""
    return _number(text, int, 1, 2**31 - 1, "a whole number of at least 1")


def number_from(low: int):
    """A whole number of at least `low`."""
    return lambda text: _number(text, int, low, 2**31 - 1, f"a whole number of at least {low}")


def seed(text: str) -> int:
    """Of the noise and the order of examples."""
    return _number(text, int, 0, 2**32 - 1, "a whole number in 0 … 4294967295")


def scale(text: str) -> float:
    """A guidance."""
    return _number(text, float, 0, 1e6, "a number of at least 0 (1 is no guidance)")


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
