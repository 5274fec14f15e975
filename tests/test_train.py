"""The loop: what a step does, what a run writes, and that a config which does not fit is one error and no file.

Most runs here train `tests/toy.py`, a stage that compiles at once; the real ones are in tests/system.
"""

import fcntl
import functools
import inspect
import io
import itertools
import json
import math
import os
import re
import signal
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

from tests import tiny_runs, tiny_stack, toy
from tests.bad_configs import BAD, changed
from unclip_jax import (
    checkpoint,
    checkpoint_read,
    cli,
    cost,
    logs,
    meter,
    optim,
    sharding,
    tasks,
    train,
    train_step,
    weights,
)
from unclip_jax import config as configs
from unclip_jax import run as runs
from unclip_jax.data import loader
from unclip_jax.data.images import BadImage
from unclip_jax.data.shapes import Shapes
from unclip_jax.errors import UserError
from unclip_jax.run import make_run
from unclip_jax.tokenizer import Tokenizer
from unclip_jax.train_step import init_state, make_train_step, step_of

# One step.


@pytest.fixture
def task(monkeypatch):
    return toy.add(monkeypatch)


def start(task, tx):
    state = init_state(task, tx, jax.random.key(0), ema_decay=0.6)
    return state._replace(params={**state.params, "wide": jnp.zeros(4)}, ema={**state.ema, "wide": jnp.zeros(4)})


def grey(value, n=2):
    return {"image": jnp.full((n, 2, 2, 3), value, jnp.float32)}


@pytest.mark.parametrize("every", [1, 3])
def test_average_and_parameters_follow_their_formulas(task, every):
    """SGD on (m - c - jitter)^2: c += 2 lr (m - c - jitter); ema += (1 - d)(c - ema), d = min(0.6, (1+n)/(10+n)).

    n counts updates, of which there is one in `every` steps, by their mean gradient.
    """
    tx, lr, steps = optax.sgd(0.1), 0.1, 20 * every
    tx = tx if every == 1 else optax.MultiSteps(tx, every).gradient_transformation()
    step = jax.jit(make_train_step(task, tx, ema_decay=0.6, seed=5, accumulate=every))
    state = start(task, tx)._replace(opt=tx.init(start(task, tx).params))
    c = ema = np.asarray(state.params["colour"], np.float64)
    decays, slopes = [], []
    for n in range(steps):
        m = math.sin(n)
        rng = jax.random.fold_in(jax.random.key(5), n)
        jitter = 0.1 * np.asarray(jax.random.normal(rng, (3,)), np.float64)
        loss = np.square(m - c - jitter).sum()
        slopes.append(-2 * (m - c - jitter))
        if len(slopes) == every:
            c = c - lr * np.mean(slopes, axis=0)
            slopes, count = [], n // every
            decays.append(min(0.6, (1 + count) / (10 + count)))
            ema = ema + (1 - decays[-1]) * (c - ema)
        state, metrics = step(state, {}, grey(m), n)
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-4)
        np.testing.assert_allclose(state.params["colour"], c, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(state.ema["colour"], ema, rtol=1e-4, atol=1e-6)
    assert int(state.step) == steps and decays[0] == 0.1 and decays[-1] == 0.6


def test_randomness_follows_from_seed_and_step_alone(task):
    tx = optax.sgd(0.0)

    def jitters(seed, numbers):
        step = jax.jit(make_train_step(task, tx, 0.5, seed))
        state = start(task, tx)
        return [float(step(state._replace(step=jnp.int32(n)), {}, grey(0.0), n)[1]["jitter"]) for n in numbers]

    assert jitters(1, [0, 1, 2]) == jitters(1, [0, 1, 2])
    assert jitters(1, [2, 0]) == jitters(1, [0, 1, 2])[::-2]
    assert len({*jitters(1, range(3)), *jitters(2, range(3))}) == 6


def bits(tree):
    return [np.asarray(a).tobytes() for a in jax.tree.leaves(tree)]


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_a_bad_batch_and_all_after_it_change_nothing(task, platform, monkeypatch):
    """By a branch, or, as on a GPU, by a choice of each array."""
    monkeypatch.setattr(train_step, "platform", lambda: platform)
    tx = optax.adam(0.1)
    step = jax.jit(make_train_step(task, tx, 0.9, 0))
    state = start(task, tx)
    state = state._replace(opt=tx.init(state.params))
    state, _ = step(state, {}, grey(0.5), 0)
    for bad in (math.nan, math.inf):
        held, metrics = step(state, {}, grey(bad), 1)
        assert bits(held) == bits(state) and not np.isfinite(metrics["loss"])
    later, metrics = step(held, {}, grey(0.5), 2)
    assert bits(later) == bits(state) and np.isfinite(metrics["loss"])
    after, _ = step(held, {}, grey(0.5), 1)
    assert int(after.step) == 2 and bits(after.params) != bits(state.params)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="of CPUs")
def test_the_optimizer_and_the_average_work_in_place():
    """Beside the state there is room for the gradient, and not for half of one more."""
    size = 2**18
    task = SimpleNamespace(
        init=lambda key: {f"w{i}": jnp.ones((size,)) for i in range(4)},
        encode=lambda frozen, batch: batch,
        loss=lambda p, batch, rng: (sum(jnp.square(jnp.sin(w) - batch["x"]).sum() for w in p.values()), {}),
    )
    tx = optim.make(9, lr=0.1, weight_decay=0.1)
    state = jax.eval_shape(lambda: init_state(task, tx, jax.random.key(0), 0.9))
    step = jax.jit(make_train_step(task, tx, 0.9, 0), donate_argnums=0)
    held = step.lower(state, {}, {"x": np.zeros(size, np.float32)}, 0).compile().memory_analysis()
    assert held.alias_size_in_bytes >= 4 * 4 * 4 * size and held.temp_size_in_bytes < 1.5 * 4 * 4 * size


LOSSES = {
    "gradient": lambda p: jnp.sqrt(p["colour"] - p["colour"]).sum(),  # 0, and its slope is not a number
    "loss": lambda p: p["colour"].sum() + math.inf,
}


