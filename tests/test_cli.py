"""cli: what is written, and that every mistake is one line, exit code 2 and nothing written."""

import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import tiny_stack
from unclip_jax import __version__, cli, gallery
from unclip_jax.pipeline import UnCLIP

ROOT = Path(__file__).resolve().parent.parent
HOSTILE = [
    "../../etc/passwd",
    "/absolute/path",
    "-rf --overwrite",
    "a red circle\u202egnp.exe",
    "赤い丸 ñandú ☃",
    "CON",
    "nul.txt",
    "x" * 300,
    "<script>alert(1)</script>",
    "=cmd|' /C calc'!A0",
    "~",
    "...",
]


@pytest.fixture
def stack(monkeypatch):
    """The tiny stack's path; it is read and compiled once, however often a command loads it."""
    monkeypatch.setattr(UnCLIP, "load", load_once)
    return str(tiny_stack.path())


@functools.cache
def load_once(path, low_memory=False):
    return load(path, low_memory)


load = UnCLIP.load


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """run("sample", …) -> (exit code, stdout, lines of stderr), in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*argv):
        code = cli.main([str(a) for a in argv])
        out, err = capsys.readouterr()
        return code, out, err.splitlines()

    return run


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def sample(stack, *more):
    return ["sample", "a red circle", "a blue ring", "--num", 2, "--model", stack, "--seed", 7, "--steps", 3, *more]


def test_sample_writes_pictures_grid_and_index(run, stack, tmp_path):
    code, out, err = run(*sample(stack, "--out", "made"))
    assert (code, err) == (0, [])
    assert "4 pictures of 32 x 32 pixels in made" in out
    index = json.loads((tmp_path / "made" / "pictures.json").read_text())
    assert [(p["prompt"], p["index"]) for p in index["pictures"]] == [
        ("a red circle", 0), ("a red circle", 1), ("a blue ring", 0), ("a blue ring", 1)
    ]  # fmt: skip
    names = {p["file"] for p in index["pictures"]}
    assert set(files(tmp_path / "made")) == {"grid.png", "pictures.json", *names}
    assert list(tmp_path.iterdir()) == [tmp_path / "made"]
    grid = Image.open(tmp_path / "made" / "grid.png")
    assert grid.width >= 2 * 160 and grid.height >= 2 * 160


def test_png_metadata_tells_how_a_picture_was_made(run, stack, tmp_path):
    run(*sample(stack, "--out", "made"))
    for entry in json.loads((tmp_path / "made" / "pictures.json").read_text())["pictures"]:
        with Image.open(tmp_path / "made" / entry["file"]) as picture:
            text = picture.text
            pixels = np.asarray(picture)
        assert text["prompt"] == entry["prompt"] and int(text["index"]) == entry["index"]
        assert text["seed"] == "7" and text["unclip_jax"] == __version__ and text["model"] == "tiny"
        settings = json.loads(text["settings"])
        assert settings["decoder"] == {"name": "ddpm", "steps": 3, "guidance": 2.0}
        assert settings["prior"]["steps"] == 4 and settings["upsampler"]["steps"] == 3
        again = load_once(stack).generate(["a red circle", "a blue ring"], 7, num=2, steps=3)
        assert np.array_equal(pixels, again[2 * int(text["prompt_index"]) + entry["index"]])


def test_the_same_command_gives_the_same_bytes(run, stack, tmp_path):
    assert run(*sample(stack, "--out", "a"))[0] == run(*sample(stack, "--out", "b"))[0] == 0
    assert files(tmp_path / "a") == files(tmp_path / "b")
    run(*sample(stack, "--out", "c", "--overwrite")[:-3], "--out", "c", "--seed", 8)
    assert files(tmp_path / "a") != files(tmp_path / "c")


def test_overwrite_replaces_its_own_pictures_and_nothing_else(run, stack, tmp_path):
    run(*sample(stack, "--out", "made"))
    (tmp_path / "made" / "mine.png").write_text("mine")
    before = files(tmp_path / "made")
    code, _, err = run(*sample(stack, "--out", "made"))
    assert code == 2 and "--overwrite" in err[0] and files(tmp_path / "made") == before
    assert run("sample", "two stars", "--model", stack, "--num", 4, "--out", "made", "--overwrite")[0] == 0
    after = files(tmp_path / "made")
    assert after["mine.png"] == b"mine" and len(after) == 7
    assert not any("red-circle" in name for name in after)


def test_prompts_come_from_a_file(run, stack, tmp_path):
    (tmp_path / "p.txt").write_bytes("\ufeffa red circle\r\n\r\na blue ring\n".encode())
    given = ("--prompts", "p.txt", *sample(stack)[3:])
    assert run("sample", *given, "--out", "f")[0] == 0
    run(*sample(stack, "--out", "a"))
    assert files(tmp_path / "f") == files(tmp_path / "a")


def test_a_long_prompt_is_drawn_with_one_line_of_warning(run, stack):
    code, _, err = run(
        "sample", "a red circle " * 20 + "zebra", "--num", 4, "--model", stack, "--out", "made"
    )
    assert code == 0 and len(err) == 1
    assert err[0].startswith("warning: ") and "zebra" in err[0]


def test_hostile_prompts_make_safe_names(run, stack, tmp_path):
    code, _, err = run("sample", "--model", stack, "--num", 1, "--out", "made", "--", *HOSTILE)
    assert code == 0 and all(line.startswith("warning: text has") for line in err)
    index = json.loads((tmp_path / "made" / "pictures.json").read_text())
    assert [p["prompt"] for p in index["pictures"]] == HOSTILE
    for picture in index["pictures"]:
        assert re.fullmatch(r"\d{3}-[a-z0-9][a-z0-9-]*-[0-9a-f]{8}-\d\d\.png", picture["file"])
        assert len(picture["file"]) <= 80
    assert (
        list(tmp_path.iterdir()) == [tmp_path / "made"] and len(files(tmp_path / "made")) == len(HOSTILE) + 2
    )


def test_prompts_that_read_alike_get_names_of_their_own():
    names = {gallery.file_name(p, 0, 0) for p in ("a b", "a-b", "A b", "a  b", "赤", "青")}
    assert len(names) == 6


def test_an_index_cannot_make_overwrite_delete_elsewhere(run, stack, tmp_path):
    (tmp_path / "made").mkdir()
    (tmp_path / "precious.png").write_text("keep")
    (tmp_path / "made" / "notes.txt").write_text("keep")
    entries = [{"file": "../precious.png"}, {"file": str(tmp_path / "precious.png")}, {"file": "notes.txt"}]
    (tmp_path / "made" / "pictures.json").write_text(json.dumps({"pictures": entries}))
    assert run(*sample(stack, "--out", "made", "--overwrite"))[0] == 0
    assert (tmp_path / "precious.png").exists() and (tmp_path / "made" / "notes.txt").exists()


def test_a_failed_write_leaves_nothing(run, stack, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("unclip_jax.data.images.png", fail)
    code, _, err = run(*sample(stack, "--out", "made"))
    assert code == 2 and len(err) == 1 and "No space left" in err[0]
    assert list(tmp_path.iterdir()) == []


def test_the_autoregressive_prior_draws_on_request(run, stack, tmp_path):
    assert run(*sample(stack, "--out", "ar", "--prior", "ar", "--prior-temperature", 0.5))[0] == 0
    settings = json.loads((tmp_path / "ar" / "pictures.json").read_text())["settings"]
    assert settings["prior_ar"]["temperature"] == 0.5 and "prior" not in settings


def test_reconstruct_writes_a_row_for_each_picture(run, stack, tmp_path):
    for k, name in enumerate(("a.png", "b.png")):
        pixels = np.random.default_rng(k).integers(0, 256, (20, 24, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / name)
    argv = ["reconstruct", "a.png", "b.png", "--model", stack, "--dims", "2,5"]
    code, said, err = run(*argv, "--out", "made")
    assert (code, err) == (0, []) and "6 pictures of 32 x 32 pixels in made" in said and "6 components" in said
    sheet = Image.open(tmp_path / "made" / "grid.png")
    assert sheet.width == 3 * (160 + 8) and sheet.height >= 2 * (160 + 8)
    entries = json.loads((tmp_path / "made" / "pictures.json").read_text())["pictures"]
    assert [(entry["image"], entry.get("dims")) for entry in entries] == [
        (name, dims) for name in ("a.png", "b.png") for dims in (None, 2, 5)
    ]
    assert run(*argv[:-1], "2,7", "--out", "none")[0] == 2 and not (tmp_path / "none").exists()


def test_demo_draws_several_of_each_of_its_prompts(run, stack, tmp_path, monkeypatch):
    from unclip_jax.cli.sample import DEMO
    from unclip_jax.data.shapes import parse

    assert len(DEMO) >= 8 and all(parse(prompt).things for prompt in DEMO)
    monkeypatch.setattr("unclip_jax.cli.sample.DEMO", DEMO[:2])
    for _ in range(2):  # again into the same folder
        assert run("demo", "--model", stack)[0] == 0
    assert len(files(tmp_path / "out" / "demo")) == 2 * 4 + 2


def test_a_name_that_is_no_text_is_printed_all_the_same():
    code = r"from unclip_jax import cli; cli.main = lambda: print('x\udcff.png') or 0; cli.script()"
    env = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    made = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert (made.returncode, made.stdout, made.stderr) == (0, "x\\udcff.png\n", "")


def test_demo_fills_no_folder_of_others(run, stack, tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site/index.html").write_text("precious")
    code, _, err = run("demo", "--model", stack, "--out", "site", "--html")
    assert code == 2 and "is not empty" in err[-1] and (tmp_path / "site/index.html").read_text() == "precious"


BAD = {
    "no command": ([], "COMMAND"),
    "unknown command": (["smaple"], "did you mean 'sample'"),
    "unknown flag": (["sample", "x", "--out", "o", "--stpes", "3"], "did you mean '--steps'"),
    "abbreviated flag": (["sample", "x", "--out", "o", "--guid", "3"], "did you mean '--guidance'"),
    "flag of another command": (["demo", "--prompts", "f"], "'--prompts'"),
    "no out": (["sample", "x"], "--out"),
    "no prompt": (["sample", "--out", "o"], "no prompt"),
    "empty prompt": (["sample", "", "--out", "o"], "must not be empty"),
    "blank prompt": (["sample", "a red circle", " \t", "--out", "o"], "must not be empty"),
    "NUL": (["sample", "a\0b", "--out", "o"], r"'\x00'"),
    "escape code": (["sample", "a\x1b[2Jb", "--out", "o"], r"'\x1b'"),
    "newline": (["sample", "a\nb", "--out", "o"], r"'\n'"),
    "lone surrogate": (["sample", "a\udcffb", "--out", "o"], r"'\udcff'"),
    "both prompts": (["sample", "x", "--prompts", "good.txt", "--out", "o"], "both"),
    "no prompt file": (["sample", "--prompts", "none.txt", "--out", "o"], "none.txt is missing"),
    "prompt folder": (["sample", "--prompts", ".", "--out", "o"], "is no file"),
    "empty prompt file": (["sample", "--prompts", "empty.txt", "--out", "o"], "holds no prompt"),
    "prompt file in Latin-1": (["sample", "--prompts", "latin1.txt", "--out", "o"], "not UTF-8"),
    "control character in file": (["sample", "--prompts", "bell.txt", "--out", "o"], r"'\x07'"),
    "num 0": (["sample", "x", "--out", "o", "--num", "0"], "--num"),
    "num -1": (["sample", "x", "--out", "o", "--num", "-1"], "--num"),
    "num huge": (["sample", "x", "--out", "o", "--num", "10001"], "more than 10000 pictures"),
    "num beyond": (["sample", "x", "--out", "o", "--num", "99999999999"], "in 1 … 2147483647"),
    "out a link to nothing": (["sample", "x", "--out", "dangling"], "is a link to nothing"),
    "name too long": (["sample", "x", "--out", "o", "--model", "m/" + "n" * 5000], "File name too long"),
    "large sheet": (["data", "show", "shapes", "--size", "4096", "--num", "99", "--out", "s.png"], "too many for one"),
    "reference unwritable": (
        ["evaluate", "--images", ".", "--data", "shapes", "--metrics", "kid", "--reference", "/proc/r.npz"],
        "reference '/proc/r.npz' cannot be written",
    ),
    "blended folder": (["blend", "x", ".", "--out", "o"], "write prompt:."),
    "config of another kind": (["train", "--config", "good.txt", "--workdir", "w"], "a Python file. Fix: name one"),
    "num no number": (["sample", "x", "--out", "o", "--num", "four"], "'four'"),
    "steps 0": (["sample", "x", "--out", "o", "--steps", "0"], "--steps"),
    "steps 2.5": (["sample", "x", "--out", "o", "--steps", "2.5"], "'2.5'"),
    "steps > trained": (["sample", "x", "--out", "o", "--steps", "21"], "21 steps are more than the 20"),
    "prior steps > trained": (["sample", "x", "--out", "o", "--prior-steps", "21"], "prior: 21"),
    "guidance NaN": (["sample", "x", "--out", "o", "--guidance", "nan"], "--guidance"),
    "guidance < 0": (["sample", "x", "--out", "o", "--guidance=-1"], "--guidance"),
    "guidance inf": (["sample", "x", "--out", "o", "--prior-guidance", "inf"], "--prior-guidance"),
    "candidates 0": (["sample", "x", "--out", "o", "--candidates", "0"], "--candidates"),
    "sampler": (["sample", "x", "--out", "o", "--sampler", "dimm"], "did you mean 'ddim'"),
    "prior sampler": (["sample", "x", "--out", "o", "--prior-sampler", "dimm"], "prior_sampler='dimm' is unknown"),
    "interval": (["sample", "x", "--out", "o", "--interval", "0.5"], "'0.5' must be two numbers with a comma"),
    "interval turned": (["sample", "x", "--out", "o", "--interval", "0.5,0.1"], "interval=(0.5, 0.1) must be two"),
    "rescale": (["sample", "x", "--out", "o", "--rescale", "7"], "'7' must be a number in 0 … 1"),
    "prior": (["sample", "x", "--out", "o", "--prior", "arr"], "did you mean 'ar'"),
    "temperature": (["sample", "x", "--out", "o", "--prior-temperature=-1"], "--prior-temperature"),
    "top p": (["sample", "x", "--out", "o", "--prior-top-p", "1.5"], "--prior-top-p"),
    "setting of the other prior": (["sample", "x", "--out", "o", "--prior", "ar", "--prior-steps", "3"], "prior='ar'"),
    "seed < 0": (["sample", "x", "--out", "o", "--seed", "-1"], "--seed"),
    "seed >= 2**32": (["sample", "x", "--out", "o", "--seed", "4294967296"], "--seed"),
    "out is a file": (["sample", "x", "--out", "good.txt"], "is a file"),
    "out below a file": (["sample", "x", "--out", "good.txt/o"], "is a file"),
    "out unwritable": (["sample", "x", "--out", "/proc/o"], "not writable"),
    "out empty": (["sample", "x", "--out", ""], "must be a path"),
    "model missing": (["sample", "x", "--out", "o", "--model", "nowhere"], "name of a bundled stack: shapes"),
    "model foreign": (["sample", "x", "--out", "o", "--model", "/"], "no stack.json"),
    "metric": (["evaluate", "--metrics", "fid"], "'fid'"),
    "objects": (["evaluate", "--num-objects", "one,four"], "'four'"),
    "no objects": (["evaluate", "--num-objects", ","], "--num-objects"),
    "report suffix": (["evaluate", "--out", "report.txt"], ".json"),
    "report exists": (["evaluate", "--out", "old.json"], "exists"),
    "sheet exists": (["evaluate", "--sheet", "old.png"], "exists"),
    "checkpoint missing": (["evaluate", "--checkpoint", "nowhere"], "does not exist"),
    "sheet of a stage": (["evaluate", "--checkpoint", ".", "--sheet", "s.png"], "--sheet"),
    "no data command": (["data"], "COMMAND"),
    "data command": (["data", "shwo"], "did you mean 'show'"),
    "source": (["data", "show", "shape", "--out", "s.png"], "did you mean 'shapes'"),
    "split": (["data", "show", "shapes", "--split", "trian", "--out", "s.png"], "did you mean 'train'"),
    "size": (["data", "show", "shapes", "--size", "0", "--out", "s.png"], "--size"),
    "path": (["data", "show", "shapes", "--path", ".", "--out", "s.png"], "data.path"),
    "no path": (["data", "show", "folder", "--out", "s.png"], "data.path"),
    "sheet suffix": (["data", "show", "shapes", "--out", "s.gif"], ".png"),
    "no config": (["train", "--workdir", "w"], "--config"),
    "config missing": (["train", "--config", "none.py", "--workdir", "w"], "'none.py' does not exist"),
    "override form": (
        ["train", "--config", "c.py", "--workdir", "w", "--config.a", "1"],
        "--config.key=value",
    ),
    "train flag": (["train", "--config", "c.py", "--workdir", "w", "--wokdir=x"], "did you mean '--workdir'"),
    "no picture": (["reconstruct", "--out", "o"], "IMAGE"),
    "picture missing": (["reconstruct", "none.png", "--out", "o.png"], "none.png cannot be read"),
    "picture of text": (["reconstruct", "good.txt", "--out", "o.png"], "good.txt is not a picture"),
    "reconstruction exists": (["reconstruct", "old.png", "--out", "old.png"], "is a file"),
    "dims 0": (["reconstruct", "old.png", "--dims", "0", "--out", "o"], "--dims"),
    "dims no number": (["reconstruct", "old.png", "--dims", "2,x", "--out", "o"], "--dims"),
    "path without data": (["reconstruct", "old.png", "--data-path", ".", "--out", "o"], "--data-path"),
    "no prior": (["export", "o", "--clip", "a", "--decoder", "b"], "needs a prior"),
    "no decoder": (["export", "o", "--clip", "a", "--prior", "b"], "--decoder"),
    "workdir missing": (["export", "o", "--clip", "a", "--prior", "b", "--decoder", "c"], "a does not exist"),
    "dtype": (
        ["export", "o", "--clip", "a", "--prior", "b", "--decoder", "c", "--dtype", "float16"],
        "did you mean 'bfloat16'",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_one_line_and_writes_nothing(case, run, stack, tmp_path):
    argv, words = BAD[case]
    (tmp_path / "good.txt").write_text("a red circle\n")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin1.txt").write_bytes("cruz año".encode("latin-1"))
    (tmp_path / "bell.txt").write_text("a red\acircle\n")
    (tmp_path / "old.json").write_text("{}")
    (tmp_path / "old.png").write_text("old")
    before, names = files(tmp_path), sorted(tmp_path.iterdir())
    with_model = argv[:1] == ["sample"] and "--model" not in argv
    code, out, err = run(*argv, *(["--model", stack] if with_model else []))
    assert code == 2 and out == "" and len(err) == 1, err
    assert err[0].startswith("error: ") and words in err[0] and err[0].isprintable()
    assert files(tmp_path) == before and sorted(tmp_path.iterdir()) == names


def test_mistakes_are_told_before_weights_are_read(run, stack, monkeypatch):
    monkeypatch.setattr(UnCLIP, "load", None)
    assert run("sample", "x", "--out", "o", "--sampler", "dimm")[0] == 2


def test_nan_is_told_and_nothing_is_written(run, stack, tmp_path, monkeypatch):
    nan = np.full((4, 32, 32, 3), np.nan, np.float32)
    monkeypatch.setattr(UnCLIP, "_program", lambda *_: lambda params, given, scales: {**given[0], "z_txt": nan})
    code, _, err = run("sample", "a red circle", "--num", 4, "--model", stack, "--out", "made")
    assert code == 2 and len(err) == 1 and "NaN" in err[0] and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("raised", "code", "words"),
    [
        (MemoryError(), 2, "not enough memory"),
        (RuntimeError("Unable to initialize backend 'foo'"), 2, "unset JAX_PLATFORMS"),
        (OSError(36, "File name too long", "n" * 300), 2, "cannot be used (File name too long)"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory\nallocating"), 2, "not enough memory"),
        (ValueError("surprise\nin two lines"), 1, "internal error, ValueError: surprise in two lines"),
    ],
)
def test_what_goes_wrong_later_is_one_line_too(run, stack, tmp_path, monkeypatch, raised, code, words):
    def stream(*_, **__):
        raise raised

    monkeypatch.setattr(UnCLIP, "stream", stream)
    got, _, err = run(*sample(stack, "--out", "made"))
    assert got == code and len(err) == 1 and words in err[0] and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("file", "code", "words"), [
    ("jax/_src/xla_bridge.py", 2, "JAX_PLATFORMS=cuda). Fix: unset JAX_PLATFORMS"), ("other.py", 1, "internal error"),
])  # fmt: skip
def test_a_platform_without_its_plugin_is_told(run, stack, tmp_path, monkeypatch, file, code, words):
    """jax fails `assert _default_backend is not None` there, without a word."""

    def stream(*_, **__):
        exec(compile("assert None is not None", file, "exec"))

    monkeypatch.setattr(UnCLIP, "stream", stream)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    got, _, err = run(*sample(stack, "--out", "made"))
    assert got == code and len(err) == 1 and words in err[0]


@pytest.mark.skipif(os.name != "posix", reason="of signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_command_that_is_stopped_leaves_at_once_and_nothing_behind(number, stack, tmp_path):
    """While a program runs on the device, for which the interpreter does not wait."""
    code = f"""
