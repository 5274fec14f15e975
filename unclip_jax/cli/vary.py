"""`unclip vary`."""

from unclip_jax.cli.arguments import add_model, add_output, add_settings, command, count, load, share
from unclip_jax.cli.pictures import at_most, beside, finish, read_picture


def add(commands) -> None:
    """Declares the command and its flags."""
    sub = command(commands, run, "vary", "Draw what pictures show anew: variations, by DDIM inversion.")
    sub.add_argument("image", nargs="+", help="picture files; the middle square is looked at")
    sub.add_argument("--num", type=count, default=4, help="variations of each picture (4)")
    way = sub.add_mutually_exclusive_group()
    way.add_argument(
        "--eta", type=share, default=0.5, metavar="E", help="chance in each step: 0 the picture itself … 1 (0.5)"
    )
    way.add_argument("--white-noise", action="store_true", help="keep what CLIP sees and nothing else")
    add_output(sub)
    add_model(sub)
    add_settings(sub)


def run(args) -> None:
    """Draws variations of the pictures into a folder."""
    from unclip_jax import gallery

    at_most(len(args.image) * args.num)
    out = gallery.check_folder(args.out, args.overwrite)
    images = [read_picture(path) for path in args.image]
    pipe, settings = load(args)
    eta = None if args.white_noise else args.eta
    used = pipe.embedded_settings(settings) if args.white_noise else pipe.exact_settings(settings)
    drawn = pipe.variations(images, args.seed, num=args.num, eta=eta, batch_size=args.batch_size, **settings)
    label = "white noise" if eta is None else f"eta {eta:g}"
    columns = [(label, {"role": "variation", "eta": eta, "index": i}) for i in range(args.num)]
    finish(args, out, beside(args.image, pipe.squares(images, pipe.size), drawn, columns), used)
