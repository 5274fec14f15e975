"""The `unclip` command: parse, check, call, print. Whatever is slow to import is imported where it is used.

A mistake in what was typed is one line on stderr, `error: …`, exit code 2, and nothing is written. A program
error is one line and exit code 1 (`--debug` shows where). Ctrl-C is exit code 130.
"""

import argparse
import math
import os
import sys
import unicodedata
import warnings
from pathlib import Path

import unclip_jax
from unclip_jax.errors import UserError, suggest

MAX_PICTURES = 10_000
MAX_PROMPT_FILE = 16 << 20  # bytes
DEMO = (
    "a red circle",
    "a large green star on a black background",
    "a small yellow ring in the top left corner",
    "a purple square in the middle on a beige background",
    "a red circle above a blue square",
    "a cyan cross to the left of an orange triangle",
    "two yellow stars side by side",
    "a blue ring, a green square and a red triangle",
    "a red star on a white background",
    "a blue circle to the right of a purple ring",
)


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    debug = "--debug" in argv
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default", UserWarning)
            warnings.showwarning = lambda message, *_, **__: _say(f"warning: {message}")
            args = parse(argv)
            return args.run(args) or 0
    except KeyboardInterrupt:
        _say("interrupted")
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except UserError as error:
        if debug:
            raise
        _say(f"error: {error}")
        return 2
    except Exception as error:
        if debug:
            raise
        what = f"{type(error).__name__}: {error}"
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in what:
            _say("error: not enough memory. Fix: give a smaller --batch-size, or add --low-memory")
            return 2
        _say(f"error: internal error, {what[:300]}. Fix: run again with --debug, and report what it shows")
        return 1


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments, with `run` the function for them; UserError for what is unknown or out of range."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    overrides = [a for a in rest if a.startswith("--config.")] if args.run is train else []
    unknown = [a for a in rest if a not in overrides]
    if unknown and overrides and not unknown[0].startswith("-"):
        raise UserError(f"argument {unknown[0]!r} has no flag", "write an override as --config.key=value")
    if unknown:
        flags = args.flags if unknown[0].startswith("-") else ()
        name = unknown[0].split("=")[0]
        raise UserError(
            f"unknown argument {name!r}", suggest(name, flags) if flags else "put texts in quotes"
        )
    args.overrides = [a.removeprefix("--config.") for a in overrides]
    return args


class _Parser(argparse.ArgumentParser):
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