import os, signal, sys, tempfile, threading
import jax, jax.numpy as jnp
from unclip_jax import cli
def run(args):
    with tempfile.TemporaryDirectory(dir={str(tmp_path)!r}):
        x = jnp.ones((64, 64))  # what is smaller runs in the thread that asks for it
        long = jax.jit(lambda x: jax.lax.fori_loop(0, 10**7, lambda _, x: jnp.tanh(x @ x), x)).lower(x).compile()
        threading.Timer(0.5, os.kill, (os.getpid(), {int(number)})).start()
        jax.device_get(long(x))
cli.parse = lambda argv: type("args", (), {{"run": staticmethod(run)}})
sys.argv[1:] = []
signal.signal(signal.SIGINT, signal.default_int_handler)  # the tests may run where it is ignored, and then it stays so
cli.script()
"""
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, env=env)
    assert done.returncode == 128 + number, done.stderr
    assert done.stderr == ("interrupted\n" if number == signal.SIGINT else "terminated\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name != "posix", reason="of signals")
def test_a_stop_is_not_lost_in_a_destructor():
    code = """
import os, signal, sys, time
from unclip_jax import cli
class Deaf:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(1000): pass
def run(args):
    Deaf()
    time.sleep(60)
cli.parse = lambda argv: type("args", (), {"run": staticmethod(run)})
sys.argv[1:] = []
cli.script()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stderr) == (143, "terminated\n")


