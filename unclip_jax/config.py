"""Configs: a Python file with `get_config(variant)`, typed overrides, and JSON as the stored form.

A config file is code and is run; a stored config is JSON and never is. Lists become tuples on every way in,
so a config equals itself after JSON, and its values are hashable.
"""

import ast
import contextlib
import difflib
import importlib
import importlib.util
import inspect
import json
import sys
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path

from ml_collections import ConfigDict

from unclip_jax.errors import UserError, suggest
from unclip_jax.storage import json_object

OF_EVERY_SOURCE = {"source", "split", "size", "seed"}  # arguments, in the block `data`
SIGNALLED = (130, 143)  # exit codes after SIGINT and SIGTERM, which may come while a config is run


def load_config(spec: str, overrides: Iterable[str] = ()) -> ConfigDict:
    """The locked config of "path/file.py" or "path/file.py:variant", "block.key=value" overrides applied.

    Args:
      spec: a path, and after a colon the variant given to `get_config` ("" where there is none).
      overrides: "a.b=value" texts; a value is read by the type of the one it replaces. That of data.source comes first,
        for it says what other keys of `data` there are.

    Raises:
      UserError: no such file, an error in it, an unknown variant or key, a value of another type.
    """
    path, variant = _split(str(spec))
    config = _run(path, variant)
    for text in sorted(overrides, key=lambda text: text.partition("=")[0].strip() != "data.source"):
        override(config, text)
    config = from_values(config.copy_and_resolve_references(), where=str(path))
    return config


def override(config: ConfigDict, text: str) -> None:
    """Sets one key of `config` in place from "a.b=value", keeping the type of the present value.

    An int fits a float and a whole float (1e5) an int; `None` fits everything; a text never fits a number. The block
    `data` takes any key, for its source knows its own arguments, and another source drops those of the one before.
    """
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not key:
        raise UserError(f"override {text!r} must have the form key=value", "write it like model.width=64")
    block, *_, name = (config, *key.split("."))
    for part in key.split(".")[:-1]:
        block = block[part] if isinstance(block, ConfigDict) and part in block else None
    own = key == f"data.{name}"
    if not isinstance(block, ConfigDict) or (name not in block and not own):
        raise UserError(f"config has no key {key!r}", _nearest_key(key, config))
    if isinstance(block.get(name), ConfigDict):
        inner = ", ".join(f"{key}.{k}" for k in block[name]) or "it has none"
        raise UserError(f"{key} is a block of keys, not one value", f"set one of its keys: {inner}")
    new = _typed(key, value.strip(), block.get(name))
    with block.unlocked(), block.ignore_type():
        if own and name == "source" and new != block.get(name):
            for other in set(block) - OF_EVERY_SOURCE:
                del block[other]
        block[name] = new


def flatten(config: Mapping, prefix: str = "") -> dict:
    """{"model.width": 64, …}: every value of `config` by its dotted key; an empty block is kept as {}."""
    flat = {}
    for name, value in config.items():
        if isinstance(value, (ConfigDict, Mapping)) and len(value):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = {} if isinstance(value, (ConfigDict, Mapping)) else value
    return flat


def diff(old: Mapping, new: Mapping) -> list[str]:
    """What changed from `old` to `new`: "key: old -> new", sorted by key; [] when they are equal."""
    old, new = flatten(old), flatten(new)
    lines = []
    for key in sorted(old.keys() | new.keys()):
        before, after = (repr(flat[key]) if key in flat else "(absent)" for flat in (old, new))
        if before != after:
            lines.append(f"{key}: {before} -> {after}")
    return lines


def to_json(config: ConfigDict) -> str:
    """The stored form: indented JSON, which `from_json` turns into an equal config."""
    return json.dumps(_plain(config, ""), indent=2) + "\n"


def from_json(text: str, where: str = "stored config") -> ConfigDict:
    """The locked config of `to_json`'s text. Runs and imports nothing. `where` names the text in errors."""
    return from_values(json_object(text, where), where)


