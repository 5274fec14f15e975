"""Settings are read strictly; two processes train as one, stop at the same step and leave one checkpoint."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny_runs
from unclip_jax import checkpoint, checkpoint_read, distributed, sharding
from unclip_jax.errors import UserError
from unclip_jax.run import make_run

ROOT = Path(__file__).parent.parent
FULL = {"UNCLIP_COORDINATOR": "127.0.0.1:9", "UNCLIP_PROCESSES": "2", "UNCLIP_PROCESS_ID": "1"}


@pytest.mark.parametrize(
    "change, told",
    [
        ({"UNCLIP_PROCESSES": ""}, "must come with UNCLIP_PROCESSES"),
        ({"UNCLIP_COORDINATOR": ""}, "must come with UNCLIP_COORDINATOR"),
        ({"UNCLIP_COORDINATOR": "host"}, "host:port"),
        ({"UNCLIP_COORDINATOR": "host:65536"}, "host:port"),
        ({"UNCLIP_PROCESSES": "0"}, ">= 1"),
        ({"UNCLIP_PROCESSES": "two"}, "whole number"),
        ({"UNCLIP_PROCESS_ID": "2"}, "UNCLIP_PROCESS_ID=2 must be below UNCLIP_PROCESSES=2"),
        ({"UNCLIP_PROCESS_ID": "-1"}, ">= 0"),
        ({"UNCLIP_TIMEOUT": "soon"}, "UNCLIP_TIMEOUT='soon'"),
        ({"UNCLIP_HEARTBEAT": "2"}, "UNCLIP_HEARTBEAT='2' must be a whole number >= 5"),
    ],
)
def test_bad_settings_are_refused(monkeypatch, change, told):
    for name, value in {**FULL, **change}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as error:
        distributed.initialize()
    assert told in str(error.value)


@pytest.mark.parametrize("settings", [{}, {**FULL, "UNCLIP_PROCESSES": "1", "UNCLIP_PROCESS_ID": "0"}])
def test_one_process_needs_nothing(monkeypatch, settings):
    for name in FULL:
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    distributed.initialize()
    assert not jax.distributed.is_initialized() and distributed.is_main()


def test_a_process_of_an_mpi_that_jax_does_not_know_does_not_train_alone(monkeypatch):
    for name in FULL:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PMI_SIZE", "2")
    with pytest.raises(UserError, match="PMI_SIZE=2: .* UNCLIP_PROCESSES=.PMI_SIZE and UNCLIP_PROCESS_ID=.PMI_RANK"):
        distributed.initialize()


@pytest.mark.parametrize("setting", [("OMPI_COMM_WORLD_SIZE", "2"), ("UNCLIP_COORDINATOR", "auto")])
def test_where_jax_finds_no_hosts_the_remedy_is_to_name_them(setting):
    """In a process of its own, where jax has not begun."""
    code = "from unclip_jax import distributed; distributed.initialize()"
    env = {k: v for k, v in os.environ.items() if k not in FULL and not k.startswith("SLURM")} | dict([setting])
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert "does not find the other processes" in done.stderr and "set UNCLIP_COORDINATOR=host:port" in done.stderr


def test_a_host_of_a_slice_does_not_go_on_without_the_others(monkeypatch):
    for name in FULL:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(UserError, match="one of 4 hosts of a TPU slice.*set UNCLIP_COORDINATOR=auto"):
        distributed.initialize()


def test_hosts_compare_config_data_tokenizer_and_the_weights_they_begin_with(monkeypatch, tmp_path):
    def compared(**changes) -> list[str]:
        found = []
        with monkeypatch.context() as patch:
            patch.setattr(distributed, "check_same", lambda what, value: found.append(value()))
            make_run(tiny_runs.config("clip", **changes), tmp_path)
        return found

    (config, *rest), (other, *same) = compared(), compared(batch_size=16)
    assert jax.__version__ in config and config != other and len(rest) == 2 and rest == same

    def begun(scale: float) -> list[str]:
        params, made, _, words = checkpoint_read.load_params(tiny_runs.folder() / "clip")
        given = tmp_path / f"times {scale}"
        tiny_runs.save(given, made, jax.tree.map(lambda a: scale * a, params), words)
        return compared(init=str(given))

    (_, data, one), (_, same_data, two) = begun(1), begun(2)
    assert data == same_data and len({one, two, rest[-1]}) == 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_for_a_stop(number):
    before = signal.getsignal(number)
    with distributed.StopSignals() as stop:
        assert not stop.reached()
        os.kill(os.getpid(), number)
        assert stop.reached() and stop.reached()
        if number == signal.SIGINT:
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), number)
                time.sleep(1)
    assert signal.getsignal(number) is before
    with distributed.StopSignals() as stop:
        assert not stop.reached()


WORKER = """
    import sys, time
    from unclip_jax import distributed
    distributed.initialize()
    import jax, jax.numpy as jnp, numpy as np
    from unclip_jax import checkpoint, sharding
    stop = distributed.StopSignals().__enter__()
    assert jax.process_count() == 2 and jax.device_count() == 4
    mesh = sharding.make_mesh(data=2, fsdp=2)
    rows = np.arange(8, dtype=np.float32).reshape(8, 1)[4 * jax.process_index():][:4]
    batch = sharding.put_batch(rows, sharding.batch_sharding(mesh), 8)
    params = {"w": np.arange(64, dtype=np.float32).reshape(16, 4)}
    shardings = sharding.infer(params, ((".*", "fsdp"),), mesh, min_size=1)
    make = jax.jit(lambda: {"w": jnp.arange(64, dtype=jnp.float32).reshape(16, 4)}, out_shardings=shardings)
    step = jax.jit(lambda p, x: jax.tree.map(lambda w: w + jnp.sum(x), p), out_shardings=shardings)
    params = make()
    for number in range(1, 2000):
        params = step(params, batch)
        jax.block_until_ready(params)
        if number == 3:
            print("READY", flush=True)
        time.sleep(0.01)
        if stop.reached():
            break
    with checkpoint.Checkpoints(sys.argv[1]) as checkpoints:
        checkpoints.save(number, {"params": params}, {"config": "{}"})
        checkpoints.wait()
        abstract = sharding.abstract({"params": params}, {"params": shardings})
        again, _, found = checkpoints.restore(abstract)
    assert found == number
    print("STOPPED", number, distributed.is_main(), flush=True)
