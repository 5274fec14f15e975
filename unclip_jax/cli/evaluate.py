"""`unclip evaluate`."""

from pathlib import Path

import unclip_jax
from unclip_jax.cli.arguments import add_model, add_settings, command, count, done, listed, load, number_from
from unclip_jax.errors import UserError, suggest

NUM = 200


def add(commands) -> None:
    """Declares the command and its flags."""
    sub = command(commands, run, "evaluate", "Measure a stack's pictures, or one trained stage.")
    names = "fid, kid, precision_recall, cmmd, clip_score, is, shapes_oracle (the default, alone with its own prompts)"
    sub.add_argument("--metrics", type=listed, default=["shapes_oracle"], help=names)
    sub.add_argument("--num", type=count, help=f"pictures; prompts of each kind; examples ({NUM}, or all in --images)")
    sub.add_argument("--out", metavar="FILE.json", help="write the numbers, and FILE.md and FILE.html beside it")
    group = sub.add_argument_group("pictures against real ones")
    group.add_argument("--data", metavar="SOURCE[:SPLIT]", help="captions and real pictures: shapes, folder, …")
    group.add_argument("--path", metavar="DIR", help="of the source 'folder'")
    group.add_argument("--images", metavar="DIR", help="measure the pictures in this folder, and draw none")
    group.add_argument("--reference", metavar="FILE.npz", help="statistics of the real pictures; made with --data")
    group.add_argument("--inception", metavar="FILE|DIR", help="FID's Inception; without it CLIP's features are used")
    group.add_argument("--clip", metavar="STACK|WORKDIR", help="the CLIP that looks (the stack's own)")
    group.add_argument("--work", metavar="DIR", help="keep features here; an interrupted evaluation goes on")
    group.add_argument("--bootstrap", type=number_from(0), default=50, help="resamples for the interval of fid (50)")
    group.add_argument("--sweep", nargs="+", metavar="NAME=A,B", help="guidance=1,2,4 steps=10,30 … every combination")
    group = sub.add_argument_group("the shapes world's own prompts")
    group.add_argument("--num-objects", type=listed, default=["one", "two"], help="one,two (the default), or one")
    group.add_argument("--base", action="store_true", help="judge the decoder's pictures, without the upsampler")
    group.add_argument("--sheet", metavar="FILE.png", help="write a contact sheet with verdicts")
    group = sub.add_argument_group("one trained stage")
    what = "measure a run by its own metrics, on held-out data or --data"
    group.add_argument("--checkpoint", metavar="WORKDIR", help=what)
    group.add_argument("--stage", metavar="NAME", help="the same of a stage of --model: clip, prior, decoder, …")
    group.add_argument("--step", type=count, help="of the checkpoint (the newest)")
    group.add_argument("--classes", metavar="FILE", help="names of classes for zero-shot, one a line")
    group.add_argument("--templates", metavar="FILE", help="prompt templates with {}, one a line")
    group = sub.add_argument_group("reports and people")
    group.add_argument("--compare", nargs=2, metavar="RUN.json", help="two reports side by side")
    group.add_argument("--pairs", nargs=2, metavar="DIR", help="write --out PAGE.html to choose between two folders")
    group.add_argument("--votes", nargs="+", metavar="VOTES.json", help="what the votes on such a page say")
    group.add_argument("--key", metavar="KEY.json", help="of the page that the votes are on")
    add_model(sub)
    add_settings(sub)
    done(sub)


def run(args) -> None:
    """Does the one of its tasks that the flags ask for."""
    modes = {name: getattr(args, name) for name in ("checkpoint", "stage", "images", "compare", "pairs", "votes")}
    given = [name for name, value in modes.items() if value is not None]
    if len(given) > 1:
        raise UserError(f"--{given[0]} and --{given[1]} are different tasks", "give one of them")
    from unclip_jax.evaluation.protocol import METRICS

    for name in args.metrics:
        if name not in METRICS:
            raise UserError(f"metrics={name!r} is unknown", suggest(name, METRICS))
    _refuse_stray(args, given)
    mode = given[0] if given else None
    args.num = NUM if args.num is None and mode != "images" else args.num
    if mode in ("checkpoint", "stage"):
        return _stage(args)
    if mode == "compare":
        return _compare(args)
    if mode in ("pairs", "votes"):
        return _people(args, mode)
    if mode is None and args.metrics == ["shapes_oracle"] and args.data is None and args.sweep is None:
        return _alignment(args)
    from unclip_jax.cli.evaluate_pictures import run as pictures

    return pictures(args)


