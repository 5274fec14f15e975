"""`unclip inpaint`: paint a hole of a picture anew, around it, or all of it from a start."""

import argparse

from unclip_jax.cli.arguments import add_model, add_output, add_settings, command, count, load, part, prompts_of
from unclip_jax.cli.pictures import at_most, beside, finish, read_picture
from unclip_jax.errors import UserError

MAX_BORDER = 10_000


def add(commands) -> None:
    """Declares the command and its flags."""
    sub = command(commands, run, "inpaint", "Paint part of a picture anew, around it, or all of it from a start.")
    sub.add_argument("image", metavar="IMAGE", help="a picture file")
    sub.add_argument("prompt", nargs="?", help="what the whole picture is to show; needed but with --strength")
    sub.add_argument("--mask", metavar="PNG", help="of the picture's size: white is painted anew, black stays")
    sub.add_argument("--box", type=box, metavar="X0,Y0,X1,Y1", help="paint this box, in pixels of IMAGE")
    sub.add_argument("--outpaint", type=borders, metavar="L,T,R,B", help="paint so many more pixels at the sides")
    sub.add_argument("--strength", type=part, metavar="S", help="begin from IMAGE with so much noise, above 0 … 1 (1)")
    sub.add_argument("--resample", type=count, metavar="N", help="passes of RePaint over each stretch of steps")
    sub.add_argument("--num", type=count, default=4, help="pictures (4)")
    add_output(sub)
    add_model(sub)
    add_settings(sub)


def run(args) -> None:
    """Draws the pictures into a folder, the input beside them in the grid."""
    from unclip_jax import gallery

    at_most(args.num)
    out = gallery.check_folder(args.out, args.overwrite)
    prompts = None if args.prompt is None else prompts_of(argparse.Namespace(prompt=[args.prompt], prompts=None))
    if prompts is None and args.strength is None:
        raise UserError("no prompt was given", "say what the whole picture is to show, or give --strength")
    image, hole = canvas(args)
    pipe, settings = load(args)
    own = {"strength": 1.0 if args.strength is None else args.strength, "resample": args.resample}
    images = pipe.inpaint(
        [image], None if hole is None else [hole], prompts, args.seed,
        num=args.num, batch_size=args.batch_size, **own, **settings,
    )  # fmt: skip
    what = prompts[0] if prompts else "as it is"
    columns = [(what, {"role": "painted", "prompt": what, "index": i}) for i in range(args.num)]
    rows = beside([args.image], pipe.squares([image], pipe.size), images, columns)
    finish(args, out, rows, pipe.painting_settings(settings, prompts is not None), **own)


def canvas(args):
    """(u8[h, w, 3], bool[h, w] or None for all of it): the picture with its borders, and what of it to paint.

    Raises:
      UserError: a picture that cannot be read, a mask or box that does not fit it, or nothing or all to be painted.
    """
    import numpy as np

    image = read_picture(args.image)
    hole = np.zeros(image.shape[:2], bool)
    if args.mask is not None:
        hole |= read_mask(args.mask, hole.shape)
    if args.box is not None:
        hole |= _boxed(args.box, hole.shape)
    if args.outpaint is not None:
        left, top, right, bottom = args.outpaint
        sides = ((top, bottom), (left, right))
        image, hole = np.pad(image, (*sides, (0, 0)), mode="edge"), np.pad(hole, sides, constant_values=True)
        if image.shape[0] != image.shape[1]:
            size = f"{image.shape[1]} x {image.shape[0]}"
            raise UserError(f"--outpaint makes the picture {size} pixels, and a square is needed", "change its numbers")
    if args.mask is None and args.box is None and args.outpaint is None:
        if args.strength is None:
            raise UserError("nothing says what to paint", "give --mask, --box, --outpaint or --strength")
        return image, None
    if not hole.any():
        raise UserError("the mask is all black, so nothing is painted", "make what is to be painted white")
    if hole.all() and args.strength is None:
        raise UserError("all of the picture is to be painted", 'leave some of it, or use unclip sample')
    return image, hole


def read_mask(path: str, shape: tuple[int, int]):
    """A picture file of the given height and width as bool[h, w], True where it is lighter than mid-grey."""
    mask = read_picture(path)
    if mask.shape[:2] != shape:
        size, wanted = (f"{s[1]} x {s[0]}" for s in (mask.shape, shape))
        raise UserError(f"mask {path!r} is {size} pixels and the picture {wanted}", "give a mask of the picture's size")
    return mask.mean(-1) >= 128


def _boxed(corners, shape):
    import numpy as np

    x0, y0, x1, y1 = corners
    height, width = shape
    if x0 >= width or y0 >= height:
        raise UserError(f"--box {x0},{y0},{x1},{y1} does not overlap the picture of {width} x {height} pixels")
    hole = np.zeros(shape, bool)
    hole[y0:y1, x0:x1] = True
    return hole


def box(text: str) -> tuple[int, ...]:
    """Left, top, right, bottom; the last two are just outside."""
    numbers = _four(text, "x0,y0,x1,y1")
    if not (numbers[0] < numbers[2] and numbers[1] < numbers[3]):
        raise argparse.ArgumentTypeError(f"{text!r} must have x0 < x1 and y0 < y1")
    return numbers


def borders(text: str) -> tuple[int, ...]:
    """Pixels at the left, top, right and bottom, one of them at least above 0."""
    numbers = _four(text, "left,top,right,bottom")
    if not any(numbers) or max(numbers) > MAX_BORDER:
        raise argparse.ArgumentTypeError(f"{text!r} must have a number above 0, and none above {MAX_BORDER}")
    return numbers


def _four(text: str, names: str) -> tuple[int, ...]:
    parts = text.split(",")
    if len(parts) != 4 or not all(part.strip().isascii() and part.strip().isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} must be four whole numbers {names}, none negative")
    return tuple(min(int(part), 10**9) for part in parts)