"""


def _line(worker, word: str) -> list[str]:
    """The words of the worker's next line that starts with `word`; gloo prints others."""
    return next(line.split() for line in worker.stdout if line.startswith(word))


@pytest.mark.multihost
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_two_processes_stop_together(tmp_path, number):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "UNCLIP_COORDINATOR": f"127.0.0.1:{port}",
        "UNCLIP_PROCESSES": "2",
        "UNCLIP_TIMEOUT": "30",
    }
    command = [sys.executable, "-c", textwrap.dedent(WORKER), str(tmp_path)]
    workers = [
        subprocess.Popen(
            command, cwd=ROOT, env=env | {"UNCLIP_PROCESS_ID": str(i)}, stdout=subprocess.PIPE, text=True
        )
        for i in range(2)
    ]
    try:
        for worker in workers:
            _line(worker, "READY")
        workers[1].send_signal(number)
        ends = [_line(worker, "STOPPED") for worker in workers]
        assert [worker.wait(timeout=60) for worker in workers] == [0, 0]
    finally:
        for worker in workers:
            worker.kill()
            worker.stdout.close()
    step = int(ends[0][1])
    assert ends == [["STOPPED", str(step), "True"], ["STOPPED", str(step), "False"]] and step < 1999
    params, _, found, _ = checkpoint_read.load_params(tmp_path, "params")
    expected = np.arange(64, dtype=np.float32).reshape(16, 4) + 28 * step
    assert found == step
    np.testing.assert_array_equal(params["w"], expected)
    # One process, another mesh.
    mesh = sharding.make_mesh(fsdp=4, devices=jax.devices()[:4])
    shapes = {"params": {"w": jax.ShapeDtypeStruct((16, 4), jnp.float32)}}
    abstract = sharding.abstract(shapes, sharding.infer(shapes, ((".*", "fsdp"),), mesh, min_size=1))
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        state, _, _ = checkpoints.restore(abstract)
    np.testing.assert_array_equal(state["params"]["w"], expected)


WAITING = """
    import sys, time
    from unclip_jax import distributed
    distributed.initialize()
    print("READY", flush=True)
    time.sleep(300)
"""


