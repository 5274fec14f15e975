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
    names = "compilation_cache_dir", "compilation_cache_max_size", "persistent_cache_min_compile_time_secs"
    before = {f"jax_{name}": getattr(jax.config, f"jax_{name}") for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
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
    assert total.startswith("4 programs") and f" kept in {no_cache}" in total
    assert list(tmp_path.iterdir()) == [tmp_path / "cache"]

    jax.clear_caches()  # as in another process
    with events(HIT) as hits, events(MISS) as misses:
        assert cli.main([*command, "--out", str(tmp_path / "out")]) == 0
    assert len(hits) >= 4 and not misses


def test_programs_are_kept_in_a_folder_of_the_user_alone(no_cache):
    folder = programs.keep()
    assert folder.parent == no_cache and str(folder) == jax.config.jax_compilation_cache_dir
    assert jax.config.jax_compilation_cache_max_size == programs.MAX_BYTES
    assert {f.stat().st_mode & 0o777 for f in (no_cache, folder)} == {0o700}
    jax.config.update("jax_compilation_cache_dir", "elsewhere")
    assert str(programs.keep(needed=True)) == "elsewhere"


@pytest.mark.parametrize("name", ["", "of one processor"])
def test_a_folder_where_others_may_write_is_not_read(name, no_cache, monkeypatch):
    monkeypatch.setattr(programs, "_processor", lambda: "of one processor")
    (no_cache / name).mkdir(parents=True)
    (no_cache / name).chmod(0o770)
    with pytest.warns(UserWarning, match="others may write.*: each command compiles its own"):
        assert programs.keep() is None
    assert jax.config.jax_compilation_cache_dir is None
    with pytest.raises(UserError, match="others may write.* set JAX_COMPILATION_CACHE_DIR to a folder of your own"):
        programs.keep(needed=True)


def test_a_cache_that_cannot_be_made_is_told_where_it_is_needed(no_cache):
    no_cache.parent.parent.write_text("a file where the cache would be")
    with pytest.warns(UserWarning, match="cannot be kept"):
        assert programs.keep() is None
    with pytest.raises(UserError, match="set JAX_COMPILATION_CACHE_DIR"):
        programs.keep(needed=True)


@pytest.mark.parametrize("text", ["flags\t: fpu sse avx2\n", "Features\t: fp asimd\n", "", None])
def test_other_processors_have_other_folders(text, tmp_path, monkeypatch):
    here, file = programs._processor(), tmp_path / "cpuinfo"
    if text is not None:
        file.write_text(f"processor\t: 0\n{text}")
    monkeypatch.setattr(programs, "Path", lambda name: file)
    assert programs._processor() != here


def test_pictures_need_a_folder(capsys):
    assert cli.main(["sample", "a red circle"]) == 2
    assert "--out" in capsys.readouterr().err
