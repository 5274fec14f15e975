"""`unclip train`."""

from pathlib import Path

from unclip_jax.cli.arguments import command
from unclip_jax.errors import UserError
from unclip_jax.storage import check_writable


def add(commands) -> None:
    """Declares the command and its flags."""
    sub = command(commands, run, "train", "Train one stage, or go on with it.",
                   epilog="Any number of --config.key=value change the config.")  # fmt: skip
    sub.add_argument(
        "--config", required=True, metavar="FILE[:VARIANT]", help="such as configs/shapes/clip.py"
    )
    sub.add_argument(
        "--workdir", required=True, metavar="DIR", help="of the run; a run in it is gone on with"
    )
    sub.add_argument("--profile", metavar="DIR", help="trace a few steps with jax's profiler into this folder")
    sub.set_defaults(block="config")


def run(args) -> int:
    """Trains one stage; 0, or 75 when it was stopped and saved."""
    from unclip_jax.config import load_config

    if args.profile is not None:
        try:
            check_writable(Path(args.profile).expanduser())
        except OSError as error:
            what = f"--profile={args.profile!r} must be a folder that can be written"
            raise UserError(what, "choose another") from error
    config = load_config(args.config, args.overrides)
    from unclip_jax.train import train as loop

    return loop(config, args.workdir, args.profile)