@pytest.mark.multihost
@pytest.mark.parametrize("dies", [0, 1])
def test_a_dead_process_ends_the_other(dies):
    """Killed without a word, the coordinator or not: the other ends by itself, and not as if all were well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {
        "UNCLIP_COORDINATOR": f"127.0.0.1:{port}",
        "UNCLIP_PROCESSES": "2",
        "UNCLIP_TIMEOUT": "30",
        "UNCLIP_HEARTBEAT": "5",
    }
    command = [sys.executable, "-c", textwrap.dedent(WAITING)]
    quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    workers = [
        subprocess.Popen(command, cwd=ROOT, env=env | {"UNCLIP_PROCESS_ID": str(i)}, **quiet) for i in range(2)
    ]
    try:
        for worker in workers:
            _line(worker, "READY")
        workers[dies].kill()
        assert workers[1 - dies].wait(timeout=120) != 0
    finally:
        for worker in workers:
            worker.kill()
            worker.stdout.close()


def test_an_absent_coordinator_is_told_in_time(monkeypatch):
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        settings = {"UNCLIP_COORDINATOR": f"127.0.0.1:{taken.getsockname()[1]}", "UNCLIP_TIMEOUT": "1"}
        for name, value in {**FULL, **settings}.items():
            monkeypatch.setenv(name, value)
        begin = time.monotonic()
        with pytest.raises(UserError, match="does not answer within 1 s"):
            distributed.initialize()
        assert time.monotonic() - begin < 10


LAYOUTS = """
    import sys
    from unclip_jax import distributed
    distributed.initialize()
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import Mesh
    from unclip_jax import sharding
    rows, axes = np.arange(24, dtype=np.float32).reshape(8, 3), ("data", "fsdp", "tensor")
    found = []
    # Processes side by side, taking turns as on a slice, and one of them for each half of the tensor axis.
    for shape, order in (((4, 1, 1), (0, 1, 2, 3)), ((2, 2, 1), (0, 2, 1, 3)), ((2, 1, 2), (0, 2, 1, 3))):
        mesh = Mesh(np.array(jax.devices())[list(order)].reshape(shape), axes)
        place = sharding.batch_sharding(mesh)
        own = sharding.own_rows(place, 8)
        batch = sharding.put_batch({"x": rows[own], "n": own.astype(np.int32)}, place, 8)
        whole = jax.jit(lambda b: b, out_shardings=sharding.replicated(mesh))(batch)
        np.testing.assert_array_equal(whole["x"].addressable_data(0), rows)
        np.testing.assert_array_equal(whole["n"].addressable_data(0), np.arange(8))
        found.append("".join(map(str, own)))
    print("ROWS", *found, flush=True)
"""


DIFFERING = """
    from unclip_jax import distributed
    from unclip_jax.errors import UserError
    distributed.initialize()
    distributed.check_same("the config", lambda: "of all")
    try:
        distributed.check_same("the config", lambda: f"of {distributed.jax.process_index()}")
    except UserError as error:
        print("ERROR", error, flush=True)
"""


UNSHARED = """
    import sys
    from pathlib import Path
    from unclip_jax import distributed
    from unclip_jax.errors import UserError
    distributed.initialize()
    folder = Path(sys.argv[1]) / (str(distributed.jax.process_index()) if sys.argv[2] == "apart" else "")
    folder.mkdir(exist_ok=True)
    distributed._appears.__defaults__ = (1.0,)
    try:
        distributed.check_shared(folder)
        print("SEEN", flush=True)
    except UserError as error:
        print("ERROR", error, flush=True)
"""


DAMAGED = """
    import sys, warnings
    from pathlib import Path
    from unclip_jax import distributed
    distributed.initialize()
    import jax, jax.numpy as jnp
    from jax.experimental import multihost_utils
    from unclip_jax import checkpoint, sharding
    mesh = sharding.make_mesh(data=1, fsdp=4)
    shapes = {"params": {"w": jax.ShapeDtypeStruct((1024, 1024), jnp.float32)}}
    shardings = sharding.infer(shapes, ((".*", "fsdp"),), mesh)
    make = jax.jit(lambda n: {"params": {"w": n + jax.random.normal(jax.random.key(0), (1024, 1024))}},
                   out_shardings=shardings)
    with checkpoint.Checkpoints(sys.argv[1]) as checkpoints:
        for step in (2, 4):
            checkpoints.save(step, make(step), {"config": "{}"})
        checkpoints.wait()
        if distributed.is_main():
            written = Path(sys.argv[1], "checkpoints", "4", "state", "ocdbt.process_1", "d")
            max(written.iterdir(), key=lambda file: file.stat().st_size).write_bytes(b"")
        multihost_utils.sync_global_devices("damaged")
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            state, _, found = checkpoints.restore(sharding.abstract(shapes, shardings))
    same = bool(jnp.array_equal(state["params"]["w"], make(2)["params"]["w"]))
    print("FOUND", found, same, *(str(one.message) for one in told if "damaged" in str(one.message)), flush=True)
