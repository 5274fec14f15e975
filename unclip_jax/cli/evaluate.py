"""`unclip evaluate`."""

import argparse
from pathlib import Path

import unclip_jax
from unclip_jax.cli.arguments import add_model, add_settings, command, count, listed, load, number_from
from unclip_jax.errors import UserError, printable

NUM = 200
OUT = "out overwrite debug"
REAL = "metrics data path reference inception clip work bootstrap"
DRAW = "model seed batch_size low_memory base sampling"  # the last stands for the flags of `settings.Settings`
STAGE = "num seed data path sweep classes templates"
# {task: the flags that it reads}. But for the first two, a task is asked for by the flag of its name.
READS = {
    "prompts": f"metrics num num_objects sheet {DRAW} {OUT}",
    "drawn": f"num sweep {REAL} {DRAW} {OUT}",
    "images": f"images num model seed {REAL} {OUT}",
    "checkpoint": f"checkpoint step {STAGE} {OUT}",
    "stage": f"stage model {STAGE} {OUT}",
    "compare": f"compare {OUT}",
    "pairs": f"pairs num seed {OUT}",
    "votes": f"votes key {OUT}",
}
CALLED = {"prompts": "the shapes world's own prompts", "drawn": "pictures drawn for --data"}


def add(commands) -> None:
    """Declares the command and its flags."""
    sub = command(commands, run, "evaluate", "Measure a stack's pictures, or one trained stage.")
    names = "fid, kid, precision_recall, cmmd, clip_score, is, shapes_oracle (the default, alone with its own prompts)"
    sub.add_argument("--metrics", type=listed, default=["shapes_oracle"], help=names)
    sub.add_argument("--num", type=count, help=f"pictures; prompts of each kind; examples ({NUM}, or all in --images)")
    sub.add_argument("--out", metavar="FILE.json", help="write the numbers, and FILE.md and FILE.html beside it")
    group = sub.add_argument_group("pictures against real ones")
    group.add_argument("--data", metavar="SOURCE[:SPLIT]", help="captions and real pictures: shapes, folder, …")
    group.add_argument("--path", metavar="DIR", help="of the source: a folder, tar shards, or a data set's name")
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
    others = len(sub._actions)
    add_settings(sub)
    sub.set_defaults(sampling=[action.dest for action in sub._actions[others:]])
    # None until given, so that `task_of` knows what was; it fills in the rest.
    usual = {a.dest: a.default for a in sub._actions if a.default not in (None, argparse.SUPPRESS)}
    sub.set_defaults(**dict.fromkeys(usual), usual=usual)


def run(args) -> None:
    """Does the one of its tasks that the flags ask for."""
    task = task_of(args)
    RUN[task](args)


def task_of(args) -> str:
    """The one of `READS` that the flags ask for; flags that were not given get their defaults.

    Raises:
      UserError: two tasks are asked for, or a flag is given that the task would ignore.
    """
    flags = [flag.strip("-").replace("-", "_") for flag in args.flags]
    given = [name for name in flags if getattr(args, name, None) is not None]
    asked = [name for name in READS if name in given]
    if len(asked) > 1:
        raise UserError(f"--{asked[0]} and --{asked[1]} are different tasks", "give one of them")
    for name, value in args.usual.items():
        if name not in given:
            setattr(args, name, value)
    of_data = "data" in given or "sweep" in given or args.metrics != args.usual["metrics"]
    task = asked[0] if asked else "drawn" if of_data else "prompts"
    for name in given:
        kind = "sampling" if name in args.sampling else name
        readers = [CALLED.get(other, f"--{other}") for other, reads in READS.items() if kind in reads.split()]
        if (this := CALLED.get(task, f"--{task}")) not in readers:
            known = " or ".join(filter(None, [", ".join(readers[:-1]), readers[-1]]))
            raise UserError(f"--{name.replace('_', '-')} is for {known}, and not for {this}", "leave it out")
    if args.num is None and task != "images":
        args.num = NUM
    return task


def _alignment(args) -> None:
    """Prints, and on request writes, how often pictures show what the shapes world's own prompts say."""
    from unclip_jax import gallery
    from unclip_jax.evaluation import alignment, report

    alignment.check_objects(args.num_objects)
    out = out_of(args)
    sheet = gallery.check_file(args.sheet, ".png", args.overwrite) if args.sheet is not None else None
    pipe, settings = load(args)
    pipe = pipe.without_upsamplers() if args.base else pipe

    def draw(prompts):
        return pipe.generate(prompts, args.seed, batch_size=args.batch_size, **settings)

    rows, seen = alignment.alignment(draw, args.num, args.seed, args.num_objects)
    facts = {"unclip_jax": unclip_jax.__version__, "kind": "alignment", "metric": "shapes_oracle"}
    facts |= {"model": Path(args.model).name, "seed": args.seed, "num": args.num, "pixels": pipe.size}
    facts |= {"settings": pipe.settings(**settings), "versions": report.versions(), "results": rows}
    made = alignment.as_report(facts, seen)
    print(report.plain(made.tables[0]))
    if sheet:
        gallery.write_image(sheet, alignment.sheet(seen))
    if out:
        report.write(out, made)


def _pictures(args) -> None:
    from unclip_jax.cli.evaluate_pictures import run as pictures

    pictures(args)


def _stage(args) -> None:
    from unclip_jax.evaluation import stages

    out = out_of(args)
    made = stages.measure(
        args.model if args.stage is not None else args.checkpoint, args.num, args.seed, stage=args.stage,
        step=args.step, source=args.data, path=args.path, sweep=args.sweep, classes=args.classes,
        templates=args.templates,
    )  # fmt: skip
    show(made, out)


def _compare(args) -> None:
    from unclip_jax.evaluation import report

    out = out_of(args)
    show(report.compare(*args.compare), out)


def _pairs(args) -> None:
    from unclip_jax.evaluation import pairs

    if args.out is None:
        raise UserError("--pairs needs --out", "give --out PAGE.html")
    page, key, shown = pairs.make(*args.pairs, args.out, args.num, args.seed, args.overwrite)
    print(f"{shown} questions in {page}; which side is which is in {key}, which judges must not see")


def _votes(args) -> None:
    from unclip_jax.evaluation import pairs

    if args.key is None:
        raise UserError("--votes needs --key", "give the .key.json that was written beside the page")
    out = out_of(args)
    show(pairs.analyse(args.votes, args.key), out)


RUN = {
    "prompts": _alignment, "drawn": _pictures, "images": _pictures, "checkpoint": _stage, "stage": _stage,
    "compare": _compare, "pairs": _pairs, "votes": _votes,
}  # fmt: skip


def out_of(args) -> Path | None:
    """Where the report goes, if anywhere; UserError where it cannot."""
    from unclip_jax.evaluation import report

    return report.check_files(args.out, args.overwrite) if args.out is not None else None


def show(made, out: Path | None) -> None:
    """Prints a report's tables, and writes it where that was asked for."""
    from unclip_jax.evaluation import report

    print(printable(made.title))
    for table in made.tables:
        print(f"\n{report.plain(table)}")
    if out:
        report.write(out, made)
