"""Several processes, one run: how they find each other, who writes, and how all stop at the same step.

The coordinator listens without authentication: keep its port inside a private network.
"""

import os
import re
import secrets
import signal
import socket
import sys
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from unclip_jax.errors import UserError

COORDINATOR, PROCESSES, PROCESS_ID = "UNCLIP_COORDINATOR", "UNCLIP_PROCESSES", "UNCLIP_PROCESS_ID"
TIMEOUT = "UNCLIP_TIMEOUT"  # seconds to wait for the other processes; 300 where unset
HEARTBEAT = "UNCLIP_HEARTBEAT"  # seconds without a word after which a process counts as dead; 100 where unset
PMI_SIZE = "PMI_SIZE"  # how many processes MPICH's or Intel MPI's mpirun started

GRACE = 3.0  # seconds


def initialize() -> None:
    """Joins the other processes of this run; does nothing for a single one. Call before any other use of jax.

    Explicit: UNCLIP_COORDINATOR=host:port, UNCLIP_PROCESSES and UNCLIP_PROCESS_ID, the same command on every
    host.
    Found by jax itself: inside an `srun` step of several tasks, under Open MPI 4's `mpirun`, on a TPU slice whose
    hosts are listed in the environment, and wherever UNCLIP_COORDINATOR=auto.

    Raises:
      UserError: an incomplete or impossible setting, one of several processes that would train as if it were alone,
        or a process 0 that does not come within UNCLIP_TIMEOUT seconds. Where another does not, jax ends process 0.
    """
    if jax.distributed.is_initialized():
        return
    explicit = _explicit(os.environ)
    if explicit is None and not _found_by_jax(os.environ):
        _refuse_apart(os.environ)
        return
    if explicit is not None and explicit["num_processes"] == 1:
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    timeout, heartbeat = _whole(os.environ, TIMEOUT, 300, low=1), _whole(os.environ, HEARTBEAT, 100, low=5)
    if explicit is not None and explicit["process_id"] > 0:
        _await_coordinator(explicit["coordinator_address"], timeout)
    try:
        waits = dict(initialization_timeout=timeout, heartbeat_timeout_seconds=heartbeat)
        jax.distributed.initialize(**(explicit or {}), **waits)
    except (RuntimeError, ValueError) as error:
        if "coordinator_address should be defined" in str(error):
            what = "JAX does not find the other processes of the run by itself here"
            raise UserError(what, f"set {COORDINATOR}=host:port, {PROCESSES} and {PROCESS_ID}") from error
        address = explicit["coordinator_address"] if explicit else "found by jax"
        raise UserError(
            f"the processes of the run did not meet at the coordinator ({address}) within {timeout} s "
            f"({str(error).splitlines()[0] if str(error) else type(error).__name__})",
            f"start the same command on every host, check the address and its port, or raise {TIMEOUT}",
        ) from error


def _refuse_apart(env) -> None:
    """UserError for one of several processes that nobody told of each other: each would train all of the run."""
    if (several := _whole(env, PMI_SIZE, 1, low=0)) > 1:
        what = f"{PMI_SIZE}={several}: this is one of several processes of an MPI other than Open MPI 4, unknown to JAX"
        raise UserError(what, f"set {COORDINATOR}=host:port, {PROCESSES}=${PMI_SIZE} and {PROCESS_ID}=$PMI_RANK")
    if (several := jax.process_count()) > 1:  # a TPU knows its slice, but its hosts would neither save nor stop as one
        what = f"this is one of {several} hosts of a TPU slice, and has not joined the others"
        raise UserError(what, f"set {COORDINATOR}=auto on all of them")


def _await_coordinator(address: str, timeout: int) -> None:
    """Returns once something listens at `address`; where nothing does, jax would abort the process."""
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except (OSError, OverflowError) as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"{COORDINATOR}={address} does not answer within {timeout} s ({error})",
                    f"start process 0 there, check address, port and firewall, or raise {TIMEOUT}",
                ) from error
        time.sleep(0.2)


def is_main() -> bool:
    """Whether this process writes the logs, previews and files of the run."""
    return jax.process_index() == 0


def check_same(what: str, value: Callable[[], str]) -> None:
    """Raises UserError on all hosts unless all have the same value: each would take its own part of another step."""
    if jax.process_count() == 1:
        return
    found = multihost_utils.process_allgather(np.uint32(zlib.crc32(value().encode("utf-8", "surrogateescape"))))
    if len(others := np.flatnonzero(found != found[0])):
        listed = ", ".join(map(str, others))
        raise UserError(f"{what} is not the same on all hosts: processes {listed} have another than process 0",
                        "start the same command on every host, of the same version and on the same files")  # fmt: skip