@pytest.mark.parametrize("which", LOSSES)
def test_a_gradient_that_is_not_finite_counts_as_a_bad_loss_and_a_loss_does_so_alone(which, task, monkeypatch):
    monkeypatch.setattr(toy.Toy, "loss", lambda self, p, b, r: (LOSSES[which](p), {}))
    tx = optax.sgd(0.1)
    state = start(task, tx)
    held, metrics = jax.jit(make_train_step(task, tx, 0.9, 0))(state, {}, grey(0.5), 0)
    assert bits(held) == bits(state) and not np.isfinite(metrics["loss"])


def test_a_configs_numbers_are_those_of_its_step(task):
    config, tx = toy.config(ema_decay=0.5, seed=7), optax.sgd(0.1)
    with config.unlocked():
        config.optim.update(sam_rho=0.2, accumulate=2)
    made = [step_of(config, task, tx), make_train_step(task, tx, 0.5, 7, sam_rho=0.2, accumulate=2)]
    for number in (38, 39):  # with and without a step of the average, late enough for its whole decay
        state = start(task, tx)._replace(step=jnp.int32(number))
        of_config, by_hand = (step(state, {}, grey(0.4), number)[0] for step in made)
        assert bits(of_config) == bits(by_hand)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_climbs_before_it_descends(task, accumulate):
    """SAM on (m - c - jitter)^2 + mean(wide^2), SGD, in numpy: both gradients see the same batch and the same noise."""
    rho, lr = 0.2, 0.1
    tx = optax.MultiSteps(optax.sgd(lr), accumulate) if accumulate > 1 else optax.sgd(lr)
    step = jax.jit(make_train_step(task, tx, 0.5, 5, sam_rho=rho))
    state = start(task, tx)
    state = state._replace(params={**state.params, "wide": jnp.full(4, 0.3)})
    state = state._replace(opt=tx.init(state.params))
    p = np.concatenate([state.params["colour"], state.params["wide"]]).astype(np.float64)
    held = []
    for n in range(4):
        m = math.cos(n)
        jitter = 0.1 * np.asarray(jax.random.normal(jax.random.fold_in(jax.random.key(5), n), (3,)), np.float64)
        slope = lambda at, m=m, j=jitter: np.concatenate([-2 * (m - at[:3] - j), 2 * at[3:] / 4])  # noqa: E731
        here = slope(p)
        held.append(slope(p + rho * here / np.linalg.norm(here)))
        loss = np.square(m - p[:3] - jitter).sum() + np.square(p[3:]).mean()
        state, metrics = step(state, {}, grey(m), n)
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-4)
        np.testing.assert_allclose(metrics["grad_norm"], np.linalg.norm(held[-1]), rtol=1e-4)
        if len(held) == accumulate:
            p, held = p - lr * np.mean(held, axis=0), []
        np.testing.assert_allclose(np.concatenate([state.params["colour"], state.params["wide"]]), p, rtol=1e-4)
    held, metrics = step(state, {}, grey(math.nan), 4)
    assert bits(held) == bits(state) and np.isnan(metrics["loss"])


def test_the_norm_that_clips_is_the_gradient_s(task):
    tx = optax.chain(optim.clip(0.1), optax.sgd(1.0))
    state = start(task, tx)
    new, metrics = make_train_step(task, tx, 0.5, 5)(state, {}, grey(5.0), 0)
    apart = jax.tree.map(lambda a, b: np.square(a - b, dtype=np.float64).sum(), new.params, state.params)
    assert math.sqrt(sum(jax.tree.leaves(apart))) == pytest.approx(0.1, rel=1e-5) and metrics["grad_norm"] > 1


def test_the_average_starts_in_arrays_of_its_own(task):
    """A step uses the memory of both again."""
    state = init_state(task, optax.sgd(0.1), jax.random.key(0), 0.9)
    assert bits(state.ema) == bits(state.params) and state.ema.keys() == state.params.keys()
    assert all(state.ema[name] is not state.params[name] for name in state.ema)


def test_climbing_on_eight_devices_is_climbing_on_one(task):
    tx, config = optax.sgd(0.1), toy.config()
    state = init_state(task, tx, jax.random.key(0), ema_decay=0.6)
    step = make_train_step(task, tx, 0.5, 5, sam_rho=0.2)
    expected = jax.jit(step)(state, {}, grey(0.3, 8), 0)[0]
    mesh = sharding.make_mesh(data=2, fsdp=4)
    shardings = sharding.infer(state, config.rules, mesh)
    batch = jax.device_put(grey(0.3, 8), sharding.batch_sharding(mesh))
    got = jax.jit(step, out_shardings=(shardings, None))(jax.device_put(state, shardings), {}, batch, 0)[0]
    assert not got.params["wide"].is_fully_replicated
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), got, expected)


def test_a_gradient_that_is_not_finite_above_counts_as_a_bad_loss(task, monkeypatch):
    """sqrt(0.1 - c) is real at c = 0 and slopes away from where c is 0.1."""
    monkeypatch.setattr(toy.Toy, "loss", lambda self, p, b, r: (-jnp.sqrt(0.1 - p["colour"][0]), {}))
    tx = optax.sgd(0.1)
    state = start(task, tx)
    state = state._replace(params={**state.params, "colour": jnp.zeros(3)})
    held, metrics = jax.jit(make_train_step(task, tx, 0.9, 0, sam_rho=0.2))(state, {}, grey(0.5), 0)
    assert bits(held) == bits(state) and np.isnan(metrics["loss"])


def test_the_step_and_the_loop_stay_readable():
    assert len(inspect.getsource(make_train_step).splitlines()) < 40
    assert len(inspect.getsource(train.train).splitlines()) < 80


# One run.


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").open()]


def state_of(workdir, which="params"):
    params, _, step, _ = checkpoint_read.load_params(workdir, which)
    return step, params


