"""`unclip blend`."""

import os

from unclip_jax.cli.arguments import add_model, add_output, add_settings, checked_text, command, frames, load
from unclip_jax.cli.pictures import at_most, finish, name_of, read_picture
from unclip_jax.errors import UserError

TEXT = "prompt:"


def add(commands) -> None:
    """Declares the command and its flags."""
    sub = command(commands, run, "blend", "Draw the way from one picture or prompt to another.")
    sub.add_argument(
        "input", nargs="+", help=f"two or more: a file's picture, all else is a prompt; {TEXT}WORDS always is"
    )
    sub.add_argument("--frames", type=frames, default=9, help="from one input to the next, both counted (9)")
    sub.add_argument(
        "--noise",
        choices=("slerp", "fixed"),
        help="turn the noise too, so that the ends are the pictures (default where there is one), or hold it",
    )
    add_output(sub)
    add_model(sub)
    add_settings(sub)


def run(args) -> None:
    """Draws the frames, a grid and animations into a folder."""
    from unclip_jax import gallery
    from unclip_jax.edits import noise_between
    from unclip_jax.gallery import Picture

    if len(args.input) < 2:
        raise UserError("blend needs at least two pictures or prompts", "put each prompt in quotes")
    total = (len(args.input) - 1) * (args.frames - 1) + 1
    at_most(total)
    out = gallery.check_folder(args.out, args.overwrite)
    inputs = [_read(given) for given in args.input]
    pipe, settings = load(args)
    drawn = pipe.interpolate(
        inputs, args.frames, args.seed, noise=args.noise, batch_size=args.batch_size, **settings
    )
    names = [given if isinstance(given, str) else name_of(path) for given, path in zip(inputs, args.input, strict=True)]
    noise = noise_between(inputs, args.noise)
    row = []
    for i, image in enumerate(drawn):
        leg, step = divmod(i, args.frames - 1)
        share = step / (args.frames - 1)
        label = f"{share:.2f} to {names[leg + 1]}" if step else names[leg]
        row.append(Picture(image, label, {"inputs": names, "noise": noise, "frame": i, "of": total}))
    rows = [(" to ".join(names), row)]
    used = pipe.exact_settings(settings, prompted=any(isinstance(given, str) for given in inputs))
    finish(args, out, rows, used, animated=True)


def _read(given: str):
    """A picture u8[h, w, 3], or the words of a prompt."""
    from unclip_jax.data.images import SUFFIXES

    if given.startswith(TEXT):
        return checked_text(given.removeprefix(TEXT))
    if os.path.isdir(given) and not given.lower().endswith(SUFFIXES):
        raise UserError(f"{given!r} is a folder, and no picture", f"or, if it is a prompt, write {TEXT}{given}")
    if "\0" not in given and os.path.exists(os.path.expanduser(given)):
        return read_picture(given)
    if given.lower().endswith(SUFFIXES):
        raise UserError(f"picture {given!r} does not exist", f"or, if it is a prompt, write {TEXT}{given}")
    return checked_text(given)