def _refuse_stray(args, given: list[str]) -> None:
    """Flags that would be silently ignored are mistakes."""
    stage = ("checkpoint", "stage")
    only = {"sheet": (), "step": stage[:1], "classes": stage, "templates": stage, "key": ("votes",)}
    for flag, modes in only.items():
        if getattr(args, flag) is not None and not (set(given) & set(modes) or given == list(modes)):
            task = " or ".join(f"--{mode}" for mode in modes) or "a stack's pictures"
            raise UserError(f"--{flag} is for {task}", "leave it out")


def _alignment(args) -> None:
    """Prints, and on request writes, how often pictures show what the shapes world's own prompts say."""
    from unclip_jax import gallery
    from unclip_jax.evaluation import alignment, report

    for name in args.num_objects:
        if name not in alignment.OBJECTS:
            raise UserError(f"num-objects={name!r} is unknown", suggest(name, alignment.OBJECTS))
    out = report.check_files(args.out, args.overwrite) if args.out is not None else None
    sheet = gallery.check_file(args.sheet, ".png", args.overwrite) if args.sheet is not None else None
    pipe, settings = load(args)
    pipe = pipe.without_upsamplers() if args.base else pipe

    def draw(prompts):
        return pipe.generate(prompts, args.seed, batch_size=args.batch_size, **settings)

    rows, seen = alignment.alignment(draw, args.num, args.seed, args.num_objects)
    print(alignment.table(rows))
    if sheet:
        gallery.write_image(sheet, alignment.sheet(seen))
    if out:
        facts = {"unclip_jax": unclip_jax.__version__, "kind": "alignment", "metric": "shapes_oracle"}
        facts |= {"model": Path(args.model).name, "seed": args.seed, "num": args.num, "pixels": pipe.size}
        facts |= {"settings": pipe.settings(**settings), "versions": report.versions(), "results": rows}
        report.write(out, alignment.as_report(facts, seen))


def _stage(args) -> None:
    from unclip_jax.evaluation import report, stages

    out = report.check_files(args.out, args.overwrite) if args.out is not None else None
    made = stages.measure(
        args.checkpoint or args.model, args.num, args.seed, stage=args.stage, step=args.step, source=args.data,
        path=args.path, sweep=args.sweep, classes=args.classes, templates=args.templates,
    )  # fmt: skip
    show(made, out)


def _compare(args) -> None:
    from unclip_jax.evaluation import report

    out = report.check_files(args.out, args.overwrite) if args.out is not None else None
    show(report.compare(*args.compare), out)


def _people(args, mode: str) -> None:
    from unclip_jax.evaluation import pairs, report

    if mode == "pairs":
        if args.out is None:
            raise UserError("--pairs needs --out", "give --out PAGE.html")
        page, key, shown = pairs.make(*args.pairs, args.out, args.num, args.seed, args.overwrite)
        print(f"{shown} questions in {page}; which side is which is in {key}, which judges must not see")
        return
    if args.key is None:
        raise UserError("--votes needs --key", "give the .key.json that was written beside the page")
    out = report.check_files(args.out, args.overwrite) if args.out is not None else None
    show(pairs.analyse(args.votes, args.key), out)


def show(made, out: Path | None) -> None:
    """Prints a report's tables, and writes it where that was asked for."""
    from unclip_jax.evaluation import report

    print(made.title)
    for table in made.tables:
        print(f"\n{report.plain(table)}")
    if out:
        report.write(out, made)