def events(file):
    """Of TensorBoard's file: each is its length (u64), a checksum (u32), its bytes and another checksum."""
    from tensorboardX.proto.event_pb2 import Event

    data, begin, read = file.read_bytes(), 0, []
    while begin < len(data):
        end = begin + 12 + int.from_bytes(data[begin : begin + 8], "little")
        read.append(Event.FromString(data[begin + 12 : end]))
        begin = end + 4
    return read


def test_what_a_run_writes(task, tmp_path, capsys):
    config = toy.config(every__preview=5, every__eval=4, eval__batches=3, every__save=3, keep=2)
    workdir = tmp_path / "a" / "run"
    assert train.train(config, workdir) == 0
    assert {p.name for p in workdir.iterdir()} == {
        ".lock", "checkpoints", "config.json", "metrics.jsonl", "previews", "tb"
    }  # fmt: skip
    assert sorted(int(p.name) for p in (workdir / "checkpoints").iterdir()) == [6, 8]
    assert configs.diff(configs.from_json((workdir / "config.json").read_text()), config) == []
    assert configs.diff(checkpoint_read.peek(workdir)[0], config) == []
    written = lines(workdir)
    losses = [line for line in written if "loss" in line]
    assert [line["step"] for line in losses] == list(range(1, 9))
    assert {"loss", "grad_norm", "jitter", "learning_rate"} < losses[0].keys()
    for line in losses:
        assert 0 <= line["input_wait"] <= 1 and 0 < line["goodput"] < 1 and line["checkpoint_seconds"] >= 0
        assert line["images_per_second"] > 0 and "mfu" not in line  # a CPU's peak is not known
        assert line["device_flops_per_second"] == 0  # no products of matrices
    assert losses[3]["checkpoint_seconds"] > losses[2]["checkpoint_seconds"] == 0  # every third step is saved
    assert losses[-1]["loss"] < losses[0]["loss"]
    assert sorted(p.name for p in (workdir / "previews").iterdir()) == ["step_0000005.png", "step_0000008.png"]
    (file,) = (workdir / "tb").iterdir()
    version, begun, *told = events(file)
    assert version.file_version == "brain.Event:2" and begun.step == 1 and begun.session_log.status == 1  # START
    for event, line in zip(told, written, strict=True):
        scalars = {value.tag: value.simple_value for value in event.summary.value}
        assert {"step": event.step, **scalars} == pytest.approx(line, rel=1e-6)
    # The held-out metric is of the averaged weights, on the first batches of the split.
    measured = [line for line in written if "eval/error" in line]
    assert [line["step"] for line in measured] == [4, 8]
    run = make_run(config, workdir)
    stream = loader.batches(run.held_out, None, 8, seed=config.seed)
    means = np.concatenate([next(stream)["image"].mean((1, 2)) for _ in range(3)])
    colour = np.asarray(state_of(workdir, "ema")[1]["colour"])
    assert measured[-1]["eval/error"] == pytest.approx(np.abs(means - colour).mean(), rel=1e-4)
    assert task.traces.count("evaluate") == 2  # once when rehearsed, once for all that follow


