"""Tells what XLA compiles."""

import contextlib
import logging

import jax


@contextlib.contextmanager
def compiled():
    """A list of names that grows with each program compiled, such as "jit(step)"."""
    names = []

    class Note(logging.Handler):
        def emit(self, record):
            first, *rest = record.getMessage().split(" ", 2)
            if first == "Compiling":
                names.append(rest[0])

    logger, handler = logging.getLogger("jax._src.interpreters.pxla"), Note()
    logger.addHandler(handler)
    before, logger.propagate = logger.propagate, False
    try:
        with jax.log_compiles():
            yield names
    finally:
        logger.removeHandler(handler)
        logger.propagate = before


@contextlib.contextmanager
def events(name: str):
    """A list that grows by one with each of jax.monitoring's events of that name."""
    seen = []

    def listen(event, **_):
        if event == name:
            seen.append(event)

    jax.monitoring.register_event_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_listener(listen)
