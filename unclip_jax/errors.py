"""What a user did wrong, told in one line: the value, the requirement, the remedy."""

import contextlib
import difflib
import math
import numbers
import sys
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in what the user gave. The command line prints it as one line and exits with code 2.

    Args:
      what: the value and the requirement, such as "batch_size=12 must be a multiple of 8 (data x fsdp devices)".
      fix: the remedy; left out where `what` says it all.
    """

    def __init__(self, what: str, fix: str = ""):
        what = what.rstrip(".")
        super().__init__(f"{what}. Fix: {fix}" if fix else what)


def is_whole(value, least: int, most: float = math.inf) -> bool:
    """Whether it is a whole number in least … most, Python's or NumPy's; True and False are none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and least <= value <= most


def is_number(value, low: float, high: float = sys.float_info.max) -> bool:
    """Whether it is a finite number in low … high, Python's or NumPy's; True and False are none."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return False
    return low <= (value if isinstance(value, int) else float(value)) <= high  # an int may be too large for a float


def suggest(name: str, options: Iterable[str]) -> str:
    """The remedy for an unknown name: the nearest valid one, or the list of all."""
    options = sorted(map(str, options))
    near = difflib.get_close_matches(str(name), options, n=1)
    listing = ", ".join(options[:20]) + (", …" if len(options) > 20 else "")
    return f"did you mean '{near[0]}'? Valid: {listing}" if near else f"use one of {listing}"


@contextlib.contextmanager
def said_of(what: str, fix: str):
    """Turns any exception raised inside into a UserError that begins with `what`; one that is a UserError stays."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:
        why = str(e) if isinstance(e, ValueError) else f"{type(e).__name__}: {e}"
        raise UserError(f"{what}: {(why.strip().splitlines() or [''])[0][:300]}", fix) from e


def printable(text: str) -> str:
    """The text with spaces for what is no sign: line ends, and what would steer a terminal."""
    return "".join(c if c.isprintable() else " " for c in text)