def test_preview_shows_the_same_held_out_pictures_for_any_number_of_devices(task, tmp_path):
    config = toy.config(every__preview=4, eval__preview=3)  # drawn are 8: one for each device
    assert train.train(config, tmp_path) == 0
    first, last = (np.asarray(Image.open(p)) for p in sorted((tmp_path / "previews").iterdir()))
    assert first.shape == last.shape
    top = slice(0, first.shape[0] // 2)
    assert np.array_equal(first[top], last[top]) and not np.array_equal(first, last)


def test_a_finished_run_says_so_and_does_nothing(task, tmp_path, capsys):
    config = toy.config()
    train.train(config, tmp_path)
    before = lines(tmp_path)
    capsys.readouterr()
    assert train.train(config, tmp_path) == 0
    assert f"already finished: {tmp_path} is at step 8 of 8" in capsys.readouterr().err
    assert lines(tmp_path) == before
    shorter = toy.config(num_steps=5)
    assert train.train(shorter, tmp_path) == 0
    assert "is at step 8 of 5" in capsys.readouterr().err


def test_more_steps_go_on_from_the_last(task, tmp_path):
    """The rate is constant here, so that the longer run is the run that was longer from the start."""
    train.train(toy.config(num_steps=5), tmp_path / "parts")
    with (tmp_path / "parts" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "loss": 1}\nnot JSON\n[7]\n')  # of a process that died
    changes = {"num_steps": 9, "every__log": 2, "every__save": 3, "keep": 1, "loader__num_threads": 1}
    assert train.train(toy.config(**changes), tmp_path / "parts") == 0
    train.train(toy.config(num_steps=9), tmp_path / "whole")
    assert [line["step"] for line in lines(tmp_path / "parts")] == [1, 2, 3, 4, 5, 6, 8, 9]
    first, second = state_of(tmp_path / "parts"), state_of(tmp_path / "whole")
    assert first[0] == second[0] == 9 and bits(first[1]) == bits(second[1])


def test_logged_rate_is_that_of_the_step(task, tmp_path):
    config = toy.config(optim__warmup=4)
    with config.unlocked():
        config.optim.schedule = "cosine"
    train.train(config, tmp_path)
    rate = optim.learning_rate(8, **config.optim)
    np.testing.assert_allclose([x["learning_rate"] for x in lines(tmp_path)], [rate(n) for n in range(8)], rtol=1e-6)
    assert lines(tmp_path)[3]["learning_rate"] == pytest.approx(config.optim.lr)


@pytest.fixture
def poison(monkeypatch):
    """poison(n): training's batch n, from 0, holds one pixel that is not a number."""

    def poison(number):
        made = loader.batches

        def batches(source, tokenizer, size, *, start_step=0, **settings):
            for n, batch in enumerate(made(source, tokenizer, size, start_step=start_step, **settings), start_step):
                if n == number:
                    batch["image"][0, 0, 0, 0] = np.nan
                yield batch

        batches.__signature__ = inspect.signature(made)
        monkeypatch.setattr(loader, "batches", batches)

    return poison


def test_a_loss_that_is_not_finite_stops_the_run_with_the_good_state_saved(task, tmp_path, poison):
    """The loss is looked at every fourth step only; the steps after the bad one must leave no trace."""
    train.train(toy.config(num_steps=5), tmp_path / "clean")
    poison(5)
    with pytest.raises(UserError, match=r"loss or gradient at step 6 is not .* step 5 is saved. Fix: lower optim.lr"):
        train.train(toy.config(every__log=4, every__save=50), tmp_path / "bad")
    for which in ("params", "ema"):
        clean, saved = (state_of(tmp_path / name, which) for name in ("clean", "bad"))
        assert clean[0] == saved[0] == 5 and bits(clean[1]) == bits(saved[1])
    assert lines(tmp_path / "bad")[-1]["loss"] is None
    with pytest.raises(UserError, match="at step 6"):
        train.train(toy.config(every__log=4, every__save=50), tmp_path / "bad")


def test_a_loss_that_is_not_finite_is_told_after_a_stop_signal_too(task, tmp_path, poison, monkeypatch):
    """It came between two log lines, and the signal in the evaluation after it."""
    poison(1)
    plain = logs.Checks.evaluate

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return plain(*args)

    monkeypatch.setattr(logs.Checks, "evaluate", interrupted)
    with pytest.raises(UserError, match="at step 2 is not a finite number; step 1 is saved"):
        train.train(toy.config(every__log=50, every__save=50, every__eval=3), tmp_path)
    assert checkpoint_read.peek(tmp_path)[1] == 1 and lines(tmp_path)[-1]["loss"] is None


def test_what_breaks_off_the_loop_costs_no_step(task, tmp_path, monkeypatch):
    train.train(toy.config(num_steps=3), tmp_path / "whole")
    made = loader.batches

    def batches(*args, **settings):
        for number, batch in enumerate(made(*args, **settings)):
            if number == 3:
                raise RuntimeError("a reader has ended")
            yield batch

    batches.__signature__ = inspect.signature(made)
    monkeypatch.setattr(loader, "batches", batches)
    with pytest.raises(RuntimeError, match="a reader has ended"):
        train.train(toy.config(every__log=50, every__save=50), tmp_path / "cut")
    (whole, a), (cut, b) = (state_of(tmp_path / name, "params") for name in ("whole", "cut"))
    assert whole == cut == 3 and bits(a) == bits(b)


def test_a_run_outlives_who_reads_its_progress(task, tmp_path, monkeypatch):
    reads, writes = os.pipe()
    os.close(reads)
    gone = os.fdopen(writes, "wb", buffering=0)
    with pytest.raises(BrokenPipeError):
        gone.write(b"heard?")
    monkeypatch.setattr("sys.stderr", io.TextIOWrapper(gone, write_through=True))
    assert train.train(toy.config(every__log=1), tmp_path) == 0
    monkeypatch.undo()
    gone.close()
    assert checkpoint_read.peek(tmp_path)[1] == toy.config().num_steps


def test_a_checkpoint_that_cannot_be_written_is_told_at_the_next_log_line(task, tmp_path, monkeypatch):
    train.train(toy.config(num_steps=2, every__save=2), tmp_path)
    checked = []

    def full(manager):
        checked.append(1)
        if len(checked) > 1:  # the second step's metrics are being written
            raise ValueError("RESOURCE_EXHAUSTED: Error writing: No space left on device")

    monkeypatch.setattr(checkpoint.ocp.CheckpointManager, "check_for_errors", full)
    with pytest.raises(UserError, match="checkpoint could not be written in .*No space left.* Fix: see to the disk"):
        train.train(toy.config(num_steps=20, every__log=1, every__save=50), tmp_path)
    assert [line["step"] for line in lines(tmp_path)][-1] == 3


def test_a_workdir_without_locks_is_not_called_in_use(task, tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(UserError, match="no file can be locked .Function not implemented.. Fix: mount it with locks"):
        train.train(toy.config(), tmp_path)


def test_a_run_without_an_average_keeps_none_and_learns_the_same(task, tmp_path):
    error = []
    for decay in (0.9, 0.0):
        made = toy.config(num_steps=4, every__eval=4, eval__batches=1, every__save=2, ema_decay=decay)
        train.train(made, tmp_path / str(decay))
        error += [line["eval/error"] for line in lines(tmp_path / str(decay)) if "eval/error" in line]
    learned, given = state_of(tmp_path / "0.9", "params"), state_of(tmp_path / "0.0", "ema")
    assert learned[0] == given[0] == 4 and bits(learned[1]) == bits(given[1])
    assert bits(state_of(tmp_path / "0.9", "ema")[1]) != bits(given[1])
    assert len(error) == 2 and error[0] != error[1]  # of the average, and of the parameters
    run = make_run(toy.config(ema_decay=0.0), tmp_path / "new")
    assert run.shapes.ema is None and run.shapes.averaged is run.shapes.params


def test_the_very_first_batch_may_be_bad(task, tmp_path, poison):
    poison(0)
    with pytest.raises(UserError, match="at step 1 .* step 0 is saved"):
        train.train(toy.config(), tmp_path)


def test_the_command_passes_on_the_exit_code(task, tmp_path, monkeypatch, capsys):
    """75 after a stop signal, then 0, then 0 and a word."""
    config = toy.config()
    monkeypatch.setattr(configs, "load_config", lambda spec, overrides: config)
    add, seen = logs.Logs.add, []

    def stop(self, metrics):
        seen.append(metrics)
        if len(seen) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        add(self, metrics)

    monkeypatch.setattr(logs.Logs, "add", stop)
    command = ["train", "--config", "toy.py", "--workdir", str(tmp_path)]
    before = signal.getsignal(signal.SIGTERM)
    assert cli.main(command) == 75
    assert "stop signal: step 3 is saved" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before
    assert cli.main(command) == 0 and len(seen) == 8
    assert "finished" not in capsys.readouterr().err
    assert cli.main(command) == 0 and len(seen) == 8
    assert "already finished" in capsys.readouterr().err


def test_a_stage_without_clip_trains_its_tokenizer_once(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "TOKENIZER_CAPTIONS", 50)
    config = tiny_runs.config("clip", tokenizer__path="", tokenizer__vocab_size=300)
    run = make_run(config, tmp_path)
    assert 259 < run.tokenizer.vocab_size <= 300 and run.tokenizer.max_len == config.tokenizer.max_len
    assert run.config.tokenizer.vocab_size == run.tokenizer.vocab_size == run.task.model.text["vocab_size"]
    train._write_once(run)
    monkeypatch.setattr(runs, "TOKENIZER_CAPTIONS", 20)
    other = make_run(config, tmp_path).tokenizer.to_json()
    assert other != run.tokenizer.to_json()  # nothing was saved yet, so nothing is kept
    (tmp_path / "checkpoints" / "4").mkdir(parents=True)
    assert make_run(config, tmp_path).tokenizer.to_json() == run.tokenizer.to_json()


def test_speeds_told_are_by_a_clock_and_a_closed_form(task, tmp_path, monkeypatch):
    """A product of 256 x 256 matrices and its two gradients, on eight devices; the clock ticks from lap to lap."""
    ticks, plain = itertools.count(), toy.Toy.loss
    monkeypatch.setattr(train, "Meter", lambda: meter.Meter(clock=lambda: next(ticks)))
    monkeypatch.setattr(meter, "PEAKS", {"cpu": 1e9})

    def loss(self, params, batch, rng):
        square = params["wide"].reshape(256, 256)
        value, told = plain(self, params, batch, rng)
        return value + 1e-9 * jnp.sum(square @ square), told

    monkeypatch.setattr(toy.Toy, "loss", loss)
    assert train.train(toy.config(num_steps=3, every__save=50), tmp_path) == 0
    for line in lines(tmp_path)[1:]:  # input, and what is left of the step before and after the line of the log
        assert line["images_per_second"] == pytest.approx(8 / 3) and line["input_wait"] == pytest.approx(1 / 3)
        assert line["device_flops_per_second"] == pytest.approx(3 * 2 * 256**3 / 8 / 3)
        assert line["mfu"] == pytest.approx(2 * 256**3 / 8 / 1e9)


def test_recomputation_is_no_use():
    """What is counted for the FLOPs told does not depend on it; a step that recomputes has more."""
    made, counts = tiny_stack.configs()["clip"], []
    for remat in (False, True):
        made.model.vision.remat = made.model.text.remat = remat
        task = tasks.make(made)
        plain = tasks.without_remat(task, made)
        assert (plain is task) != remat
        batch = {"image": jnp.ones((2, 16, 16, 3)), "tokens": jnp.ones((2, 32), int), "mask": jnp.ones((2, 32), bool)}
        slope = lambda params, task=task: jax.grad(lambda p: task.loss(p, batch, None)[0])(params)  # noqa: B023, E731
        params = tiny_stack.weights(made)
        counts.append(cost.count_flops(slope, params))
    assert counts[0] < counts[1]
    counts.append(cost.count_flops(functools.partial(slope, task=plain), params))
    assert counts[0] == counts[2]


@pytest.mark.parametrize(("steps", "first", "last"), [(8, 2, 4), (3, 2, 3), (1, 1, 1)])
def test_a_profile_of_a_few_steps(steps, first, last, task, tmp_path, monkeypatch, capsys):
    traced, before = [], logs.Trace.before
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: traced.append(folder))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: traced.append("end"))

    def spy(self, number):
        before(self, number)
        traced.append(number) if self.running else None

    monkeypatch.setattr(logs.Trace, "before", spy)
    assert train.train(toy.config(num_steps=steps), tmp_path / "run", tmp_path / "trace") == 0
    assert traced == [str(tmp_path / "trace"), *range(first, last + 1), "end"]
    assert f"steps {first} to {last} are traced in {tmp_path / 'trace'}" in capsys.readouterr().err


