"""`unclip evaluate`."""

from pathlib import Path

import unclip_jax
from unclip_jax.cli.arguments import add_model, add_settings, command, count, done, listed, load
from unclip_jax.errors import UserError, suggest


def add(commands) -> None:
    """Declares the command and its flags."""
    sub = command(commands, run, "evaluate", "Measure a stack's pictures, or one trained stage.")
    sub.add_argument(
        "--checkpoint", metavar="WORKDIR", help="measure one stage's own metrics on held-out data"
    )
    sub.add_argument("--metrics", type=listed, default=["shapes_oracle"], help="shapes_oracle (the default)")
    sub.add_argument(
        "--num", type=count, default=200, help="prompts of each kind, or held-out examples (200)"
    )
    sub.add_argument(
        "--num-objects", type=listed, default=["one", "two"], help="one,two (the default), or one of them"
    )
    sub.add_argument(
        "--base", action="store_true", help="judge the decoder's pictures, without the upsampler"
    )
    sub.add_argument("--out", metavar="FILE.json", help="write the numbers")
    sub.add_argument("--sheet", metavar="FILE.png", help="write a contact sheet with verdicts")
    add_model(sub)
    add_settings(sub)
    done(sub)


def run(args) -> None:
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
    pipe, settings = load(args)
    pipe = pipe.without_upsamplers() if args.base else pipe

    def draw(prompts):
        return pipe.generate(prompts, args.seed, batch_size=args.batch_size, **settings)

    rows, seen = measure.alignment(draw, args.num, args.seed, args.num_objects)
    facts = {"metric": "shapes_oracle", "model": Path(args.model).name, "seed": args.seed, "num": args.num}
    return {**facts, "pixels": pipe.size, "settings": pipe.settings(**settings), "results": rows}, seen