"""


FAILING = """
    import sys, time
    from unclip_jax import cli, distributed, train
    def main():
        distributed.initialize()
        print("READY", flush=True)
        own = distributed.jax.process_index()
        if str(own) in sys.argv[1]:
            time.sleep(own)
            return 2
        time.sleep(300)
    cli.main = main
    cli.script()
"""


def _run_two(code: str, *args: str) -> list[subprocess.Popen]:
    """Two processes of two devices each, which meet."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "UNCLIP_PROCESSES": "2"}
    env |= {"UNCLIP_COORDINATOR": f"127.0.0.1:{port}", "UNCLIP_TIMEOUT": "30", "UNCLIP_HEARTBEAT": "5"}
    command = [sys.executable, "-c", textwrap.dedent(code), *args]
    quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    return [subprocess.Popen(command, cwd=ROOT, env=env | {"UNCLIP_PROCESS_ID": str(i)}, **quiet) for i in range(2)]


def _told(code: str, word: str, *args: str) -> list[str]:
    """What each of two processes has to tell in its line that begins with `word`, both having ended well."""
    workers = _run_two(code, *args)
    try:
        lines = [" ".join(_line(worker, word)[1:]) for worker in workers]
        assert [worker.wait(timeout=60) for worker in workers] == [0, 0]
        return lines
    finally:
        for worker in workers:
            worker.kill()
            worker.stdout.close()


@pytest.mark.multihost
def test_each_process_reads_the_rows_of_its_devices():
    assert _told(LAYOUTS, "ROWS") == ["0123 0145 01234567", "4567 2367 01234567"]


@pytest.mark.multihost
def test_a_folder_that_is_not_shared_is_told_on_every_host(tmp_path):
    assert _told(UNSHARED, "SEEN", str(tmp_path), "together") == ["", ""] and not list(tmp_path.iterdir())
    what = "is not one folder for all hosts: processes 1 do not see what process 0 writes"
    assert all(what in line for line in _told(UNSHARED, "ERROR", str(tmp_path), "apart"))


@pytest.mark.multihost
def test_what_is_not_the_same_on_all_hosts_is_told_on_each():
    what = "the config is not the same on all hosts: processes 1 have another than process 0"
    assert all(line.startswith(what) for line in _told(DIFFERING, "ERROR"))


@pytest.mark.multihost
def test_what_one_process_cannot_read_no_process_restores(tmp_path):
    first, second = _told(DAMAGED, "FOUND", str(tmp_path))
    assert first.startswith("2 True") and "process 1 cannot read it" in first
    assert second.startswith("2 True") and "step 4" in second
    assert [p.name for p in (tmp_path / "damaged").iterdir()] == ["4.1"]


@pytest.mark.multihost
def test_an_error_that_both_have_is_told_by_both():
    """Though the second is a second later: the end of process 0 would abort it."""
    workers = _run_two(FAILING, "01")
    try:
        for worker in workers:
            _line(worker, "READY")
        assert [worker.wait(timeout=60) for worker in workers] == [2, 2]
    finally:
        for worker in workers:
            worker.kill()
            worker.stdout.close()


@pytest.mark.multihost
@pytest.mark.parametrize("fails", [0, 1])
def test_an_error_of_one_process_ends_the_run(fails):
    """With its own exit code at once, and the other's once it is missed."""
    workers = _run_two(FAILING, str(fails))
    try:
        for worker in workers:
            _line(worker, "READY")
        assert workers[fails].wait(timeout=20) == 2
        assert workers[1 - fails].wait(timeout=120) != 0
    finally:
        for worker in workers:
            worker.kill()
            worker.stdout.close()