def test_the_command_writes_a_trace(task, tmp_path, monkeypatch, capsys):
    config = toy.config(num_steps=5)
    monkeypatch.setattr(configs, "load_config", lambda spec, overrides: config)
    trace = str(tmp_path / "a/trace")
    command = ["train", "--config", "toy.py", "--workdir", str(tmp_path / "run"), "--profile", trace]
    assert cli.main(command) == 0
    (written,) = (tmp_path / "a/trace").rglob("*.xplane.pb")
    assert written.stat().st_size > 1000
    (tmp_path / "file").touch()
    assert cli.main([*command[:-1], str(tmp_path / "file")]) == 2
    assert "must be a folder that can be written" in capsys.readouterr().err


# What does not fit: one error in one line, and not even the folder is made.


@pytest.mark.parametrize(("stage", "changes", "words"), BAD.values(), ids=BAD)
def test_a_config_that_does_not_fit(stage, changes, words, task, tmp_path):
    with pytest.raises(UserError, match=words) as error:
        train.train(changed(stage, changes), tmp_path / "run")
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    assert not list(tmp_path.iterdir())


def test_a_split_without_a_picture_is_told_with_what_helps(tmp_path, task):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for k in range(3):
        Image.new("RGB", (32, 32)).save(folder / f"{k}.png")
    own = {"source": "folder", "path": str(folder), "captions": False, "split": "all", "size": 32}
    config = toy.config(every__eval=2)
    with config.unlocked():
        config.data = own
    with pytest.raises(UserError, match="nothing to measure on, eval.split='test'.*Fix: set --config.eval.split="):
        train.train(config, tmp_path / "run")


def test_a_split_smaller_than_a_batch_is_told(tmp_path, task):
    for k in range(200):
        Image.new("RGB", (16, 16), (k, 0, 0)).save(tmp_path / f"{k}.png")
    config = toy.config(every__eval=2)
    with config.unlocked():
        config.data = {"source": "folder", "path": str(tmp_path), "captions": False, "split": "train", "size": 16}
        config.batch_size = 40
    with pytest.warns(UserWarning, match="eval.split='test' has [1-9] examples, fewer than a batch"):
        make_run(config, tmp_path / "run")