def _parser() -> _Parser:
    parser = _Parser(prog="unclip", description="DALL-E 2 (unCLIP) in JAX: train, sample, evaluate.")
    parser.add_argument("--version", action="version", version=f"unclip_jax {unclip_jax.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (_add_train, _add_sample, _add_demo, _add_evaluate, _add_export, _add_convert, _add_data):
        add(commands)
    return parser


def _command(commands, run, name: str, about: str, **kwargs) -> _Parser:
    sub = commands.add_parser(name, help=about, description=about, **kwargs)
    sub.add_argument("--debug", action="store_true", help="show a traceback on errors")
    sub.set_defaults(run=run)
    return sub


def _done(sub: _Parser) -> None:
    """Remembers the flags, for suggestions."""
    sub.set_defaults(flags=[flag for action in sub._actions for flag in action.option_strings])


def _add_train(commands) -> None:
    sub = _command(commands, train, "train", "Train one stage, or go on with it.",
                   epilog="Any number of --config.key=value change the config.")  # fmt: skip
    sub.add_argument(
        "--config", required=True, metavar="FILE[:VARIANT]", help="such as configs/shapes/clip.py"
    )
    sub.add_argument(
        "--workdir", required=True, metavar="DIR", help="of the run; a run in it is gone on with"
    )
    _done(sub)


def _add_sample(commands) -> None:
    sub = _command(commands, sample, "sample", "Draw pictures of prompts.")
    sub.add_argument("prompt", nargs="*", help="one or more texts, each in quotes")
    sub.add_argument("--prompts", metavar="FILE", help="a text file with one prompt a line")
    sub.add_argument("--out", required=True, metavar="DIR", help="folder for the pictures")
    sub.add_argument("--num", type=_count, default=4, help="pictures of each prompt (default 4)")
    _add_model(sub)
    _add_settings(sub)
    _done(sub)


def _add_demo(commands) -> None:
    sub = _command(commands, demo, "demo", f"Draw 4 pictures of each of {len(DEMO)} prompts.")
    sub.add_argument(
        "--out", default="out/demo", metavar="DIR", help="folder for the pictures (default out/demo)"
    )
    sub.add_argument("--num", type=_count, default=4, help=argparse.SUPPRESS)
    _add_model(sub)
    _add_settings(sub)
    sub.set_defaults(prompt=list(DEMO), prompts=None, overwrite=True)
    _done(sub)


def _add_evaluate(commands) -> None:
    sub = _command(commands, evaluate, "evaluate", "Measure a stack's pictures, or one trained stage.")
    sub.add_argument(
        "--checkpoint", metavar="WORKDIR", help="measure one stage's own metrics on held-out data"
    )
    sub.add_argument("--metrics", type=_listed, default=["shapes_oracle"], help="shapes_oracle (the default)")
    sub.add_argument(
        "--num", type=_count, default=200, help="prompts of each kind, or held-out examples (200)"
    )
    sub.add_argument(
        "--num-objects", type=_listed, default=["one", "two"], help="one,two (the default), or one of them"
    )
    sub.add_argument(
        "--base", action="store_true", help="judge the decoder's pictures, without the upsampler"
    )
    sub.add_argument("--out", metavar="FILE.json", help="write the numbers")
    sub.add_argument("--sheet", metavar="FILE.png", help="write a contact sheet with verdicts")
    _add_model(sub)
    _add_settings(sub)
    _done(sub)


def _add_export(commands) -> None:
    sub = _command(commands, export, "export", "Collect trained stages into one directory to sample from.")
    for name in ("clip", "prior", "decoder"):
        sub.add_argument(f"--{name}", required=True, metavar="DIR", help="workdir of its run, or a stack")
    sub.add_argument("--upsampler", action="append", default=[], metavar="DIR", help="alike; may be given again")
    sub.add_argument("out", metavar="OUT", help="the directory to make")
    sub.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    sub.add_argument("--overwrite", action="store_true", help="replace the stack that is there")
    _done(sub)


def _add_convert(commands) -> None:
    sub = _command(commands, convert, "convert", "Make a stack of public weights, or the other way round.")
    way = sub.add_mutually_exclusive_group(required=True)
    way.add_argument("--from", dest="origin", metavar="FORMAT", help="of PATH: hf-clip, open-clip or karlo")
    way.add_argument("--to", dest="target", metavar="FORMAT", help="to make of the stack PATH: hf-clip or karlo")
    sub.add_argument("path", metavar="PATH", help="a directory or file of weights, a hub's org/name, or a stack")
    sub.add_argument("out", metavar="OUT", help="the directory to make")
    sub.add_argument("--tokenizer", metavar="DIR", help="CLIP's, where there is none beside the weights")
    sub.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of what is written")
    sub.add_argument("--overwrite", action="store_true", help="replace what such a command made there")
    _done(sub)


def _add_data(commands) -> None:
    sub = commands.add_parser("data", help="Look at data sets.")
    what = sub.add_subparsers(dest="what", required=True, metavar="COMMAND")
    show = _command(what, data_show, "show", "Write a contact sheet of pictures with their captions.")
    show.add_argument("source", help="shapes, icons or folder")
    show.add_argument("--split", default="train")
    show.add_argument("--size", type=_count, default=64, help="side of the pictures in pixels (64)")
    show.add_argument("--num", type=_count, default=24, help="how many (24)")
    show.add_argument("--cols", type=_count, default=6, help="pictures a row (6)")
    show.add_argument("--seed", type=_seed, default=0)
    show.add_argument("--path", metavar="DIR", help="of the source 'folder'")
    show.add_argument("--out", required=True, metavar="FILE.png")
    show.add_argument("--overwrite", action="store_true", help="replace what is there")
    _done(show)


def _add_model(sub: _Parser) -> None:
    sub.add_argument(
        "--model", default="shapes", metavar="NAME|DIR", help="shapes (bundled, the default) or a stack"
    )
    sub.add_argument("--seed", type=_seed, default=0, help="0 … 4294967295 (0)")
    sub.add_argument("--batch-size", type=_count, default=8, help="pictures drawn at once (8)")
    sub.add_argument("--low-memory", action="store_true", help="one stage's weights on the device at a time")
    sub.add_argument("--overwrite", action="store_true", help="replace what is there")


def _add_settings(sub: _Parser) -> None:
    group = sub.add_argument_group("sampling (the default is what each stage's config says)")
    group.add_argument("--prior-steps", type=_count, metavar="N", help="steps of the prior")
    group.add_argument("--prior-guidance", type=_scale, metavar="S", help="guidance of the prior; 1 is none")
    group.add_argument("--candidates", type=_count, metavar="N", help="embeddings to choose the best from")
    group.add_argument("--steps", type=_count, metavar="N", help="steps of the decoder")
    group.add_argument("--guidance", type=_scale, metavar="S", help="guidance of the decoder; 1 is none")
    group.add_argument("--sampler", metavar="NAME", help="of the decoder: ddpm, ddim, dpm or heun")
    group.add_argument("--upsample-steps", type=_count, metavar="N", help="steps of each upsampler")


def train(args) -> int:
    """Trains one stage; 0, or 75 when it was stopped and saved."""
    from unclip_jax.config import load_config

    config = load_config(args.config, args.overrides)
    from unclip_jax.train import train as run

    return run(config, args.workdir)


def sample(args) -> None:
    """Draws the prompts' pictures into a folder."""
    from unclip_jax import gallery

    prompts = _prompts(args)
    if len(prompts) * args.num > MAX_PICTURES:
        raise UserError(f"{len(prompts)} prompts x {args.num} are more than {MAX_PICTURES} pictures",
                        "draw them in several calls")  # fmt: skip
    out = gallery.check_folder(args.out, args.overwrite)
    pipe, settings = _load(args)
    facts = {"seed": args.seed, "model": Path(args.model).name, "settings": pipe.settings(**settings)}
    images = pipe.generate(prompts, args.seed, num=args.num, batch_size=args.batch_size, **settings)
    gallery.write(out, images, prompts, facts)
    height, width = images.shape[1:3]
    print(
        f"{len(images)} pictures of {height} x {width} pixels in {out}; all of them in {out / gallery.GRID}"
    )


def demo(args) -> None:
    """`sample` with prompts of its own, into a folder that it may fill again."""
    sample(args)


def evaluate(args) -> None:
    """Prints, and on request writes, a stack's alignment or a stage's metrics."""
    import json

    from unclip_jax import evaluate as measure
    from unclip_jax import gallery

    for flag, names, known in (
        ("metrics", args.metrics, measure.METRICS),
        ("num-objects", args.num_objects, measure.OBJECTS),
    ):
        for name in names:
            if name not in known:
                raise UserError(f"{flag}={name!r} is unknown", suggest(name, known))
    if args.checkpoint is not None and args.sheet is not None:
        raise UserError(
            "--sheet is for a stack's pictures, --checkpoint for one stage", "leave out one of them"
        )
    report_file = gallery.check_file(args.out, ".json", args.overwrite) if args.out is not None else None
    sheet_file = gallery.check_file(args.sheet, ".png", args.overwrite) if args.sheet is not None else None
    if args.checkpoint is not None:
        report = measure.stage(args.checkpoint, args.num, args.seed)
        print(f"{report['task']} at step {report['step']}, {report['n']} examples of '{report['split']}'")
        print("\n".join(f"{name:32} {value:.6g}" for name, value in report["metrics"].items()))
    else:
        report, seen = _alignment(args, measure)
        print(measure.table(report["results"]))
        if sheet_file:
            gallery.write_image(sheet_file, measure.sheet(seen))
    if report_file:
        report = {"unclip_jax": unclip_jax.__version__, **report}
        gallery.write_text(report_file, json.dumps(report, indent=2) + "\n")


def _alignment(args, measure) -> tuple[dict, dict]:
    """The report of a stack's pictures, and the pictures."""
    pipe, settings = _load(args)
    pipe = pipe.without_upsamplers() if args.base else pipe

    def draw(prompts):
        return pipe.generate(prompts, args.seed, batch_size=args.batch_size, **settings)

    rows, seen = measure.alignment(draw, args.num, args.seed, args.num_objects)
    facts = {"metric": "shapes_oracle", "model": Path(args.model).name, "seed": args.seed, "num": args.num}
    return {**facts, "pixels": pipe.size, "settings": pipe.settings(**settings), "results": rows}, seen


def export(args) -> None:
    """Makes a stack of workdirs."""
    from unclip_jax import gallery

    gallery.check_folder(args.out, overwrite=True)
    from unclip_jax.export import collect

    out = collect(args.out, args.clip, args.prior, args.decoder, args.upsampler, args.dtype, args.overwrite)
    size = sum(file.stat().st_size for file in out.iterdir())
    print(f"{out}: {size / 1e6:.1f} MB")
    print(f'draw with: unclip sample "a red circle" --model {args.out} --out out/sample')


def convert(args) -> None:
    """Makes a stack of others' weights, or weights for others of a stack."""
    from unclip_jax.interop import convert as formats

    if args.target:
        if args.tokenizer:
            raise UserError("--tokenizer is for --from; a stack has its own", "leave it out")
        out = formats.convert_out(args.target, args.path, args.out, args.dtype, args.overwrite)
    else:
        out = formats.convert_in(args.origin, args.path, args.out, args.tokenizer, args.dtype, args.overwrite)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(f"{out}: {size / 1e6:.1f} MB")


def data_show(args) -> None:
    """Writes a contact sheet of a data source."""
    from unclip_jax import gallery

    out = gallery.check_file(args.out, ".png", args.overwrite)
    if args.num > MAX_PICTURES:
        raise UserError(f"num={args.num} must be at most {MAX_PICTURES}")
    from unclip_jax import data
    from unclip_jax.data.show import contact_sheet

    extra = {} if args.path is None else {"path": args.path}
    source = data.make(args.source, args.split, size=args.size, seed=args.seed, **extra)
    out.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(source, args.num, args.cols, out)
    print(f"{min(args.num, len(source))} of {len(source)} records of '{source.name}' in {out}")


def _load(args):
    """The stack, and the settings that were given; checked as far as can be before the weights are read."""
    import dataclasses

    from unclip_jax.pipeline import Settings, UnCLIP

    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(Settings)}
    settings = {name: value for name, value in given.items() if value is not None}
    Settings(**settings)
    pipe = UnCLIP.load(args.model, low_memory=args.low_memory)
    pipe.settings(**settings)
    return pipe, settings


def _prompts(args) -> list[str]:
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


def _count(text: str) -> int:
    return _number(text, int, 1, 2**31 - 1, "a whole number of at least 1")


def _seed(text: str) -> int:
    return _number(text, int, 0, 2**32 - 1, "a whole number in 0 … 4294967295")


def _scale(text: str) -> float:
    return _number(text, float, 0, 1e6, "a number of at least 0 (1 is no guidance)")


def _number(text: str, kind, low, high, what: str):
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not low <= value <= high:
        raise argparse.ArgumentTypeError(f"{text!r} must be {what}")
    return value


def _listed(text: str) -> list[str]:
    parts = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not parts:
        raise argparse.ArgumentTypeError(f"{text!r} must be names with commas between them")
    return parts


def _say(text: str) -> None:
    """One line on stderr, whatever the text holds."""
    print("".join(c if c.isprintable() else " " for c in text), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
