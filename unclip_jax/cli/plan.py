"""`unclip plan`."""

import contextlib
import dataclasses
from pathlib import Path

from unclip_jax.cli.arguments import command, count
from unclip_jax.environment import meanwhile
from unclip_jax.errors import UserError


def add(commands) -> None:
    """Declares the command and its flags."""
    sub = command(commands, run, "plan", "Compile a config for devices that are not here: memory, FLOPs, time.",
                  epilog="Any number of --config.key=value change the config.")  # fmt: skip
    sub.add_argument("--config", required=True, metavar="FILE[:VARIANT]", help="as for unclip train")
    where = sub.add_mutually_exclusive_group(required=True)
    where.add_argument("--topology", metavar="CHIP:AxB[xC]", help="a TPU slice, such as v5e:4x4 or v5p:4x8x8")
    where.add_argument("--device", metavar="GPU:COUNT", help="a100, h100 or h200: arithmetic only, nothing compiled")
    sub.add_argument("--slices", type=count, default=1, help="TPU slices joined by the data-centre network (1)")
    sub.add_argument("--clip", metavar="FILE[:VARIANT]", help="config of the CLIP (default: clip.py beside the config)")
    sub.add_argument("--what", default="train", choices=("train", "sample", "both"))
    sub.add_argument("--quick", action="store_true", help="let the compiler try less: about half the time")
    sub.add_argument("--search", action="store_true", help="try meshes, batch sizes and remat policies, best first")
    sub.add_argument("--out", metavar="FILE.json", help="write the numbers")
    sub.add_argument("--overwrite", action="store_true", help="replace what is there")
    sub.set_defaults(block="config")


def run(args) -> int:
    """Prints the plan; 1 where a step does not fit."""
    import json

    from unclip_jax import gallery
    from unclip_jax.config import load_config
    from unclip_jax.storage import write_text

    if args.search and args.what != "train":
        raise UserError(f"--search tries train steps, and --what {args.what} asks for others", "leave out one of them")
    if args.device is not None and args.slices > 1:
        raise UserError(f"--slices {args.slices} joins TPU slices, and --device names GPUs", "count all in GPU:COUNT")
    report_file = gallery.check_file(args.out, ".json", args.overwrite) if args.out is not None else None
    config = load_config(args.config, args.overrides)
    with meanwhile(JAX_PLATFORMS="cpu"):  # read as jax is imported: the compiler is asked, no device is used
        from unclip_jax import tasks
        from unclip_jax.plan import chips, steps
        from unclip_jax.plan.abstract import abstract
        from unclip_jax.plan.search import search
        from unclip_jax.plan.table import ranking, table

    clip = None
    if tasks.needs_clip(config):
        beside = Path(args.config.partition(":")[0]).with_name("clip.py")
        if not (args.clip or beside.is_file()):
            raise UserError(f"task {config.task} learns against a CLIP", "give its config by --clip FILE[:VARIANT]")
        clip = load_config(args.clip or str(beside))
    compiled = args.topology is not None
    if compiled:
        chip, devices = chips.tpu_devices(args.topology, args.slices)
    else:
        chip, devices = chips.gpu_devices(args.device)
    with steps.quick() if args.quick else contextlib.nullcontext():
        if args.search:
            reports = search(config, devices, chip, clip)
        else:
            made = abstract(config, devices, clip)
            kinds = {"train": [steps.plan_train], "sample": [steps.plan_sample]}
            kinds["both"] = kinds["train"] + kinds["sample"]
            reports = shown = [kind(made, chip, compiled) for kind in kinds[args.what]]
    title = f"{args.config}: predictions, not measurements"
    if args.search:
        title, shown = f"{title}\n{ranking(reports)}", [r for r in reports if r.compiled] or reports[:1]
    print(table(shown, title))
    if report_file:
        rows = [{**dataclasses.asdict(r), "fits": r.fits, "seconds": r.seconds} for r in reports]
        write_text(report_file, json.dumps(rows, indent=2) + "\n")
    asked = reports[:1] if args.search else reports
    return 0 if all(report.fits for report in asked) else 1
