"""What `unclip sample --compile-only` compiles is what sampling then asks for; how a CPU's programs are compiled."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from tests import tiny_stack
from tests.compiling import events
from unclip_jax import cli
from unclip_jax.cli import programs

ROOT = Path(__file__).parent.parent
OPTIONS = ("use_multi_output_fusion", "optimize_for_size")
HIT, MISS = "/jax/compilation_cache/cache_hits", "/jax/compilation_cache/cache_misses"


@pytest.fixture
def no_cache(tmp_path, monkeypatch):
    """JAX without its persistent cache, and a user's cache that is empty."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update(names[0], None)
    compilation_cache.reset_cache()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield tmp_path / "cache" / "unclip_jax" / "programs"
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.mark.slow
def test_a_command_finds_all_that_was_compiled_before(no_cache, tmp_path, capsys):
    prompts = ["a red circle", "two stars"]
    command = ["sample", *prompts, "--model", str(tiny_stack.path()), "--num", "2", "--batch-size", "4"]
    jax.clear_caches()  # of other tests
    assert cli.main([*command, "--compile-only"]) == 0
    *lines, total = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines] == [
        [stage, "batch", "4"] for stage in ("clip", "prior", "decoder", "upsampler")
    ]
    assert total.startswith("4 programs") and total.endswith(str(no_cache))
    assert no_cache.stat().st_mode & 0o777 == 0o700 and list(tmp_path.iterdir()) == [tmp_path / "cache"]

    jax.clear_caches()  # as in another process
    with events(HIT) as hits, events(MISS) as misses:
        assert cli.main([*command, "--out", str(tmp_path / "out")]) == 0
    assert len(hits) >= 4 and not misses


def test_nothing_is_kept_unless_asked_for(no_cache):
    assert programs.keep() is None and not no_cache.exists()
    no_cache.mkdir(parents=True)
    assert programs.keep() == no_cache
    jax.config.update("jax_compilation_cache_dir", "elsewhere")
    assert str(programs.keep(make=True)) == "elsewhere"


def test_options_that_are_given_stay_as_they_are(monkeypatch):
    ours, theirs = (f"--xla_backend_extra_options=xla_cpu_{name}=true" for name in OPTIONS)
    for given, wanted in (("", ours), ("--a=1", f"--a=1 {ours}"), (theirs, theirs)):
        monkeypatch.setenv("XLA_FLAGS", given)
        programs.fuse_for_cpus()
        assert os.environ["XLA_FLAGS"] == wanted


FUSED = """
from unclip_jax import cli
try:
    cli.main(["--version"])
except SystemExit:
    pass
import jax, numpy as np, optax

tx, rng = optax.adamw(0.1, weight_decay=0.01), np.random.default_rng(0)
p, e, g = (rng.standard_normal((64, 48)).astype(np.float32) for _ in range(3))

def step(p, e, opt, g):
    updates, opt = tx.update(g, opt, p)
    p = optax.apply_updates(p, updates)
    return p, e + 0.1 * (p - e), opt

args = p, e, tx.init(p), g
compiled = jax.jit(step).lower(*args).compile()
lines = [line.split(" = ")[-1] for line in compiled.as_text().split("ENTRY")[-1].splitlines()]
results = [line.split(" fusion(")[0] for line in lines if " fusion(" in line and "[64,48]" in line]
assert len(results) < 4 == "".join(results).count("f32[64,48]"), results  # and nothing else is written
m, v, (p, e, g) = 0, 0, np.float64([p, e, g])
m, v = m + 0.1 * (g - m), v + 0.001 * (g * g - v)
p = p - 0.1 * (m / 0.1 / (np.sqrt(v / 0.001) + 1e-8) + 0.01 * p)
for got, want in zip(compiled(*args), (p, e + 0.1 * (p - e))):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
"""


def test_on_a_cpu_commands_update_weights_and_their_average_in_few_passes():
    """And right, against NumPy in f64; what XLA is told is heard."""
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", FUSED], check=True, env=env, cwd=ROOT, timeout=120)


def test_pictures_need_a_folder(capsys):
    assert cli.main(["sample", "a red circle"]) == 2
    assert "--out" in capsys.readouterr().err
