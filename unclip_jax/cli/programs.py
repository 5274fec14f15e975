"""Where compiled programs are kept from one command to the next."""

import hashlib
import os
import platform
import warnings
from pathlib import Path

from unclip_jax.errors import UserError

MAX_BYTES = 2**30  # of the folder; the programs that were not asked for the longest go first
REMEDY = "set JAX_COMPILATION_CACHE_DIR to a folder of your own"


def keep(needed: bool = False) -> Path | None:
    """Has JAX keep what it compiles for the next command: the folder; or None, with a warning, where there is none.

    JAX's own setting, JAX_COMPILATION_CACHE_DIR, comes first; else it is a folder for this kind of processor in the
    user's cache. Programs are code, so a folder where others may write is not read. JAX_ENABLE_COMPILATION_CACHE=false
    keeps nothing anywhere.

    Args:
      needed: the command is about nothing else.

    Raises:
      UserError: `needed`, and there is no such folder and none can be made.
    """
    import jax

    from unclip_jax.storage import user_cache

    folder = jax.config.jax_compilation_cache_dir
    if folder is None:
        folder = user_cache() / "programs" / _processor()
        if flaw := _made(folder.parent) or _made(folder):
            told = f"compiled programs cannot be kept in {folder} ({flaw})"
            if needed:
                raise UserError(told, REMEDY)
            warnings.warn(f"{told}: each command compiles its own; {REMEDY}", stacklevel=2)
            return None
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)
        needed = True
    if needed:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return Path(folder)


def _processor() -> str:
    """A name of what this host's processor understands: a home may be shared by hosts of several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        known = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        known = platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(known.encode()).hexdigest()[:12]}"


def _made(folder: Path) -> str:
    """Makes a folder for its user alone, if it is not there; says why it cannot be used, or "" where it can.

    On Windows its place in the user's own says whose it is.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        about = folder.stat()
    except OSError as error:
        return error.strerror or str(error)
    if hasattr(os, "getuid") and (about.st_uid != os.getuid() or about.st_mode & 0o022):
        return f"others may write into {folder}"
    return "" if os.access(folder, os.W_OK) else "it cannot be written"
