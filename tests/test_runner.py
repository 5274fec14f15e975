"""runner: how many rows a program gets, what it is made for, and what it gives; the stages are arithmetic."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest

from tests.compiling import compiled
from unclip_jax.errors import UserError
from unclip_jax.runner import Runner


@dataclasses.dataclass(frozen=True, eq=False)
class Stage:
    """What a task's `sample` and `encode` give: `answer` of the rows and the options."""

    answer: Callable

    def sample(self, params, rows, **options):
        return params["scale"] * self.answer(rows, **options)

    def encode(self, frozen, batch):
        return {**batch, "z_txt": frozen["clip"]["scale"] * self.answer(batch)}


def runner_of(**answers):
    params = {name: {"scale": np.float32(1)} for name in answers}
    return Runner(None, {name: Stage(answer) for name, answer in answers.items()}, {}, params)


def run(runner, rows, batch_size=8, stage="decoder", **options):
    return runner.run(stage, (rows,), options, batch_size, False)


def column(n):
    return {"x": np.arange(1, n + 1, dtype=np.float32)[:, None]}


@pytest.mark.parametrize(
    ("total", "batch_size", "size"), [(1, 8, 1), (2, 8, 2), (3, 8, 4), (5, 8, 8), (5, 6, 6), (8, 8, 8), (11, 4, 4)]
)
def test_few_rows_are_filled_up_to_a_power_of_two_and_no_further(total, batch_size, size):
    """A single picture costs a single one; and each row comes back once, in its place."""
    seen = []
    runner = runner_of(decoder=lambda rows: seen.append(len(rows["x"])) or 3 * rows["x"])
    np.testing.assert_array_equal(run(runner, column(total), batch_size), 3 * column(total)["x"])
    assert seen == [size]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_one_bad_number_of_many_is_an_error(bad):
    """Whichever batch it is of, and whichever of the arrays."""
    for at in (0, 4):
        rows = column(5)
        rows["x"][at] = bad
        with pytest.raises(UserError, match="stage 'decoder' gave NaN or infinite values"):
            run(runner_of(decoder=lambda rows: rows["x"]), rows, 2)


def test_a_program_is_for_rows_of_its_names_kinds_and_shapes_and_for_its_options():
    """Whatever changes is computed anew, and what has been asked before compiles nothing."""

    def answer(rows, times=1, power=1):
        (name,) = rows
        return (times * rows[name] + (name == "y")) ** power

    runner, x = runner_of(decoder=answer), column(4)["x"]
    asked = [({"x": x}, {}), ({"y": x}, {}), ({"x": x.astype(np.int32)}, {}), ({"x": x[:, [0, 0]]}, {})]
    asked += [({"x": x}, {"times": 2}), ({"x": x}, {"times": 3}), ({"x": x}, {"power": 2}), ({"x": x}, {"power": 3})]
    for again in (False, True):
        with compiled() as names:
            got = [run(runner, rows, **options) for rows, options in asked]
        for one, (rows, options) in zip(got, asked, strict=True):
            np.testing.assert_array_equal(one, answer(rows, **options))
        assert bool(names) != again


def test_a_task_is_never_taken_for_one_that_is_gone():
    """Each of these may lie where the one before it lay."""
    runner = runner_of(decoder=lambda rows: 0)
    for k in range(20):
        stage = Stage(lambda rows, k=k: k * rows["x"])
        np.testing.assert_array_equal(run(dataclasses.replace(runner, tasks={"decoder": stage}), column(1)), [[k]])
        del stage


@pytest.mark.parametrize("stage", ["prior", "prior_ar", "decoder"])
def test_what_clip_is_asked_is_said_by_the_stages_that_ask(stage):
    """A copy of the stack in which one of them asks something else gets other answers, of one set of programs."""
    runner = runner_of(clip=None, **{stage: lambda rows: 2 * rows["x"]})
    other = dataclasses.replace(runner, tasks={**runner.tasks, stage: Stage(lambda rows: 5 * rows["x"])})
    for one, factor in ((runner, 2), (other, 5), (runner, 2)):
        got = run(one, column(2), stage="clip")
        assert got.keys() == {"z_txt"}
        np.testing.assert_array_equal(got["z_txt"], factor * column(2)["x"])


@pytest.mark.parametrize(
    ("stages", "prompted"),
    [("clip prior decoder", True), ("clip prior_ar decoder", True), ("clip decoder", False), ("decoder", True)],
)
def test_prompts_are_drawn_by_a_prior_or_by_a_decoder_that_knows_no_clip(stages, prompted):
    """The last as of GLIDE, the one before it as of Karlo's image variations."""
    assert runner_of(**dict.fromkeys(stages.split())).prompted == prompted
