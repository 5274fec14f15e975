"""`unclip train`."""

from unclip_jax.cli.arguments import command, done


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
    sub.set_defaults(block="config")
    done(sub)


def run(args) -> int:
    """Trains one stage; 0, or 75 when it was stopped and saved."""
    from unclip_jax.config import load_config

    config = load_config(args.config, args.overrides)
    from unclip_jax.train import train as loop

    return loop(config, args.workdir)
