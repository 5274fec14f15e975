"""`unclip data …`."""

from unclip_jax.cli.arguments import MAX_PICTURES, command, count, done, seed
from unclip_jax.errors import UserError


def add(commands) -> None:
    """Declares the commands and their flags."""
    group = commands.add_parser("data", help="Look at data sets.")
    what = group.add_subparsers(dest="what", required=True, metavar="COMMAND")
    sub = command(what, show, "show", "Write a contact sheet of pictures with their captions.")
    sub.add_argument("source", help="shapes, icons or folder")
    sub.add_argument("--split", default="train")
    sub.add_argument("--size", type=count, default=64, help="side of the pictures in pixels (64)")
    sub.add_argument("--num", type=count, default=24, help="how many (24)")
    sub.add_argument("--cols", type=count, default=6, help="pictures a row (6)")
    sub.add_argument("--seed", type=seed, default=0)
    sub.add_argument("--path", metavar="DIR", help="of the source 'folder'")
    sub.add_argument("--out", required=True, metavar="FILE.png")
    sub.add_argument("--overwrite", action="store_true", help="replace what is there")
    done(sub)


def show(args) -> None:
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
