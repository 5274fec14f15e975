"""What `unclip sample --compile-only` compiles is what sampling then asks for."""

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from tests import tiny_stack
from tests.compiling import events
from unclip_jax import cli
from unclip_jax.cli import programs
from unclip_jax.errors import UserError
from unclip_jax.stack import OnDemand

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
def test_a_command_finds_all_that_was_compiled_before(no_cache, tmp_path, capsys, monkeypatch):
    prompts = ["a red circle", "two stars"]
    command = ["sample", *prompts, "--model", str(tiny_stack.path()), "--num", "2", "--batch-size", "4"]
    jax.clear_caches()  # of other tests
    with monkeypatch.context() as no_weights:
        no_weights.setattr(OnDemand, "read", None)
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


def test_a_cache_that_cannot_be_made_is_told(no_cache):
    no_cache.parent.parent.write_text("a file where the cache would be")
    with pytest.raises(UserError, match="set JAX_COMPILATION_CACHE_DIR"):
        programs.keep(make=True)


def test_pictures_need_a_folder(capsys):
    assert cli.main(["sample", "a red circle"]) == 2
    assert "--out" in capsys.readouterr().err
