"""What `pip install` gets: setup.py's arguments, caught on their way to setuptools; and the Makefile."""

import ast
import re
import runpy
import shutil
import stat
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import setuptools

import unclip_jax

ROOT = Path(__file__).resolve().parent.parent
LAZY_EXTRAS = {"icons", "ui", "track", "torch", "tf", "bench"}


@pytest.fixture(scope="module")
def metadata():
    caught = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **kw: caught.update(kw))
        patch.chdir(ROOT)
        runpy.run_path("setup.py")
    return caught


def name_of(requirement: str) -> str:
    return re.match(r"[A-Za-z0-9_.-]+", requirement)[0].lower().replace("_", "-")


def test_every_requirement_has_a_lower_bound(metadata):
    groups = {"core": metadata["install_requires"], **metadata["extras_require"]}
    for group, requirements in groups.items():
        assert requirements, group
        for requirement in requirements:
            assert re.search(r">=\d", requirement), f"{group}: {requirement}"


def test_jax_is_bounded_alike_everywhere(metadata):
    found = [r for rs in [metadata["install_requires"], *metadata["extras_require"].values()] for r in rs]
    bounds = {r.partition(";")[0].lstrip("jax").split("]")[-1] for r in found if name_of(r) == "jax"}
    assert bounds == {">=0.10,<0.12"}


def test_core_stays_light(metadata):
    core = {name_of(r) for r in metadata["install_requires"]}
    assert {"jax", "flax", "optax", "orbax-checkpoint", "tensorflow-datasets", "transformers"} <= core
    assert not core & {"torch", "tensorflow", "tensorflow-cpu", "gradio", "wandb", "diffusers", "clu"}


def test_extras_are_the_documented_ones(metadata):
    assert set(metadata["extras_require"]) == LAZY_EXTRAS | {"gpu", "tpu", "dev"}
    dev = set(metadata["extras_require"]["dev"])
    assert set(metadata["extras_require"]["icons"]) <= dev
    tools = {"pytest", "pytest-xdist", "ruff", "hypothesis", "scipy", "pyyaml"}
    assert tools | {"torch", "diffusers"} <= {name_of(r) for r in dev}  # the last two: parity tests


def test_every_imported_package_is_a_requirement(metadata):
    """What the package imports is asked for by name, not left to come with something else."""
    listed = {name_of(r) for rs in metadata["extras_require"].values() for r in rs}
    listed |= {name_of(r) for r in metadata["install_requires"]}
    distributions = packages_distributions()
    missing = {}
    for path in (ROOT / "unclip_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for top in {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - {"unclip_jax"}:
                offered = {name_of(d) for d in distributions.get(top, [top])}
                if not offered & listed:
                    missing.setdefault(top, set()).add(str(path.relative_to(ROOT)))
    assert not missing


def test_command_version_and_python(metadata):
    assert metadata["entry_points"] == {"console_scripts": ["unclip = unclip_jax.cli:script"]}
    assert metadata["version"] == unclip_jax.__version__
    assert metadata["python_requires"] == ">=3.11"
    assert f"## {unclip_jax.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_packages_are_found_and_tests_are_not_shipped(metadata):
    folders = {p.parent for p in (ROOT / "unclip_jax").rglob("*.py")}
    assert set(metadata["packages"]) == {".".join(f.relative_to(ROOT).parts) for f in folders}


def test_bundled_weights_are_shipped(metadata):
    package = ROOT / "unclip_jax"
    shipped = {p for pattern in metadata["package_data"]["unclip_jax"] for p in package.glob(pattern)}
    bundled = {p for p in (package / "bundled").rglob("*") if p.is_file()}
    assert bundled <= shipped, f"not matched by package_data: {bundled - shipped}"


# The Makefile, with a stand-in for Python, so that nothing is installed.


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    shutil.copy(ROOT / "Makefile", folder)
    (folder / "setup.py").touch()
    return subprocess.run(["make", *arguments], cwd=folder, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("target", "install", "runs"),
    [
        ("demo", "-e .", "unclip demo"),
        ("test", '-e ".[dev]"', "-m pytest"),
        ("lint", '-e ".[dev]"', "ruff check"),
    ],
)
def test_make_makes_its_environment_first(tmp_path, target, install, runs):
    done = make(tmp_path, "-n", target)
    order = [
        done.stdout.find(text)
        for text in ("-m venv .venv", f"install --disable-pip-version-check -q {install}", runs)
    ]
    assert done.returncode == 0 and -1 not in order and order == sorted(order), done.stdout


def test_make_installs_again_only_when_setup_changes(tmp_path):
    (tmp_path / ".venv/bin").mkdir(parents=True)
    for name in ("bin/python", ".core-installed", ".dev-installed"):
        (tmp_path / ".venv" / name).touch()
    (tmp_path / "setup.py").touch()
    assert "pip install" not in make(tmp_path, "-n", "-o", "setup.py", "test").stdout
    assert "-m pip install" in make(tmp_path, "-n", "-W", "setup.py", "test").stdout


@pytest.mark.parametrize("target", ["demo", "test", "lint"])
def test_make_refuses_an_old_python_in_one_line(tmp_path, target):
    old = tmp_path / "python3.9"
    old.write_text('#!/bin/sh\nif [ "$1" = -V ]; then echo Python 3.9.2; else exit 1; fi\n')
    old.chmod(old.stat().st_mode | stat.S_IXUSR)
    done = make(tmp_path, target, f"PYTHON={old}")
    assert done.returncode != 0
    assert (
        "needs Python 3.11 or newer" in done.stderr
        and "Python 3.9.2" in done.stderr
        and "Fix: " in done.stderr
    )
    assert not (tmp_path / ".venv").exists()
