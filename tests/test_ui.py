"""The web page: which tabs a stack has, what their fields mean, what is told of mistakes; and the page, with gradio."""

import dataclasses
import io
import os
import signal
import socket
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import tiny_stack
from unclip_jax import cli, forms, ui
from unclip_jax.errors import UserError
from unclip_jax.forms import draw, given, offered, tabs
from unclip_jax.pipeline import UnCLIP
from unclip_jax.settings import Settings

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def pipe():
    return UnCLIP.load(tiny_stack.path())


def without(pipe, *stages, vision=True):
    tasks = {name: task for name, task in pipe.tasks.items() if name not in stages}
    if not vision:
        tasks["clip"] = dataclasses.replace(tasks["clip"], model=tasks["clip"].model.clone(vision=None))
    return dataclasses.replace(pipe, tasks=tasks)


def test_a_stack_has_the_tabs_that_it_can_do(pipe):
    assert list(tabs(pipe)) == list(forms.TABS) == list(forms.DRAW)
    blind = tabs(without(pipe, vision=False))
    assert list(blind) == ["Prompts", "Blend", "Inpaint"] and "image" not in blind["Blend"]
    wordless = tabs(without(pipe, "prior", "prior_ar"))
    assert list(wordless) == ["Variations", "Blend", "Edit", "Inpaint"]
    assert {"prompt", "to_prompt"}.isdisjoint({*wordless["Blend"], *wordless["Inpaint"]})
    glide = tabs(without(pipe, "clip", "prior", "prior_ar"))
    assert list(glide) == ["Prompts", "Inpaint"] and "prompt" in glide["Inpaint"]


def test_no_two_fields_of_a_tab_have_one_label():
    for fields in forms.TABS.values():
        labels = [options["label"] for _, options in {**fields, **forms.COMMON}.values()]
        assert len(labels) == len(set(labels))


def test_settings_come_from_the_one_list_and_show_what_the_stack_draws_with(pipe):
    assert set(offered(pipe, "Prompts")) == {field.name for field in dataclasses.fields(Settings)}
    used, told = pipe.settings(), offered(pipe, "Prompts")
    assert told["prior"] == "diffusion" and told["prior_top_p"] == 1.0 and told["interval"] is None
    assert told["steps"] == used["decoder"]["steps"] and told["sampler"] == used["decoder"]["name"]
    assert told["prior_guidance"] == used["prior"]["guidance"] and told["upsample_steps"] == used["upsampler"]["steps"]
    assert offered(pipe, "Edit")["guidance"] == 2 and offered(pipe, "Variations")["guidance"] == 1
    assert offered(pipe, "Inpaint")["candidates"] == 64
    assert not {"prior", "prior_steps", "candidates"} & set(offered(pipe, "Variations"))
    assert not {"tile", "upsample_steps"} & set(offered(pipe.without_upsamplers(), "Prompts"))
    assert "prior" not in offered(without(pipe, "prior_ar"), "Prompts")


def test_what_is_empty_is_not_given():
    values = {"prior": "", "steps": 3.0, "sampler": "dpm", "interval": "0.1, 0.9", "guidance": None, "num": 1}
    assert given(values) == {"steps": 3, "sampler": "dpm", "interval": (0.1, 0.9)}
    assert type(given(values)["steps"]) is int


class Recorder:
    """A stack that draws nothing, and remembers what it was asked."""

    def __getattr__(self, name):
        def method(*args, **kwargs):
            self.called = name, args, kwargs
            total = kwargs.get("num", 0) * len(args[0]) or (len(args[3]) if name == "text_diff" else args[1])
            return np.zeros((total, 4, 4, 3), np.uint8)

        return method


@pytest.fixture
def photo(tmp_path):
    Image.new("RGB", (6, 5), "red").save(tmp_path / "photo.png")
    return str(tmp_path / "photo.png")