def from_values(values: Mapping, where: str) -> ConfigDict:
    """The locked config of plain values, lists as tuples. `where` names them in errors."""
    try:
        return ConfigDict(_plain(values, "")).lock()
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except (TypeError, ValueError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{where} does not make a config ({error})") from None


def _plain(value, key: str):
    """`value` as dict, tuple and scalars only."""
    if isinstance(value, (ConfigDict, Mapping)):
        for name in value:
            if not isinstance(name, str) or not name or "." in name:
                raise UserError(f"config key {name!r} under {key or 'the top'!r} must be a text without dots")
        return {name: _plain(inner, f"{key}.{name}".lstrip(".")) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(_plain(inner, key) for inner in value)
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise UserError(
        f"{key}={value!r} is a {type(value).__name__}, which a stored config cannot hold",
        "use numbers, texts, True, False, None, or tuples of them (a dtype as a text: 'bfloat16')",
    )


def _split(spec: str) -> tuple[Path, str]:
    path, colon, variant = spec.rpartition(":")
    if not colon or not path.endswith(".py"):
        path, variant = spec, ""
    path = Path(path)
    if path.is_file() and path.suffix == ".py":
        return path, variant
    if not spec:
        raise UserError("no config was given", "name one, such as configs/shapes/clip.py")
    if path.is_file() or path.suffix == "" and path.name and path.with_suffix(".py").is_file():
        there = path.with_suffix(".py").is_file()
        fix = f"give {path.with_suffix('.py')}" if there else "name one, such as configs/shapes/clip.py"
        raise UserError(f"config {str(path)!r} must be a Python file", fix)
    if path.is_dir():
        inside = ", ".join(sorted(str(p) for p in path.glob("*.py"))[:10])
        raise UserError(
            f"config {str(path)!r} is a folder", f"name a file in it: {inside or 'it has no .py file'}"
        )
    raise UserError(f"config file {str(path)!r} does not exist", _nearest_file(path))


def _nearest_file(path: Path) -> str:
    root = next((parent for parent in path.parents if parent.is_dir()), Path("."))
    files = sorted(str(p) for p in list(root.glob("*.py")) + list(root.glob("*/*.py")) if p.stem != "common")
    near = difflib.get_close_matches(str(path), files, n=3, cutoff=0.6)
    if near:
        return "did you mean " + " or ".join(near) + "?"
    return "give the path of a file such as configs/shapes/clip.py" + (
        f" (here: {files[0]})" if files else ""
    )


def _nearest_key(key: str, config: ConfigDict) -> str:
    keys = sorted(flatten(config))
    last = key.split(".")[-1]
    near = [k for k in keys if k.split(".")[-1] == last] or difflib.get_close_matches(key, keys, n=1)
    if near:
        return "did you mean " + " or ".join(repr(k) for k in near[:3]) + "?"
    block = key.rpartition(".")[0]
    return suggest(key, [k for k in keys if k.startswith(f"{block}.")] or keys)


def _run(path: Path, variant: str) -> ConfigDict:
    """What `get_config(variant)` of the file returns."""
    with _importable(path):
        module_spec = importlib.util.spec_from_file_location(f"_unclip_config_{path.stem}", path)
        module = importlib.util.module_from_spec(module_spec)
        try:
            module_spec.loader.exec_module(module)
            get_config = getattr(module, "get_config", None)
            if not callable(get_config):
                raise UserError(f"config {path} must define get_config(variant)")
            takes_variant = bool(inspect.signature(get_config).parameters)
            if variant and not takes_variant:
                raise UserError(
                    f"config {path} has no variants, so {variant!r} is unknown", f"give {path} alone"
                )
            config = get_config(variant) if takes_variant else get_config()
        except UserError:
            raise
        except SyntaxError as error:
            raise UserError(f"{error.filename or path}:{error.lineno}: {error.msg}") from error
        except (KeyError, ValueError) as error:
            what = str(error.args[0]) if error.args and isinstance(error, ValueError) else repr(error)
            raise UserError(f"config {path}, variant {variant!r}: {what} ({_line(error, path)})") from error
        except (Exception, SystemExit) as error:
            if isinstance(error, SystemExit) and error.code in SIGNALLED:
                raise
            raise UserError(f"{_line(error, path)}: {type(error).__name__}: {error}") from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"get_config of {path} must return a ConfigDict, not {type(config).__name__}")
    return config


def _line(error: BaseException, path: Path) -> str:
    """file:line of the last frame inside the configs' own files."""
    folder = str(_folder_above_configs(path))
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(folder)]
    own = [f for f in frames if not f.filename.startswith(str(Path(__file__).parent))]
    return f"{own[-1].filename}:{own[-1].lineno}" if own else str(path)


def _folder_above_configs(path: Path) -> Path:
    path = path.resolve()
    return next((parent.parent for parent in path.parents if parent.name == "configs"), path.parent)


@contextlib.contextmanager
def _importable(path: Path):
    """`from configs import common` finds the `configs` folder this file lies in, whatever came before."""

    def is_config(name: str) -> bool:
        return name == "configs" or name.startswith("configs.")

    kept = {name: sys.modules.pop(name) for name in list(sys.modules) if is_config(name)}
    quiet, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    sys.path.insert(0, str(_folder_above_configs(path)))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.pop(0)
        sys.dont_write_bytecode = quiet
        for name in [name for name in sys.modules if is_config(name)]:
            del sys.modules[name]
        sys.modules.update(kept)


def _typed(key: str, text: str, present):
    """The value `text` stands for, in the type of `present`."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = (
            {"true": True, "false": False, "none": None}.get(text, text)
            if not isinstance(present, str)
            else text
        )
    if value is None:
        return None
    if isinstance(present, str):
        return value if isinstance(value, str) else text
    return _fit(key, value, present, text)


def _fit(key: str, value, present, text: str):
    """`value` where it is of the type of `present`, converted only where nothing is lost; else UserError."""
    kind = type(present)
    if present is None or type(value) is kind and kind is not tuple:
        return value
    if kind is float and type(value) is int:
        return float(value)
    if kind is int and type(value) is float and value.is_integer():
        return int(value)
    if kind in (tuple, list) and isinstance(value, (tuple, list)):
        kinds = {type(item) for item in present}
        if len(kinds) != 1 or kinds <= {tuple, list, type(None)}:
            return tuple(value)
        return tuple(_fit(key, item, present[0], text) for item in value)
    article = {
        "int": "an int",
        "float": "a number",
        "bool": "True or False",
        "tuple": "a tuple such as (1, 2)",
        "list": "a tuple such as (1, 2)",
        "str": "a text",
    }.get(kind.__name__, f"a {kind.__name__}")
    raise UserError(f"{key}={text} must be {article}, as its present value {present!r} is")