def test_a_path_without_its_flag_is_told_of_it(capsys):
    assert cli.main(["data", "check", "folder", "my pictures"]) == 2
    assert capsys.readouterr().err == "error: argument 'my pictures' has no flag. Fix: write --path 'my pictures'\n"
    assert cli.main(["data", "check", "folder", "--path", "my", "pictures"]) == 2
    assert "put texts in quotes" in capsys.readouterr().err


def test_a_state_larger_than_the_memory_is_refused(tmp_path, monkeypatch):
    """Parameters, average, two moments and a gradient, in f32, on each of eight devices, which may share them."""
    config = tiny_runs.config("prior_diffusion", model__width=512, mesh__data=2, mesh__fsdp=4)
    run = make_run(config, tmp_path)
    state = run.shapes._replace(step=jax.tree.map(lambda a: a, run.shapes.params))  # once more, for the gradient
    places = run.shardings._replace(step=run.shardings.params)
    parts = jax.tree.map(lambda a, place: math.prod(place.shard_shape(a.shape)) * 4, state, places)
    needed = sum(jax.tree.leaves(parts))
    assert needed < 0.3 * sum(4 * math.prod(a.shape) for a in jax.tree.leaves(state))
    monkeypatch.setattr(runs, "_memory", lambda mesh: needed + 4)
    make_run(config, tmp_path)
    monkeypatch.setattr(runs, "_memory", lambda mesh: needed - 4)
    told = r"take 0.02 GiB of each device, which has 0.02 GiB. Fix: .* mesh.fsdp; `unclip plan` says"
    with pytest.raises(UserError, match=told):
        make_run(config, tmp_path)
    monkeypatch.setattr(runs, "_memory", lambda mesh: None)
    make_run(config, tmp_path)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="of CPUs")
def test_a_cpus_devices_share_the_hosts_memory():
    one, eight = (runs._memory(sharding.make_mesh(devices=jax.devices()[:n])) for n in (1, 8))
    assert one == pytest.approx(8 * eight, rel=0.2) and 2**28 < one < 2**45


@pytest.mark.parametrize(("stats", "limit"), [({"bytes_limit": 7}, 7), ({}, None), (None, None)])
def test_an_accelerator_tells_its_own_memory(stats, limit):
    device = SimpleNamespace(platform="gpu", memory_stats=lambda: stats)
    assert runs._memory(SimpleNamespace(local_devices=[device])) == limit


@pytest.mark.parametrize("stage", ["decoder", "clip", "upsampler"])
def test_embeddings_train_priors_only(stage, tmp_path, monkeypatch):
    config = tiny_runs.config(stage)
    identity = tasks.load_clip(tiny_runs.folder() / "clip").identity
    monkeypatch.setattr(runs.data, "make", lambda **_: SimpleNamespace(clip_identity=identity, digest=str))
    with pytest.raises(UserError, match=f"holds embeddings, and the task {stage} learns from pictures. Fix: give a"):
        make_run(config, tmp_path / "run")


def test_the_tokenizer_is_trained_on_what_can_be_read():
    class Damaged(Shapes):
        def caption(self, i):
            if i % 3 == 1:
                raise BadImage("damaged")
            return f"number {i}"

    assert list(Damaged().captions(6)) == ["number 0", "number 2", "number 3", "number 5"]