def png(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def canvas(*layers, background=None):
    return {"background": background or png(np.full((5, 6, 3), 9, np.uint8)), "layers": list(layers)}


def stroke(x):
    layer = np.zeros((5, 6, 4), np.uint8)
    layer[1, x, 3] = 200
    return png(layer)


COMMON = {"seed": 7, "batch_size": 8.0}


def test_prompts(pipe):
    values = {"prompts": " a red circle\n\n a blue ring ", "num": 2, **COMMON, "steps": 2, "guidance": None}
    pictures, facts = draw(pipe, "Prompts", values)
    expected = pipe.generate(["a red circle", "a blue ring"], 7, num=2, steps=2)
    assert all(np.array_equal(image, other) for (image, _), other in zip(pictures, expected, strict=True))
    assert [label for _, label in pictures] == ["a red circle"] * 2 + ["a blue ring"] * 2
    assert facts == {"prompts": values["prompts"], "num": 2, "seed": 7, "settings": {"steps": 2}}


def test_a_seed_that_is_not_given_is_another_each_time_and_told():
    asked, seeds = Recorder(), set()
    for _ in range(3):
        seeds.add(draw(asked, "Prompts", {"prompts": "a", "num": 1, "seed": None, "batch_size": 1})[1]["seed"])
        assert asked.called[2]["seed"] in seeds
    assert len(seeds) == 3


def test_variations(photo):
    asked = Recorder()
    form = {"image": photo, "eta": 0.25, "white_noise": False, "num": 3.0, **COMMON}
    pictures, facts = draw(asked, "Variations", form)
    name, (images,), more = asked.called
    assert name == "variations" and images[0].shape == (5, 6, 3) and (images[0] == (255, 0, 0)).all()
    assert more == {"num": 3, "eta": 0.25, "seed": 7, "batch_size": 8} and len(pictures) == 3
    assert facts == {"eta": 0.25, "white_noise": False, "num": 3, "seed": 7, "settings": {}}
    draw(asked, "Variations", {**form, "white_noise": True})
    assert asked.called[2]["eta"] is None


def test_blend(photo):
    asked = Recorder()
    form = {"image": photo, "prompt": "", "to_image": None, "to_prompt": " a star ", "frames": 3, **COMMON}
    assert [label for _, label in draw(asked, "Blend", {**form, "prior": "ar"})[0]] == ["0.00", "0.50", "1.00"]
    name, (inputs, frames), more = asked.called
    assert name == "interpolate" and inputs[0].shape == (5, 6, 3) and inputs[1] == "a star" and frames == 3
    assert more == {"seed": 7, "batch_size": 8, "prior": "ar"}


def test_edit(photo):
    asked = Recorder()
    draw(asked, "Edit", {"image": photo, "source": "red ", "target": "green", "theta": 0.5, "frames": 3, **COMMON})
    name, (images, *texts, thetas), more = asked.called
    assert name == "text_diff" and texts == ["red", "green"] and thetas == [0, 0.25, 0.5] and len(images) == 1


def test_inpaint():
    asked = Recorder()
    form = {"canvas": canvas(stroke(1), stroke(4)), "prompt": "a star", "strength": 1.0, "num": 2, **COMMON}
    draw(asked, "Inpaint", form)
    name, (images, holes, prompts), more = asked.called
    assert name == "inpaint" and images[0].shape == (5, 6, 3) and prompts == ["a star"] and more["strength"] == 1
    assert np.argwhere(holes[0]).tolist() == [[1, 1], [1, 4]] and holes[0].dtype == bool
    draw(asked, "Inpaint", {**form, "canvas": canvas(), "prompt": "", "strength": 0.5})
    assert asked.called[1][1:] == (None, None) and asked.called[2]["strength"] == 0.5


PROMPTS = {"prompts": "a", "num": 1, **COMMON}
BLEND = {"image": None, "prompt": "a", "to_image": None, "to_prompt": "b", "frames": 3, **COMMON}
INPAINT = {"canvas": None, "prompt": "a", "strength": 1, "num": 1, **COMMON}
WRONG = [
    ("Prompts", {**PROMPTS, "prompts": " \n "}, "no prompt"),
    ("Prompts", {**PROMPTS, "prompts": None}, "no prompt"),
    ("Prompts", {**PROMPTS, "prompts": "a\nb\nc", "num": 64}, "prompts by pictures of each=192"),
    ("Prompts", {**PROMPTS, "prompts": "a" * 10_001}, "more than 10000 characters"),
    ("Prompts", {**PROMPTS, "prompts": "a \ud83e"}, "half of a surrogate pair"),
    ("Prompts", {**PROMPTS, "num": 1.5}, "num=1.5"),
    ("Prompts", {**PROMPTS, "num": 10**6}, "num=1000000"),
    ("Prompts", {**PROMPTS, "batch_size": 65}, "batch_size=65"),
    ("Prompts", {**PROMPTS, "batch_size": None}, "batch_size=None"),
    ("Prompts", {**PROMPTS, "seed": -1}, "seed=-1"),
    ("Prompts", {**PROMPTS, "seed": 0.5}, "seed=0.5"),
    ("Prompts", {**PROMPTS, "candidates": 10**6}, "candidates=1000000"),
    ("Prompts", {**PROMPTS, "steps": 2.5}, "steps=2.5"),
    ("Prompts", {**PROMPTS, "steps": 21}, "21 steps are more than the 20"),
    ("Prompts", {**PROMPTS, "interval": "0.9"}, "0 <= low < high <= 1"),
    ("Prompts", {**PROMPTS, "interval": "low,high"}, "two numbers with a comma"),
    ("Prompts", {**PROMPTS, "sampler": "nosuch"}, "sampler='nosuch' is unknown"),
    ("Variations", {"image": None, "eta": 0.5, "white_noise": False, "num": 1, **COMMON}, "no picture"),
    ("Blend", {**BLEND, "prompt": ""}, "each end of a blend"),
    ("Blend", {**BLEND, "image": "p.png"}, "each end of a blend"),
    ("Blend", {**BLEND, "frames": 65}, "frames=65"),
    ("Variations", {"image": None, "eta": None, "white_noise": False, "num": 1, **COMMON}, "eta=None"),
    ("Edit", {"image": None, "source": "", "target": "", "theta": 2, "frames": 3, **COMMON}, "theta=2"),
    ("Inpaint", INPAINT, "no picture"),
    ("Inpaint", {**INPAINT, "canvas": canvas()}, "nothing is painted over"),
    ("Inpaint", {**INPAINT, "canvas": canvas(), "strength": None}, "strength=None"),
    ("Inpaint", {**INPAINT, "canvas": canvas(background=b"no")}, "the picture is not a picture"),
    ("Inpaint", {**INPAINT, "canvas": canvas(png(np.zeros((4, 4, 4), np.uint8)))}, "not of the picture's size"),
]


@pytest.mark.parametrize(("tab", "values", "words"), WRONG, ids=[words for *_, words in WRONG])
def test_a_mistake_is_told(tab, values, words, pipe):
    with pytest.raises(UserError) as error:
        draw(pipe, tab, values)
    assert words in str(error.value)


def test_an_upload_that_is_no_picture_is_told_without_its_folder(tmp_path, pipe):
    (tmp_path / "a.png").write_text("no picture")
    form = {"image": str(tmp_path / "a.png"), "eta": 0.5, "white_noise": False, "num": 1, **COMMON}
    with pytest.raises(UserError, match=r"^a\.png is not a picture"):
        draw(pipe, "Variations", form)


def test_an_address_that_cannot_be_listened_on(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.main(["ui", "--port", str(port)]) == 2
    err = capsys.readouterr().err
    assert f"error: nothing can listen on port {port} of '127.0.0.1' (Address already in use). Fix: " in err
    for argv in (["--host", "no.such.invalid"], ["--port", "0"], ["--port", "65536"]):
        assert cli.main(["ui", *argv]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 3


def test_only_loopback_is_for_this_machine_alone():
    assert ui._check_address("127.0.0.1", 0) and ui._check_address("localhost", 0)
    assert not ui._check_address("0.0.0.0", 0)


def test_without_gradio_the_command_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.setattr(os, "environ", {**os.environ})
    assert cli.main(["ui", "--port", str(free_port())]) == 2
    err = capsys.readouterr().err
    assert err == 'error: the web page needs the package gradio. Fix: pip install "unclip_jax[ui]"\n'


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as there:
        return there.getsockname()[1]


class Blocks:
    """A page that is never shown."""

    def launch(self, **how):
        self.how = how


@pytest.mark.parametrize(("host", "warned"), [("127.0.0.1", False), ("0.0.0.0", True)])
def test_the_page_is_private_unless_a_host_is_given(host, warned, monkeypatch, capsys):
    shown, port = Blocks(), free_port()
    monkeypatch.setattr(ui, "page", lambda pipe, model: shown)
    monkeypatch.setattr(ui, "_gradio", lambda: None)
    monkeypatch.setattr(ui.threading, "Event", lambda: types.SimpleNamespace(wait=lambda: None))
    monkeypatch.setattr(UnCLIP, "load", lambda *_, **__: None)
    monkeypatch.setattr(os, "environ", {**os.environ})
    assert cli.main(["ui", "--host", host, "--port", str(port)]) == 0
    out, err = capsys.readouterr()
    assert out == f"shapes is at http://{host}:{port} (Ctrl-C ends it)\n"
    told = f"warning: anyone who can reach port {port} of this machine can use the page\n"
    assert err == (told if warned else "")
    assert (shown.how["server_name"], shown.how["server_port"], shown.how["share"]) == (host, port, False)
    assert not Path(os.environ["GRADIO_TEMP_DIR"]).exists()


def test_what_was_sent_reaches_the_form_as_it_is(photo):
    """A number out of range, no choice, no picture: told by the form; what was painted ahead is kept no longer."""
    gr = pytest.importorskip("gradio")
    for kind, options, value in (("Slider", dict(maximum=4), 99), ("Slider", {}, None), ("Dropdown", {}, "no such")):
        assert ui._component(gr, kind, options).preprocess(value) is value
    file = types.SimpleNamespace(path=photo)
    assert ui._component(gr, "Image", {}).preprocess(file) == photo
    editor, empty = ui._component(gr, "ImageEditor", {}), dict(background=None, layers=[], composite=None)
    assert editor.preprocess(None) is None
    sent = types.SimpleNamespace(id=None, background=file, layers=[file])
    assert editor.preprocess(sent) == {"background": photo, "layers": [photo]}
    editor.blob_storage["ahead"] = types.SimpleNamespace(background=b"a", layers=[b"b", None])
    sent = types.SimpleNamespace(**{**empty, "id": "ahead"})
    assert editor.preprocess(sent) == {"background": b"a", "layers": [b"b", None]} and not editor.blob_storage


@pytest.mark.slow
def test_the_page_draws_what_the_stack_does_and_tells_of_mistakes(pipe, tmp_path):
    """In a process of its own, until it is interrupted."""
    pytest.importorskip("gradio")
    from gradio_client import Client

    port, names = free_port(), offered(pipe, "Prompts")
    names = [name for name in ui.SHOWN if name in names] + [name for name in names if name not in ui.SHOWN]
    empty = {name: "" if name.endswith(("sampler", "interval")) or name == "prior" else None for name in names}
    form = ["a red circle\na blue ring", 1, 7, 2]
    code = "import signal; signal.signal(2, signal.default_int_handler); from unclip_jax.cli import script; script()"
    argv = [sys.executable, "-c", code, "ui", "--port", str(port), "--model", str(tiny_stack.path())]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    with subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == f"tiny is at http://127.0.0.1:{port} (Ctrl-C ends it)\n"
            client = Client(f"http://127.0.0.1:{port}/", verbose=False)

            def ask(**settings):
                return client.predict(*form, *{**empty, **settings}.values(), api_name="/prompts")

            pictures, seed, facts = ask(steps=2)
            with Image.open(pictures[1]["image"]) as image:
                assert image.format == "PNG" and image.text["seed"] == "7" and image.text["label"] == "a blue ring"
                drawn = np.asarray(image)
            assert np.array_equal(drawn, pipe.generate(["a red circle", "a blue ring"], 7, steps=2)[1])
            assert seed == 7 and facts["settings"] == {"steps": 2} and facts["model"] == "tiny"
            for wrong, words in ({"steps": 21}, "21 steps are more"), ({"interval": "<b>"}, "interval=&#x27;&lt;b&gt;"):
                with pytest.raises(Exception, match=words):
                    ask(**wrong)
            assert client.config["analytics_enabled"] is False
            assert {event["api_name"] for event in client.config["dependencies"]} == {tab.lower() for tab in forms.TABS}
        finally:
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (130, "", "interrupted\n")
    assert not list(tmp_path.glob("unclip-ui-*"))
