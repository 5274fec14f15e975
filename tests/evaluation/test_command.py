"""`unclip evaluate`: each of its tasks reads the flags that it takes, and takes no others."""

import argparse
import contextlib
import dataclasses
import json

import numpy as np
import pytest

from tests import tiny_stack
from tests.evaluation.test_protocol import folder
from unclip_jax import cli
from unclip_jax.cli import evaluate, evaluate_pictures
from unclip_jax.errors import UserError
from unclip_jax.evaluation import pairs, protocol, report, stages, sweep, work
from unclip_jax.pipeline import UnCLIP
from unclip_jax.settings import Settings

# What asks for a task, and what an error calls it.
ASKED = {
    "prompts": ([], "the shapes world's own prompts"),
    "drawn": (["--data", "shapes"], "pictures drawn for --data"),
    "images": (["--images", "mine"], "--images"),
    "checkpoint": (["--checkpoint", "runs/clip"], "--checkpoint"),
    "stage": (["--stage", "clip"], "--stage"),
    "compare": (["--compare", "a.json", "b.json"], "--compare"),
    "pairs": (["--pairs", "a", "b"], "--pairs"),
    "votes": (["--votes", "v.json"], "--votes"),
}
# Values other than the default, and the default of those that have one: to say it is to ask for it.
VALUES = {
    "--metrics": ["fid", "shapes_oracle"], "--num": ["3"], "--out": ["r.json"], "--path": ["p"],
    "--reference": ["r.npz"], "--inception": ["i"], "--clip": ["c"], "--work": ["w"], "--bootstrap": ["2", "50"],
    "--sweep": ["guidance=1,2"], "--num-objects": ["one", "one,two"], "--base": [None], "--sheet": ["s.png"],
    "--step": ["3"], "--classes": ["c.txt"], "--templates": ["t.txt"], "--key": ["k.json"],
    "--model": ["m", "shapes"], "--seed": ["3", "0"], "--batch-size": ["3", "8"], "--low-memory": [None],
    "--overwrite": [None], "--guidance": ["2"], "--prior-interval": ["0.1,0.9"], "--tile": ["32"],
}  # fmt: skip
TAKEN = {
    "prompts": "metrics num num-objects sheet model seed batch-size low-memory base guidance prior-interval tile",
    "drawn": "num sweep metrics path reference inception clip work bootstrap model seed batch-size low-memory base"
    " guidance prior-interval tile",
    "images": "num metrics path reference inception clip work bootstrap model seed",
    "checkpoint": "num seed path sweep classes templates step",
    "stage": "num seed path sweep classes templates model",
    "compare": "",
    "pairs": "num seed",
    "votes": "key",
}
TAKEN = {task: {f"--{name}" for name in f"{names} out overwrite".split()} for task, names in TAKEN.items()}
BLACK = np.zeros((1, 32, 32, 3), np.uint8)
OF_DRAWN = {"--sweep", "--metrics"}  # which without --data ask for pictures to be drawn, and say that it is missing


def args_of(*argv):
    return cli.parse(["evaluate", *map(str, argv)])


@pytest.mark.parametrize("task", ASKED)
def test_a_task_takes_its_own_flags_and_refuses_all_others(task):
    asked, called = ASKED[task]
    for flag, values in VALUES.items():
        for value in values:
            argv = [*asked, flag] if value is None else [*asked, flag, value]
            if flag in TAKEN[task]:
                changed = task == "prompts" and flag == "--metrics" and value == "fid"
                assert evaluate.task_of(args_of(*argv)) == ("drawn" if changed else task), argv
            elif not (task == "prompts" and flag in OF_DRAWN):
                with pytest.raises(UserError, match=f"^{flag} is for .*, and not for {called}. Fix: leave it out$"):
                    evaluate.task_of(args_of(*argv))


def test_every_flag_is_looked_at():
    flags = {flag for flag in args_of().flags if flag.startswith("--")}
    sampling = {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(Settings)}
    assert flags - sampling - set(VALUES) == {"--help", "--debug", "--data", *(f"--{t}" for t in list(ASKED)[2:])}
    assert {f"--{name.replace('_', '-')}" for name in args_of().sampling} == sampling
    assert set(evaluate.RUN) == set(evaluate.READS) == set(ASKED)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--compare", "a", "b", "--data", "x"], "--data is for .*, and not for --compare"),
        (["--checkpoint", "r", "--inception", "f"], "--inception is for .*, and not for --checkpoint"),
        (["--votes", "v", "--sweep", "steps=2"], "--sweep is for .*, --checkpoint or --stage, and not for --votes"),
        (["--images", "d", "--guidance", "2"], "--guidance is for .* or pictures drawn for --data, and not for --im"),
        (["--reference", "r.npz"], "--reference is for pictures drawn for --data or --images, and not for the shapes"),
        (["--key", "k", "--votes", "v", "--pairs", "a", "b"], "--pairs and --votes are different tasks"),
        (["--sweep", "steps=2", "--sheet", "s.png"], "--sheet is for the shapes world's own prompts, and not for pict"),
    ],
)
def test_a_refusal_names_the_flag_and_the_task(argv, words):
    with pytest.raises(UserError, match=words):
        evaluate.task_of(args_of(*argv))


