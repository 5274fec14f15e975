"""How programs are compiled, and where they are kept from one command to the next."""

from pathlib import Path

from unclip_jax.errors import UserError


def keep(make: bool = False) -> Path | None:
    """JAX's persistent cache of compiled programs: the folder, or None for no cache.

    JAX's own setting, JAX_COMPILATION_CACHE_DIR, comes first; else it is a folder in the user's cache, read and filled
    once it is there. Programs are code, so nobody else may write there.

    Args:
      make: make that folder, and keep every program however quickly it was compiled.
    """
    import jax

    from unclip_jax.storage import user_cache

    if make:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if jax.config.jax_compilation_cache_dir:
        return Path(jax.config.jax_compilation_cache_dir)
    folder = user_cache() / "programs"
    if make:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            what = f"programs cannot be kept in {folder} ({error.strerror or error})"
            raise UserError(what, "set JAX_COMPILATION_CACHE_DIR to a folder that can be written") from error
    if not folder.is_dir():
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    return folder
