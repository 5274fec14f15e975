"""Configs are read strictly, keep their types, and survive JSON unchanged."""

import sys
import textwrap

import pytest
from ml_collections import ConfigDict

from unclip_jax import config
from unclip_jax.errors import UserError

COMMON = """
    from ml_collections import ConfigDict, FieldReference

    def base():
        width = FieldReference(32)
        c = ConfigDict()
        c.task = "clip"
        c.batch_size = 64
        c.flag = False
        c.clip = None
        c.model = ConfigDict({"width": width, "mlp": width * 4, "levels": [16, 8], "dtype": "bfloat16"})
        c.optim = ConfigDict({"lr": 1e-3, "clip_norm": 1.0, "betas": (0.9, 0.99)})
        c.rules = ((".*", "fsdp"),)
        c.empty = ConfigDict()
        return c
"""
MAIN = """
    from configs import common

    def get_config(arg=""):
        c = common.base()
        if arg == "tiny":
            c.model.width = 8
        elif arg:
            raise ValueError(f"variant {arg!r} is unknown; variants: tiny")
        return c
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "configs" / "shapes").mkdir(parents=True)
    (tmp_path / "configs" / "common.py").write_text(textwrap.dedent(COMMON))
    (tmp_path / "configs" / "shapes" / "clip.py").write_text(textwrap.dedent(MAIN))
    return tmp_path


@pytest.fixture
def path(folder):
    return str(folder / "configs" / "shapes" / "clip.py")


def _refused(*args) -> str:
    with pytest.raises(UserError) as error:
        config.load_config(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_variants_are_locked_and_resolved(path):
    plain, tiny = config.load_config(path), config.load_config(path + ":tiny")
    assert plain.model.mlp == 128 and tiny.model.mlp == 32 and type(tiny.model.mlp) is int
    assert plain.model.levels == (16, 8)
    with pytest.raises(AttributeError):
        plain.model.depth = 1
    with pytest.raises(AttributeError):
        plain.new = 1


def test_json_round_trip_is_exact(path):
    loaded = config.load_config(path, ["optim.lr=0.1", "model.dtype=3"])
    again = config.from_json(config.to_json(loaded))
    assert again == loaded and again.is_locked and config.to_json(again) == config.to_json(loaded)
    assert {k: (type(v), v) for k, v in config.flatten(again).items()} == {
        k: (type(v), v) for k, v in config.flatten(loaded).items()
    }
    assert again.rules == ((".*", "fsdp"),) and again.model.dtype == "3" and again.optim.lr == 0.1


def test_a_stored_config_runs_nothing(tmp_path):
    text = '{"a": "__import__(\'pathlib\').Path(\'canary\').touch()", "b": {"!python": "os.system"}}'
    before = set(sys.modules)
    loaded = config.from_json(text)
    assert loaded.a.startswith("__import__") and loaded.b["!python"] == "os.system"
    assert set(sys.modules) == before


@pytest.mark.parametrize(
    "text", ["", "[1]", "{", '{"a.b": 1}', '{"": 1}', "[" * 10**5, "null", '{"__class__": 1}']
)
def test_malformed_json_is_refused(text):
    with pytest.raises(UserError):
        config.from_json(text)


def test_values_json_cannot_hold_are_refused(folder, path):
    (folder / "configs" / "shapes" / "clip.py").write_text(
        "from ml_collections import ConfigDict\ndef get_config(arg):\n    return ConfigDict({'act': print})\n"
    )
    assert "act=" in _refused(path)


@pytest.mark.parametrize(
    "text, key, value",
    [
        ("batch_size=32", "batch_size", 32),
        ("batch_size=1e3", "batch_size", 1000),
        ("optim.lr=1", "optim.lr", 1.0),
        ("optim.lr= 3e-4", "optim.lr", 3e-4),
        ("optim.clip_norm=None", "optim.clip_norm", None),
        ("clip=/runs/a=b", "clip", "/runs/a=b"),
        ("clip=7", "clip", 7),
        ("flag=True", "flag", True),
        ("flag=true", "flag", True),
        ("task=prior", "task", "prior"),
        ("task='a b'", "task", "a b"),
        ("task=12", "task", "12"),
        ("task=true", "task", "true"),
        ("model.levels=(4,)", "model.levels", (4,)),
        ("model.levels=[8, 4, 2]", "model.levels", (8, 4, 2)),
        ("model.levels=8,4", "model.levels", (8, 4)),
        ("model.levels=()", "model.levels", ()),
        ("optim.betas=(0, 0.5)", "optim.betas", (0.0, 0.5)),
        ("rules=(('a', 'replicate'), ('.*', (None, 'tensor')))", "rules",
         (("a", "replicate"), (".*", (None, "tensor")))),
    ],
)  # fmt: skip
def test_overrides_keep_types(path, text, key, value):
    got = config.flatten(config.load_config(path, [text]))[key]
    assert got == value and type(got) is type(value)
    if isinstance(value, tuple):
        assert [type(x) for x in got] == [type(x) for x in value]


def test_overrides_reach_what_refers_to_them(path):
    assert config.load_config(path, ["model.width=16"]).model.mlp == 64


@pytest.mark.parametrize(
    "text, told",
    [
        ("optim.lr=abc", "optim.lr=abc must be a number"),
        ("optim.lr=True", "a number"),
        ("optim.lr='1'", "a number"),
        ("optim.lr=nan", "a number"),
        ("batch_size=2.5", "an int"),
        ("batch_size=True", "an int"),
        ("batch_size=__import__('os').getpid()", "an int"),
        ("flag=1", "True or False"),
        ("flag=yes", "True or False"),
        ("model.levels=4", "a tuple"),
        ("model.levels=('a',)", "an int"),
        ("model.widht=4", "did you mean 'model.width'"),
        ("width=4", "did you mean 'model.width'"),
        ("model.width.x=4", "no key 'model.width.x'"),
        ("nothing.at.all=4", "no key"),
        ("model=4", "is a block"),
        ("batch_size", "key=value"),
        ("=3", "key=value"),
        ("empty.a=3", "no key"),
    ],
)
def test_bad_overrides_are_refused(path, text, told):
    assert told in _refused(path, [text])


def test_missing_and_wrong_files(folder, path):
    assert "clip.py" in _refused(path.replace("clip.py", "clipp.py"))
    assert "did you mean" in _refused(path.replace("clip.py", "clipp.py"))
    assert "give" in _refused(path.removesuffix(".py"))
    assert "clip.py" in _refused(str(folder / "configs" / "shapes"))
    assert "does not exist" in _refused(str(folder / "none" / "x.py"))
    assert "no config" in _refused("") and "folder" in _refused(".")
    (folder / "notes.txt").write_text("x = 1")
    assert "Python file" in _refused(str(folder / "notes.txt"))


@pytest.mark.parametrize(
    "source, told",
    [
        ("def get_config(arg):\n    return (\n", "clip.py:2"),
        ("x = 1\n", "must define get_config"),
        ("def get_config(arg):\n    return {}\n", "ConfigDict, not dict"),
        ("def get_config(arg):\n\n    return 1 / 0\n", "clip.py:3: ZeroDivisionError"),
        ("import no_such_module_at_all\n", "clip.py:1: ModuleNotFoundError"),
        ("from configs import commn\n", "clip.py:1: ImportError"),
        ("def get_config(arg):\n    raise ValueError('bad arg ' + arg)\n", "bad arg"),
        ("def get_config(arg):\n    return {'a': 1}['x']\n", "variant '': KeyError('x') ("),
        ("import sys\nsys.exit(3)\n", "clip.py:2: SystemExit: 3"),
        ("def get_config(arg):\n    exit('enough')\n", "clip.py:2: SystemExit: enough"),
    ],
)
def test_errors_in_a_config_name_the_line(path, source, told):
    with open(path, "w") as file:
        file.write(source)
    assert told in _refused(path)


def test_a_signal_while_a_config_is_run_still_ends_the_program(path):
    with open(path, "w") as file:
        file.write("raise SystemExit(143)\n")
    with pytest.raises(SystemExit):
        config.load_config(path)


def test_variants(folder, path):
    assert "variants: tiny" in _refused(path + ":tinny")
    (folder / "own.py").write_text(
        "from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({'a': 1})\n"
    )
    assert config.load_config(str(folder / "own.py")).a == 1
    assert "no variants" in _refused(str(folder / "own.py:x"))


def test_each_config_imports_the_shared_file_beside_it(folder, tmp_path_factory, path):
    other = tmp_path_factory.mktemp("other") / "configs"
    (other / "shapes").mkdir(parents=True)
    (other / "common.py").write_text(textwrap.dedent(COMMON).replace("32", "48"))
    (other / "shapes" / "clip.py").write_text(textwrap.dedent(MAIN))
    search, modules = list(sys.path), set(sys.modules)
    widths = [config.load_config(str(p)).model.width for p in (path, other / "shapes" / "clip.py", path)]
    assert widths == [32, 48, 32]
    assert sys.path == search and set(sys.modules) == modules
    assert not list(other.rglob("__pycache__"))


def test_diff():
    old = ConfigDict({"a": 1, "m": {"w": 2, "x": (1, 2)}, "gone": 0, "e": {}})
    new = ConfigDict({"a": 1.0, "m": {"w": 3, "x": (1, 2)}, "here": "t", "e": {}})
    assert config.diff(old, new) == [
        "a: 1 -> 1.0",
        "gone: 0 -> (absent)",
        "here: (absent) -> 't'",
        "m.w: 2 -> 3",
    ]
    assert config.diff(old, old) == []


def test_the_data_block_takes_what_its_source_may_know():
    block = {"source": "folder", "path": "a", "size": 4, "seed": 1, "split": "train", "captions": True}
    made = ConfigDict({"data": block})
    for text in ("data.path=b", "data.index=i", "data.max_bad=0.5"):
        config.override(made, text)
    assert made.data.to_dict() == {
        "source": "folder", "path": "b", "size": 4, "seed": 1, "split": "train", "captions": True, "index": "i",
        "max_bad": 0.5,
    }  # fmt: skip
    config.override(made, "data.source=webdataset")
    config.override(made, "data.path=c.tar")
    assert made.data.to_dict() == {"source": "webdataset", "path": "c.tar", "size": 4, "seed": 1, "split": "train"}
    with pytest.raises(UserError, match="data.deep.key"):
        config.override(made, "data.deep.key=1")


def test_another_source_may_be_named_after_its_arguments(folder):
    (folder / "own.py").write_text(
        "from ml_collections import ConfigDict\ndef get_config():\n"
        "    return ConfigDict({'data': {'source': 'folder', 'path': '', 'size': 4, 'captions': True}})\n"
    )
    for order in (1, -1):
        overrides = ["data.path=c.tar", "data.index=i", " data.source =webdataset"][::order]
        made = config.load_config(str(folder / "own.py"), overrides)
        assert made.data.to_dict() == {"source": "webdataset", "size": 4, "path": "c.tar", "index": "i"}
