"""Variables of the environment for a while, for libraries that are told by nothing else."""

import contextlib
import os


@contextlib.contextmanager
def meanwhile(**values: str):
    """Within it variables that are not set have these values; afterwards they are unset again.

    The whole process sees them, its other threads too.
    """
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
