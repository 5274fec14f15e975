"""`unclip data show`, `check` and `embed`: data sources looked at, gone through, and embedded."""

import json
import shlex

from unclip_jax.cli.arguments import MAX_PICTURES, command, count, listed, seed
from unclip_jax.errors import UserError

REPORT = "write the report, with every unreadable record of those read, and up to 100 that an index of tars left out"


def add(commands) -> None:
    """Declares the commands and their flags."""
    group = commands.add_parser("data", help="Look at data sets, check them, embed them.")
    what = group.add_subparsers(dest="what", required=True, metavar="COMMAND")
    sub = command(what, show, "show", "Write a contact sheet of pictures with their captions.")
    _add_source(sub)
    sub.add_argument("--num", type=count, default=24, help="how many (24)")
    sub.add_argument("--cols", type=count, default=6, help="pictures a row (6)")
    sub.add_argument("--out", required=True, metavar="FILE.png")
    sub.add_argument("--overwrite", action="store_true", help="replace what is there")
    sub = command(what, check, "check", "Read records, and tell what is in them and which cannot be read.")
    _add_source(sub)
    sub.add_argument("--num", type=count, default=1000, help="records, evenly over the source (1000)")
    sub.add_argument("--all", action="store_true", help="read every record")
    sub.add_argument("--out", metavar="FILE.json", help=REPORT)
    sub.add_argument("--sheet", metavar="FILE.png", help="write a contact sheet")
    sub.add_argument("--overwrite", action="store_true", help="replace what is there")
    sub = command(what, embed, "embed", "Work out CLIP's embeddings once, to train priors from.")
    _add_source(sub, split=False)
    sub.add_argument("--clip", required=True, metavar="DIR", help="workdir of a CLIP run, or a stack")
    sub.add_argument("--splits", type=listed, default=["train", "test"], help="train,test (the default)")
    sub.add_argument("--batch-size", type=count, default=64, help="pictures embedded at once (64)")
    sub.add_argument("--states", action="store_true", help="keep caption states, for priors that take them")
    sub.add_argument("--out", required=True, metavar="DIR", help="an unfinished one is gone on with")


def _add_source(sub, split: bool = True) -> None:
    sub.epilog = "Any number of --data.key=value are arguments of the source, such as --data.index=DIR."
    sub.add_argument("source", help="shapes, icons, folder, webdataset or tfds")
    if split:
        sub.add_argument("--split", default="train", help="of its records (train); of pictures of your own also all")
    size, usual = (64, "64") if split else (None, "the CLIP's")
    sub.add_argument("--size", type=count, default=size, help=f"side of the pictures in pixels ({usual})")
    sub.add_argument("--seed", type=seed, default=0)
    sub.add_argument("--path", help="of the source: a folder, tar shards, or a data set's name")
    sub.set_defaults(block="data")


def show(args) -> None:
    """Writes a contact sheet of a data source."""
    from unclip_jax import gallery

    out = gallery.check_file(args.out, ".png", args.overwrite)
    if args.num > MAX_PICTURES:
        raise UserError(f"num={args.num} must be at most {MAX_PICTURES}")
    from unclip_jax import data
    from unclip_jax.data.show import contact_sheet

    source = data.make(**_source(args), split=args.split)
    out.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(source, args.num, args.cols, out)
    print(f"{min(args.num, len(source))} of {len(source)} records of '{source.name}' in {out}")


def check(args) -> int:
    """Prints what a source holds; 1 where more cannot be read than its max_bad allows."""
    from unclip_jax import gallery
    from unclip_jax.storage import write_text

    report_file = gallery.check_file(args.out, ".json", args.overwrite) if args.out is not None else None
    sheet_file = gallery.check_file(args.sheet, ".png", args.overwrite) if args.sheet is not None else None
    from unclip_jax import data
    from unclip_jax.data.check import survey, table
    from unclip_jax.data.show import contact_sheet

    source = data.make(**_source(args), split=args.split)
    report = survey(source, None if args.all else args.num)
    print(table(report))
    if report_file:
        write_text(report_file, json.dumps(report, indent=2) + "\n")
    if sheet_file and report["readable"]:
        sheet_file.parent.mkdir(parents=True, exist_ok=True)
        contact_sheet(source, 24, 6, sheet_file)
    return 1 if len(report["bad"]) > source.max_bad * report["read"] else 0


def embed(args) -> None:
    """Writes a folder of embeddings."""
    from unclip_jax.embed import embed as write

    out = write(args.out, args.clip, _source(args), args.splits, args.batch_size, args.states)
    path = shlex.quote(str(out))
    print(f"{out}: train a prior from it with --config.data.source=embeddings --config.data.path={path}")


def _source(args) -> dict:
    """The keywords of `data.make` that were given, without split; a value that is JSON is taken as such."""
    words = {"source": args.source, "size": args.size, "seed": args.seed, "path": args.path}
    words = {key: value for key, value in words.items() if value is not None}
    for override in args.overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise UserError(f"--data.{override} has no value", "write it as --data.key=value")
        if key in ("split", "size", *words):
            raise UserError(f"--data.{key} has a flag of its own", f"write --{key}")
        try:
            words[key] = json.loads(value)
        except (ValueError, RecursionError):
            words[key] = value
    return words