def check_shared(folder: Path) -> None:
    """Raises UserError on all hosts unless all see one folder: writing to one each, they would finish no checkpoint."""
    if jax.process_count() == 1:
        return
    number = int(multihost_utils.broadcast_one_to_all(np.uint32(secrets.randbits(32))))
    mark = folder / f".shared-{number}"
    if is_main():
        mark.touch()
    multihost_utils.sync_global_devices("unclip_jax: the folder is marked")
    visible = multihost_utils.process_allgather(np.array(_appears(mark)))
    if is_main():
        mark.unlink()
    if not visible.all():
        blind = ", ".join(map(str, np.flatnonzero(~visible.ravel())))
        what = f"workdir {folder} is not one folder for all hosts: processes {blind} do not see what process 0 writes"
        raise UserError(what, "give one on a file system that all mount")


def _appears(mark: Path, within: float = 30.0) -> bool:
    """Whether a file is seen in time; over a network that may take some seconds."""
    deadline = time.monotonic() + within
    while not (there := mark.exists()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return there


def leave(code: int) -> None:
    """Ends this process at once where it is one of several, all of which go on or wait: at a usual end jax would wait
    for them, and they for it. They end once they miss its heartbeat; as soon as process 0 ends, which therefore lets
    those first that have the same to tell."""
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        if is_main():
            time.sleep(GRACE)
        os._exit(code)


class StopSignals:
    """Within `with`, the first SIGTERM or Ctrl-C asks for a stop (`reached`); a second Ctrl-C interrupts at once.

    Among several processes jax's own service hears SIGTERM and tells the others; Ctrl-C is passed on to it. Afterwards
    the previous handlers are back. Outside the main thread none are installed.
    """

    def __init__(self):
        self._heard, self._asked, self._previous = False, 0, {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            several = jax.distributed.is_initialized()
            for number in (signal.SIGINT,) if several else (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._hear)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _hear(self, number: int, _) -> None:
        self._heard = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if jax.distributed.is_initialized():
                os.kill(os.getpid(), signal.SIGTERM)

    def reached(self) -> bool:
        """Whether to save and stop now; True at the same asking on every host, all of which must ask equally often."""
        self._asked += 1
        if jax.distributed.is_initialized():
            return bool(multihost_utils.reached_preemption_sync_point(self._asked))
        return self._heard


def _found_by_jax(env) -> bool:
    several = any(
        _whole(env, name, 1, low=0) > 1 for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
    )
    slice_hosts = [host for host in env.get("TPU_WORKER_HOSTNAMES", "").split(",") if host.strip()]
    return (
        several
        or len(slice_hosts) > 1
        or env.get(COORDINATOR) == "auto"
        or "MEGASCALE_COORDINATOR_ADDRESS" in env
    )


def _explicit(env) -> dict | None:
    """The keywords of jax.distributed.initialize that the environment spells out, or None."""
    given = [name for name in (COORDINATOR, PROCESSES, PROCESS_ID) if env.get(name)]
    if not given or given == [COORDINATOR] and env[COORDINATOR] == "auto":
        return None
    missing = [name for name in (COORDINATOR, PROCESSES, PROCESS_ID) if name not in given]
    if missing:
        raise UserError(
            f"{' and '.join(given)} must come with {' and '.join(missing)}", "set all three or none"
        )
    address = env[COORDINATOR]
    if not re.fullmatch(r"\S+:\d{1,5}", address) or int(address.rpartition(":")[2]) > 65535:
        raise UserError(f"{COORDINATOR}={address!r} must be host:port", "such as 10.0.0.1:8476")
    processes, process_id = _whole(env, PROCESSES, 1, low=1), _whole(env, PROCESS_ID, 0, low=0)
    if process_id >= processes:
        raise UserError(
            f"{PROCESS_ID}={process_id} must be below {PROCESSES}={processes} (they count from 0)"
        )
    return {"coordinator_address": address, "num_processes": processes, "process_id": process_id}


def _whole(env, name: str, default: int, low: int) -> int:
    text = env.get(name) or str(default)
    if not text.isdecimal() or int(text) < low:
        raise UserError(f"{name}={text!r} must be a whole number >= {low}")
    return int(text)
