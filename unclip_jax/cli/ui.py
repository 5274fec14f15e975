"""`unclip ui`."""

import argparse

from unclip_jax.cli.arguments import command, count
from unclip_jax.cli.programs import keep


def add(commands) -> None:
    """Declares the command and its flags."""
    sub = command(commands, run, "ui", "Show a web page to draw on, until Ctrl-C.")
    sub.add_argument("--model", default="shapes", metavar="NAME|DIR", help="shapes (bundled, the default) or a stack")
    about = "address to listen on (127.0.0.1, which this machine alone reaches; 0.0.0.0 is any)"
    sub.add_argument("--host", default="127.0.0.1", help=about)
    sub.add_argument("--port", type=port, default=7860, help="1 … 65535 (7860)")
    sub.add_argument("--low-memory", action="store_true", help="one stage's weights on the device at a time")
    sub.add_argument("--dtype", help="of the weights: float32 or bfloat16 (on a CPU float32, elsewhere as stored)")


def run(args) -> None:
    """Serves the page."""
    from unclip_jax import ui

    keep()
    ui.serve(args.model, args.host, args.port, low_memory=args.low_memory, dtype=args.dtype)


def port(text: str) -> int:
    """Of TCP."""
    if (number := count(text)) > 65_535:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number in 1 … 65535")
    return number