def test_flags_that_are_not_given_have_their_defaults():
    args = args_of("--data", "shapes")
    evaluate.task_of(args)
    assert (args.model, args.seed, args.batch_size, args.bootstrap, args.num) == ("shapes", 0, 8, 50, 200)
    assert args.metrics == ["shapes_oracle"] and args.base is args.overwrite is args.low_memory is False
    args = args_of("--images", "mine", "--seed", 4)
    evaluate.task_of(args)
    assert args.num is None and args.seed == 4


class Watched(argparse.Namespace):
    """Arguments that know which of them were read."""

    def __init__(self, given):
        super().__init__(**given)
        self.__dict__["read"] = set()

    def __getattribute__(self, name):
        if not name.startswith("_") and name != "read":
            self.read.add(name)
        return super().__getattribute__(name)


ARGV = {
    "prompts": ["--num", 1, "--out", "r.json", "--sheet", "s.png"],
    "drawn": ["--data", "shapes", "--num", 2, "--metrics", "cmmd", "--out", "r.json"],
    "images": ["--images", "mine", "--data", "shapes", "--metrics", "cmmd", "--out", "r.json"],
    "checkpoint": ["--checkpoint", "run", "--out", "r.json"],
    "stage": ["--stage", "clip", "--out", "r.json"],
    "compare": ["--compare", "a.json", "b.json", "--out", "r.json"],
    "pairs": ["--pairs", "a", "b", "--out", "r.html"],
    "votes": ["--votes", "v.json", "--key", "k.json", "--out", "r.json"],
}


@pytest.mark.parametrize("task", ARGV)
def test_what_a_task_takes_it_reads(task, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = report.Report("a report", {})
    for module, name in ((stages, "measure"), (report, "compare"), (pairs, "analyse")):
        monkeypatch.setattr(module, name, lambda *_, **__: made)
    monkeypatch.setattr(pairs, "make", lambda *_: ("page", "key", 1))
    monkeypatch.setattr(UnCLIP, "spread", lambda self: self)
    monkeypatch.setattr(UnCLIP, "generate", lambda _, prompts, *__, **___: BLACK.repeat(len(prompts), 0))
    folder(tmp_path / "mine")
    model = ["--model", tiny_stack.path()] if "--model" in TAKEN[task] else []
    args = args_of(*model, *ARGV[task])
    assert evaluate.task_of(args) == task
    watched = Watched(vars(args))
    evaluate.RUN[task](watched)
    names = {flag.removeprefix("--").replace("-", "_") for flag in args.flags}
    taken = set(evaluate.READS[task].split()) - {"debug"}
    if task == "prompts":
        taken -= {"metrics"}  # there is but one
    if "sampling" in taken:
        taken = taken - {"sampling"} | {field.name for field in dataclasses.fields(Settings)}
    read = watched.read & names
    assert taken - read == set(), "ignored"
    assert all(getattr(args, name) is None for name in read - taken), read - taken


SWEPT = {
    str: ["ar,diffusion", ("ar", "diffusion")], int: ["2,3", (2, 3)], float: ["0.5,1", (0.5, 1.0)],
    tuple[float, float]: ["0.2:0.8,0:1", ((0.2, 0.8), (0.0, 1.0))],
}  # fmt: skip


@pytest.mark.parametrize("field", dataclasses.fields(Settings), ids=lambda field: field.name)
def test_every_setting_can_be_swept(field):
    text, values = SWEPT[evaluate_pictures.SWEPT[field.name]]
    if field.name.endswith("sampler"):
        text, values = "ddim,dpm", ("ddim", "dpm")
    args = args_of("--data", "shapes", "--sweep", f"{field.name}={text}", "model=a,b")
    evaluate.task_of(args)
    draws = evaluate_pictures.draws_of(args)
    assert [draw.model for draw in draws] == ["a", "b", "a", "b"]
    assert [draw.settings for draw in draws[::2]] == [{field.name: value} for value in values]
    again = f"{field.name}={','.join(map(sweep.text_of, values))}"
    assert sweep.parse([again], evaluate_pictures.SWEPT) == [{field.name: value} for value in values]


def test_an_interval_that_is_none_is_told(capsys):
    for text, words in (("0.5", "two numbers with a colon"), ("0.9:0.1", "interval=(0.9, 0.1)")):
        assert cli.main(["evaluate", "--data", "shapes", "--sweep", f"interval={text}"]) == 2
        assert words in capsys.readouterr().err


def test_features_are_kept_where_they_were_asked_for_or_nothing_was_measured_yet(tmp_path):
    def left(stop=False, **more):
        args = argparse.Namespace(**{"work": None, "out": None} | more)
        with contextlib.suppress(KeyboardInterrupt), evaluate_pictures._work_folder(args) as folder:
            work.Work(folder).series("drawn", {}, 1)
            if stop:
                raise KeyboardInterrupt
        return folder.exists()

    out = str(tmp_path / "r.json")
    assert left(work=str(tmp_path / "w")) and not left(out=out) and left(out=out, stop=True)
    assert not left() and not left(stop=True)


def test_the_help_names_every_metric(capsys):
    with pytest.raises(SystemExit):
        cli.main(["evaluate", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert ", ".join(protocol.METRICS) in said


def test_a_path_of_no_source_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "mine")
    assert cli.main(["evaluate", "--images", "mine", "--metrics", "clip_score", "--path", "p"]) == 2
    assert "give --data SOURCE as well" in capsys.readouterr().err
    (tmp_path / "a.json").write_text(json.dumps({}))
    assert cli.main(["evaluate", "--compare", "a.json", "a.json", "--seed", "0"]) == 2
    assert "--seed is for" in capsys.readouterr().err