def test_a_clip_path_that_holds_another_stage(tmp_path):
    made = tiny_stack.configs()["upsampler"]
    tiny_runs.save(tmp_path / "other", made, {"a": np.ones(3)}, None)
    with pytest.raises(UserError, match="holds a run of the task 'upsampler', not 'clip'"):
        train.train(changed("decoder", {"clip": str(tmp_path / "other")}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["run", "stack"])
def test_a_run_starts_from_the_averaged_weights_it_is_given(kind, tmp_path):
    made = tiny_runs.config("upsampler")
    params = jax.tree.map(np.float32, tiny_stack.weights(made))
    if kind == "run":
        tiny_runs.save(tmp_path / "first", made, params, None)
    else:
        weights.save_stack(tmp_path / "first", {"upsampler": (params, made, 1, {})}, "{}", "float32")
    run = make_run(changed("upsampler", {"init": str(tmp_path / "first")}), tmp_path / "run")
    state = train._fresh(run, None)
    assert int(state.step) == 0
    for tree in (state.params, state.ema):
        jax.tree.map(np.testing.assert_array_equal, tree, params)


def test_a_clip_that_starts_from_weights_keeps_their_words(tmp_path):
    """By other numbers for the pieces it would read other texts."""
    stack, told = tiny_stack.path(), tiny_stack.tokenizer().to_json()
    model = weights.load_stack(stack, ["clip"]).stages["clip"][1].model
    clip = {"model": model, "init": str(stack), "tokenizer.vocab_size": 300}
    run = make_run(changed("clip", clip), tmp_path / "run")
    assert run.tokenizer.to_json() == told
    train._write_once(run)
    (tmp_path / "run" / "checkpoints" / "4").mkdir(parents=True)
    assert make_run(changed("clip", clip), tmp_path / "run").tokenizer.to_json() == told

    given = Tokenizer.train(["a red circle", "two blue rings"], 300, 32)
    (tmp_path / "given.json").write_text(given.to_json())
    with pytest.raises(UserError, match="holds another network: textual"):
        make_run(changed("clip", {**clip, "tokenizer.path": str(tmp_path / "given.json")}), tmp_path / "other")


def test_weights_to_start_from_must_be_of_the_same_network(tmp_path):
    made = tiny_runs.config("upsampler")
    tiny_runs.save(tmp_path / "first", made, tiny_stack.weights(made), None)
    init = {"init": str(tmp_path / "first")}
    with pytest.raises(UserError, match="is .*, and config.model asks for .*Fix: take the config.model"):
        make_run(changed("upsampler", {**init, "model.channels": 16}), tmp_path / "run")
    with pytest.raises(UserError, match="holds a run of the task 'upsampler', not 'decoder'"):
        make_run(changed("decoder", init), tmp_path / "run")
    with pytest.raises(UserError, match="no/run does not exist"):
        make_run(changed("upsampler", {"init": "no/run"}), tmp_path / "run")


def test_of_two_upsamplers_the_one_of_the_runs_size_is_begun_from(tmp_path):
    made = {size: changed("upsampler", {"data.size": size}) for size in (16, 32)}
    params = {size: jax.tree.map(np.float32, tiny_stack.weights(config, seed=size)) for size, config in made.items()}
    stages = {f"upsampler_{size}": (params[size], config, 0, {}) for size, config in made.items()}
    init = str(weights.save_stack(tmp_path / "given", stages, "{}", "float32"))
    for size in made:
        run = make_run(changed("upsampler", {"data.size": size, "init": init}), tmp_path / "run")
        jax.tree.map(np.testing.assert_array_equal, train._fresh(run, None).params, params[size])
    with pytest.raises(UserError, match=r"no stages of the task 'upsampler' for 24 pixels \(data.size\), and 1"):
        make_run(changed("upsampler", {"data.size": 24, "init": init}), tmp_path / "run")


def test_part_of_a_network_can_be_started_from(tmp_path):
    made = tiny_runs.config("upsampler")
    params = jax.tree.map(np.float32, tiny_stack.weights(made))
    tiny_runs.save(tmp_path / "first", made, {**params, "x0_variance": np.ones(3, np.float32)}, None)
    init = {"init": str(tmp_path / "first"), "init_partly": True}

    run = make_run(changed("upsampler", {**init, "model.positions": True}), tmp_path / "run")
    state = train._fresh(run, lambda start: None)
    positions = state.params.pop("positions")
    assert np.std(positions) > 0
    jax.tree.map(np.testing.assert_array_equal, state.params, params)

    with pytest.raises(UserError, match="is .*, and config.model asks for"):
        make_run(changed("upsampler", {**init, "model.channels": 16}), tmp_path / "run")


def test_a_workdir_with_another_config_is_refused(task, tmp_path):
    train.train(toy.config(num_steps=2), tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for changes, words in [
        ({"optim.lr": 0.5}, "holds a run with another config: optim.lr: 0.05 -> 0.5. Fix: use another --workdir"),
        ({"loader.crop": 8}, "loader.crop: None -> 8"),
        ({"seed": 3}, "seed: 0 -> 3"),
    ]:
        with pytest.raises(UserError, match=words):
            train.train(changed("toy", changes), tmp_path)
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}


def test_a_run_goes_on_with_a_config_that_now_says_what_went_without_saying(tmp_path):
    old = changed("upsampler", {})
    with old.unlocked():
        del old.optim.sam_rho, old.model.dtype, old.model.remat, old.loader.degrade, old.loader.factor
        del old.objective.blur_share, old.sampler.threshold
    train._write_once(make_run(old, tmp_path))
    (tmp_path / "checkpoints" / "4").mkdir(parents=True)
    assert make_run(changed("upsampler", {"model.remat": "full"}), tmp_path).config.optim.sam_rho == 0
    other = {"optim.sam_rho": 0.05, "model.dtype": "bfloat16", "loader.degrade": "bsr", "objective.blur_share": 0.0}
    for key, value in other.items():
        with pytest.raises(UserError, match=rf"another config: {key}: \(absent\) -> {value!r}"):
            make_run(changed("upsampler", {key: value}), tmp_path)


def test_a_run_that_saved_nothing_does_not_bind_its_workdir(task, tmp_path):
    train._write_once(make_run(toy.config(), tmp_path))
    assert make_run(changed("toy", {"optim.lr": 0.5}), tmp_path).config.optim.lr == 0.5


def test_a_run_keeps_to_its_clip(tmp_path):
    config = tiny_runs.config("prior_diffusion")
    run = make_run(config, tmp_path)
    assert len(run.config.clip_identity) == 16
    train._write_once(run)
    (tmp_path / "checkpoints" / "4").mkdir(parents=True)
    assert make_run(config, tmp_path).config == run.config
    other = tiny_runs.folder() / "clip"
    made, params = checkpoint_read.load_params(other)[1], tiny_stack.weights(tiny_runs.make("clip").config, seed=9)
    tiny_runs.save(tmp_path / "other", made, params, checkpoint_read.load_params(other)[3])
    words = f"clip_identity: '{run.config.clip_identity}' -> .*Fix: clip='.*other' was trained on or replaced"
    with pytest.raises(UserError, match=words):
        make_run(changed("prior_diffusion", {"clip": str(tmp_path / "other")}), tmp_path)
    with run.config.unlocked():
        run.config.data_identity = "9 records"
    train._write_once(run)
    with pytest.raises(UserError, match=words):  # where the data have changed too
        make_run(changed("prior_diffusion", {"clip": str(tmp_path / "other")}), tmp_path)


def test_data_may_be_moved_and_more_of_them_are_told(tmp_path, recwarn):
    def pictures(folder, num: int, shade: int = 0) -> str:
        folder.mkdir(exist_ok=True)
        for i in range(num):
            Image.new("RGB", (16, 16), (i, shade, 0)).save(folder / f"{i}.png")
            (folder / f"{i}.txt").write_text(f"picture {i}")
        return str(folder)

    def make(path: str):
        return make_run(changed("upsampler", {"data.source": "folder", "data.path": path}), tmp_path / "run")

    run = make(pictures(tmp_path / "first", 10))
    assert re.fullmatch(f"{len(run.source)} records [0-9a-f]{{16}}", run.config.data_identity)
    train._write_once(run)
    (tmp_path / "run" / "checkpoints" / "4").mkdir(parents=True)
    assert make(pictures(tmp_path / "moved", 10)).config.data_identity == run.config.data_identity
    assert not [w for w in recwarn if "have changed" in str(w.message)]
    with pytest.raises(UserError, match="another config: data.path: .*first.* -> .*other.*; data_identity: "):
        make(pictures(tmp_path / "other", 10, shade=9))
    with pytest.warns(UserWarning, match=f"have changed: they were {run.config.data_identity}, and are "):
        make(pictures(tmp_path / "first", 20))


def test_checkpoints_without_their_config_are_no_run_to_go_on_with(task, tmp_path):
    train.train(toy.config(num_steps=1), tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match="holds checkpoints, and no config.json of the run that saved them. Fix: copy"):
        train.train(changed("toy", {"optim.lr": 0.5}), tmp_path)
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize(("size", "warned"), [(16, True), (24, False), (32, False)])
def test_pictures_smaller_than_the_clip_sees_are_told(size, warned, tmp_path, recwarn):
    params, made, _, words = checkpoint_read.load_params(tiny_runs.folder() / "clip")
    with made.unlocked():
        made.model.vision.update(image_size=24)
    tiny_runs.save(tmp_path / "clip", made, params, words)
    make_run(changed("prior_diffusion", {"data.size": size, "clip": str(tmp_path / "clip")}), tmp_path / "run")
    words = f"pictures of {size} pixels are enlarged for the CLIP in {tmp_path / 'clip'}, which sees 24"
    assert any(words in str(warning.message) for warning in recwarn) == warned


def test_a_clip_of_captions_only_is_asked_of_no_pictures(tmp_path):
    params, made, _, words = checkpoint_read.load_params(tiny_runs.folder() / "clip")
    with made.unlocked(), made.ignore_type():
        made.model.vision = None
    captions = {name: array for name, array in params.items() if not name.startswith(("visual", "image"))}
    tiny_runs.save(tmp_path / "captions", made, captions, words)
    with pytest.raises(UserError, match="captions has no image tower, and is asked of pictures. Fix: give one that"):
        make_run(changed("prior_diffusion", {"clip": str(tmp_path / "captions")}), tmp_path / "run")


def test_a_workdir_has_one_run_at_a_time(task, tmp_path):
    with (tmp_path / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="is in use by another run"):
            train.train(toy.config(), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [".lock"]
    assert train.train(toy.config(num_steps=1), tmp_path) == 0


@pytest.mark.parametrize("where", ["file", "file/run", "", "gs://bucket/run"])
def test_a_workdir_that_is_no_folder(where, task, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="workdir .*must be"):
        train.train(toy.config(), where)
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "mine"


def test_the_home_folder_is_meant_by_a_tilde(task, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert train.train(toy.config(num_steps=1), "~/run") == 0
    assert {"checkpoints", "metrics.jsonl"} <= {p.name for p in (tmp_path / "run").iterdir()}
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_lists_in_a_config_are_the_tuples_that_are_stored(task, tmp_path):
    config = toy.config(num_steps=2)
    with config.unlocked(), config.ignore_type():
        config.rules = [[".*", "fsdp"]]
    assert train.train(config, tmp_path) == train.train(config, tmp_path) == 0


def test_a_step_takes_its_states_memory(task, tmp_path):
    """Donation: every array of the old state is given up, and the compiler keeps each where it was."""
    run = make_run(toy.config(mesh__data=2, mesh__fsdp=4), tmp_path)
    batches = functools.partial(train._batches, run)
    state, batch = train._fresh(run, batches), next(batches(0))
    step, _ = train._compile(run, train._rehearse(run, batches))
    held = sum(a.addressable_shards[0].data.nbytes for a in jax.tree.leaves(state))
    assert step.memory_analysis().alias_size_in_bytes >= held
    after, _ = step(state, {}, batch, 0)
    assert all(a.is_deleted() for a in jax.tree.leaves(state)) and int(after.step) == 1


@pytest.mark.parametrize(("moment", "stops_at"), [("_compile", 1), ("evaluate", 4)])
def test_a_stop_signal_is_heard_at_any_time(moment, stops_at, task, tmp_path, monkeypatch):
    """While the first step is compiled: it is saved. In an evaluation after the fourth: it is left."""
    owner = train if moment == "_compile" else logs.Checks
    plain = getattr(owner, moment)

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return plain(*args)

    monkeypatch.setattr(owner, moment, interrupted)
    assert train.train(toy.config(every__eval=4, every__save=50), tmp_path) == train.PREEMPTED
    assert checkpoint_read.peek(tmp_path)[1] == stops_at
    assert not any("eval/" in line for line in (tmp_path / "metrics.jsonl").read_text().splitlines())


def test_a_stop_signal_in_the_last_evaluation_is_the_end(task, tmp_path, monkeypatch):
    """Nothing is left to do but that evaluation, so it is no run to start again."""
    plain = logs.Checks.evaluate

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return plain(*args)

    monkeypatch.setattr(logs.Checks, "evaluate", interrupted)
    config = toy.config(every__eval=50, every__save=50)
    assert train.train(config, tmp_path) == 0
    assert checkpoint_read.peek(tmp_path)[1] == config.num_steps
    assert "eval/" not in (tmp_path / "metrics.jsonl").read_text()


def test_a_stop_signal_while_the_last_checkpoint_is_written_loses_nothing(task, tmp_path, monkeypatch):
    plain = checkpoint.Checkpoints.close

    def interrupted(saved):
        os.kill(os.getpid(), signal.SIGTERM)
        plain(saved)

    monkeypatch.setattr(checkpoint.Checkpoints, "close", interrupted)
    ended = []
    before = signal.signal(signal.SIGTERM, lambda *_: ended.append("by the signal"))
    try:
        assert train.train(toy.config(every__save=50), tmp_path) == 0
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not ended and checkpoint_read.peek(tmp_path)[1] == toy.config().num_steps


def test_large_arrays_are_split_as_the_mesh_says(task, tmp_path):
    run = make_run(toy.config(mesh__data=2, mesh__fsdp=4), tmp_path)
    assert tuple(run.shardings.params["wide"].spec) == ("fsdp",) == tuple(run.shardings.ema["wide"].spec)
    assert run.shardings.params["colour"].is_fully_replicated
    assert run.mesh.shape == {"data": 2, "fsdp": 4, "tensor": 1}