@pytest.mark.skipif(os.name != "posix", reason="of signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_does_not_wait_for_what_python_cannot_leave(number):
    code = f"""
import hashlib, os, signal, sys, threading
from unclip_jax import cli
def run(args):
    threading.Timer(0.5, os.kill, (os.getpid(), {int(number)})).start()
    hashlib.pbkdf2_hmac("sha256", b"a", b"b", 2**31 - 1)  # half an hour in one call
cli.PATIENCE = 0.5
cli.parse = lambda argv: type("args", (), {{"run": staticmethod(run)}})
sys.argv[1:] = []
signal.signal(signal.SIGINT, signal.default_int_handler)
cli.script()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stderr) == (128 + number, "interrupted\n" if number == 2 else "terminated\n")


def test_a_second_interruption_has_its_exit_code(run, monkeypatch):
    def parse(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "parse", parse)
    assert run("sample")[0] == 130


def test_debug_shows_where(run):
    with pytest.raises(Exception, match="must not be empty"):
        run("sample", "", "--out", "o", "--debug")


def test_evaluate_prints_a_table_and_writes_a_report(run, stack, tmp_path):
    argv = ["evaluate", "--model", stack, "--num", 4, "--num-objects", "one", "--seed", 3]
    code, out, err = run(*argv, "--out", "r/report.json", "--sheet", "r/sheet.png")
    assert (code, err) == (0, [])
    lines = out.splitlines()
    assert lines[0].split()[:4] == ["objects", "pairs", "n", "right"]
    assert [line.split()[:3] for line in lines[1:]] == [
        ["one", "seen", "4"], ["one", "heldout", "4"], ["all", "all", "8"]
    ]  # fmt: skip
    report = json.loads((tmp_path / "r" / "report.json").read_text())
    assert report["pixels"] == 32 and report["seed"] == 3 and report["settings"]["decoder"]["steps"] == 4
    assert [row["n"] for row in report["results"]] == [4, 4, 8]
    assert Image.open(tmp_path / "r" / "sheet.png").width > 160
    run(*argv, "--out", "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "r" / "report.json").read_bytes()


def test_evaluate_base_judges_the_decoders_pictures(run, stack, tmp_path):
    argv = ["evaluate", "--model", stack, "--num", 4, "--num-objects", "one", "--base", "--out", "base.json"]
    assert run(*argv)[0] == 0
    assert json.loads((tmp_path / "base.json").read_text())["pixels"] == 16


def test_data_show_writes_a_sheet(run, tmp_path):
    code, out, err = run("data", "show", "shapes", "--size", 32, "--num", 5, "--out", "deep/sheet.png")
    assert (code, err) == (0, []) and "5 of 1000000 records of 'shapes'" in out
    assert Image.open(tmp_path / "deep" / "sheet.png").width > 5 * 100


def test_data_show_reads_a_folder(run, tmp_path):
    run("data", "show", "shapes", "--size", 32, "--num", 1, "--out", "mine/a.png")
    (tmp_path / "mine" / "a.txt").write_text("a sheet")
    argv = ["data", "show", "folder", "--path", "mine", "--split", "all", "--out", "sheet.png"]
    assert run(*argv)[0] == 0 and (tmp_path / "sheet.png").exists()


@pytest.mark.parametrize(
    "argv", [["--help"], ["--version"], ["sample", "--help"], ["data", "show", "--help"]]
)
def test_help_goes_to_stdout_with_exit_code_0(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 0 and capsys.readouterr().out


def test_the_command_is_quick_to_help_and_to_refuse():
    """In a process of its own; importing jax alone would take longer."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    for argv, code in ((["--help"], 0), (["sample", "x", "--out", "o", "--steps", "0"], 2)):
        began = time.process_time(), os.times().children_user
        done = subprocess.run(
            [sys.executable, "-m", "unclip_jax.cli", *argv],
            env=env,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == code and "Traceback" not in done.stderr
        assert os.times().children_user - began[1] < 0.5
        assert len(done.stderr.splitlines()) == (1 if code else 0)


def test_every_flag_of_sampling_reaches_every_command_that_draws():
    from unclip_jax.cli.arguments import given_settings

    flags = ["--prior", "ar", "--prior-top-p", "0.5", "--sampler", "dpm", "--rescale", "0.7", "--interval", "0.1,0.9"]
    wanted = {"prior": "ar", "prior_top_p": 0.5, "sampler": "dpm", "rescale": 0.7, "interval": (0.1, 0.9)}
    for command in (["sample", "x", "--out", "o"], ["evaluate", "--data", "shapes"], ["vary", "p.png", "--out", "o"]):
        assert given_settings(cli.parse([*command, *flags])) == wanted
