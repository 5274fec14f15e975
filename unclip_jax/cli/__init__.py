"""The `unclip` command: parse, check, call, print. Whatever is slow to import is imported where it is used.

A mistake in what was typed is one line on stderr, `error: …`, exit code 2, and nothing is written. A program
error is one line and exit code 1 (`--debug` shows where). Ctrl-C is exit code 130, SIGTERM 143.
"""

import argparse
import contextlib
import multiprocessing
import os
import shlex
import signal
import sys
import threading
import time
import traceback
import warnings

import unclip_jax
from unclip_jax.cli import (
    blend,
    data,
    edit,
    evaluate,
    inpaint,
    plan,
    probe,
    reconstruct,
    sample,
    train,
    ui,
    vary,
    weights,
)
from unclip_jax.cli.arguments import Parser
from unclip_jax.errors import UserError, printable, suggest

PATIENCE = 10.0
STOPPED = {130: "interrupted", 143: "terminated"}  # 128 and the signal's number, as shells have it
# In the order of `unclip --help`.
COMMANDS = (
    train.add,
    sample.add_sample,
    sample.add_demo,
    vary.add,
    blend.add,
    edit.add,
    inpaint.add,
    reconstruct.add,
    probe.add,
    ui.add,
    evaluate.add,
    weights.add_export,
    weights.add_convert,
    data.add,
    plan.add,
)


def script() -> None:
    """The process of a command: `main`, and its exit code.

    A signal unwinds what was begun, so that nothing half-made is left; then the process ends at once. It does not wait
    for a program that runs on the device, and frees nothing that such a one may hold, as the interpreter's end would;
    nor, after PATIENCE seconds, for what Python cannot leave, as a compilation of minutes.
    """
    for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        if signal.getsignal(number) is usual:  # else whoever started it has it ignored
            signal.signal(number, _stop)
    read, written = os.pipe()
    os.set_blocking(written, False)
    signal.set_wakeup_fd(written, warn_on_full_buffer=False)
    threading.Thread(target=_insist, args=(read,), daemon=True).start()
    sys.unraisablehook = _not_lost
    sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may be no text
    try:
        sys.exit(main())
    except SystemExit as stop:  # which holds the frames, and they what they made
        if stop.code in STOPPED:
            _end(stop.code)
        loop = sys.modules.get("unclip_jax.train")  # of the one command that may be one of several processes
        if loop and stop.code not in (0, loop.PREEMPTED):
            loop.distributed.leave(stop.code)
        raise


def _stop(number: int, _) -> None:
    sys.exit(128 + number)


def _insist(heard: int) -> None:
    """Ends the process where a signal that asks for it, its number written to a pipe, does not end it in time."""
    while number := os.read(heard, 1):
        if signal.getsignal(number[0]) is _stop:  # not while training, which saves what it has
            time.sleep(PATIENCE)
            _end(128 + number[0])


def _end(code: int) -> None:
    """Ends the process, and those it started, at once."""
    _say(STOPPED[code])
    for child in multiprocessing.active_children():
        child.kill()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _not_lost(found) -> None:
    """Asks once more to stop where the first asking came in a destructor or the like, which lets nothing through."""
    if isinstance(found.exc_value, SystemExit) and found.exc_value.code in STOPPED:
        threading.Timer(0.1, os.kill, (os.getpid(), found.exc_value.code - 128)).start()
    else:
        sys.__unraisablehook__(found)


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    debug = "--debug" in argv
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default", UserWarning)
            # Orbax leaves coroutines behind where a restore fails, found whenever memory is swept: no user's concern.
            warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
            warnings.showwarning = lambda message, *_, **__: _say(f"warning: {message}")
            args = parse(argv)
            return args.run(args) or 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except UserError as error:
        if debug:
            raise
        _say(f"error: {error}")
        return 2
    except Exception as error:
        if debug:
            raise
        what = f"{type(error).__name__}: {error}"
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in what:
            _say("error: not enough memory. Fix: give a smaller --batch-size, or add --low-memory")
            return 2
        if "Unable to initialize backend" in what or _no_plugin(error):
            asked = str(error) or f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}"
            _say(f"error: JAX finds no such device ({asked}). Fix: unset JAX_PLATFORMS, or install what it asks for")
            return 2
        if isinstance(error, OSError) and error.strerror:
            where = f"{str(error.filename)[:100]!r} cannot be used" if error.filename else "a file cannot be used"
            _say(f"error: {where} ({error.strerror}). Fix: give another path, or see to its folder and disk")
            return 2
        _say(f"error: internal error, {what[:300]}. Fix: run again with --debug, and report what it shows")
        return 1


def _no_plugin(error: Exception) -> bool:
    """Whether jax fails an assertion, without a word, for want of the plugin that JAX_PLATFORMS asks for."""
    frames = traceback.extract_tb(error.__traceback__)
    return isinstance(error, AssertionError) and frames[-1].filename.endswith("xla_bridge.py")


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments, with `run` the function for them, and `flags` that the command has; UserError for what is unknown
    or out of range."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    own = vars(args).pop("parser")  # of the command
    args.flags = [flag for action in own._actions for flag in action.option_strings]
    block = getattr(args, "block", None)  # "config" or "data": whose keys may be given one by one
    overrides = [a for a in rest if block and a.startswith(f"--{block}.")]
    unknown = [a for a in rest if a not in overrides]
    if unknown and overrides and not unknown[0].startswith("-"):
        raise UserError(f"argument {unknown[0]!r} has no flag", f"write it as --{block}.key=value")
    if unknown and not unknown[0].startswith("-") and getattr(args, "path", "") is None:
        raise UserError(f"argument {unknown[0]!r} has no flag", f"write --path {shlex.quote(unknown[0])}")
    if unknown:
        flags = args.flags if unknown[0].startswith("-") else ()
        name = unknown[0].split("=")[0]
        raise UserError(
            f"unknown argument {name!r}", suggest(name, flags) if flags else "put texts in quotes"
        )
    args.overrides = [a.removeprefix(f"--{block}.") for a in overrides]
    return args


def _parser() -> Parser:
    parser = Parser(prog="unclip", description="DALL-E 2 (unCLIP) in JAX: train, sample, evaluate.")
    parser.add_argument("--version", action="version", version=f"unclip_jax {unclip_jax.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in COMMANDS:
        add(commands)
    return parser


def _say(text: str) -> None:
    """One line on stderr, whatever the text holds."""
    with contextlib.suppress(BrokenPipeError):
        print(printable(text), file=sys.stderr, flush=True)
