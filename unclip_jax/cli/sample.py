"""`unclip sample`, and `unclip demo` with prompts of its own."""

import argparse
import itertools
from pathlib import Path

from unclip_jax.cli.arguments import add_model, add_output, add_settings, command, count, load, prompts_of
from unclip_jax.cli.pictures import at_most, finish
from unclip_jax.cli.programs import keep
from unclip_jax.errors import UserError

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


def add_sample(commands) -> None:
    """Declares the command and its flags."""
    sub = command(commands, sample, "sample", "Draw pictures of prompts.")
    sub.add_argument("prompt", nargs="*", help="one or more texts, each in quotes")
    sub.add_argument("--prompts", metavar="FILE", help="a text file with one prompt a line")
    sub.add_argument("--num", type=count, default=4, help="pictures of each prompt (default 4)")
    add_output(sub, required=False)
    about = "compile the programs that this command would run, keep them for later commands, and draw nothing"
    sub.add_argument("--compile-only", action="store_true", help=about)
    add_model(sub)
    add_settings(sub)


def add_demo(commands) -> None:
    """Declares the command and its flags."""
    sub = command(commands, demo, "demo", f"Draw 4 pictures of each of {len(DEMO)} prompts.")
    sub.add_argument("--num", type=count, default=4, help=argparse.SUPPRESS)
    add_output(sub, "out/demo")
    add_model(sub)
    add_settings(sub)
    sub.set_defaults(prompt=list(DEMO), prompts=None, compile_only=False)


def sample(args) -> None:
    """Draws the prompts' pictures into a folder."""
    from unclip_jax import gallery

    prompts = prompts_of(args)
    at_most(len(prompts) * args.num)
    if args.compile_only:
        return compile_only(args, prompts)
    if args.out is None:
        raise UserError("the following arguments are required: --out", "see unclip sample --help")
    out = gallery.check_folder(args.out, args.overwrite)
    pipe, settings = load(args)
    finish(args, out, _drawn(pipe, prompts, args, settings), pipe.settings(**settings))


def _drawn(pipe, prompts, args, settings):
    """The rows of `gallery.write`, a prompt's pictures each, drawn as they are asked for."""
    from unclip_jax.gallery import Picture

    images = pipe.stream(prompts, args.seed, num=args.num, batch_size=args.batch_size, **settings)

    def row(p: int, prompt: str):
        for i, image in enumerate(itertools.islice(images, args.num)):
            yield Picture(image, prompt, {"prompt": prompt, "prompt_index": p, "index": i})

    for p, prompt in enumerate(prompts):
        yield prompt, row(p, prompt)


def compile_only(args, prompts) -> None:
    """Prints a line for each program."""
    from unclip_jax.warm import warm_up

    folder = keep(needed=True)
    args.low_memory = True  # so that no weights are read
    pipe, settings = load(args)
    made = warm_up(pipe, prompts, num=args.num, batch_size=args.batch_size, **settings)
    for stage, rows, seconds in made:
        print(f"{stage:12} batch {rows:<4} {seconds:8.1f} s")
    print(f"{len(made)} programs, {sum(p.seconds for p in made):.1f} s, kept in {folder}")


def demo(args) -> None:
    """`sample` with prompts of its own, into a folder that it may fill again; one of others it may not."""
    from unclip_jax.gallery import INDEX

    args.overwrite |= (Path(args.out).expanduser() / INDEX).is_file()
    sample(args)
