"""Shards on disks by their paths, elsewhere by fsspec's addresses: which there are, when written, their bytes."""

import errno
import io
import os

from unclip_jax.errors import UserError

COMPRESSED_NAMES = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
STAMPS = ("ETag", "etag", "generation", "md5Hash", "LastModified", "last_modified", "updated", "mtime", "created")


class Files:
    """Reads parts of files, on disks by their paths, elsewhere by fsspec's addresses (gs://…, s3://…, https://…)."""

    def __init__(self, root: str):
        self.root, self.local = root, "://" not in root

    @property
    def _system(self):
        import fsspec

        return fsspec.core.url_to_fs(self.root)[0]

    def expand(self, pattern: str) -> list[str]:
        """Addresses that a pattern with {00..99} and * stands for; of a folder, all its .tar files."""
        import fsspec

        names = _braces(pattern)
        try:
            parts = [self._glob(fsspec, one) for one in names]
        except (OSError, ImportError, ValueError) as e:
            raise UserError(f"data.path={pattern!r} cannot be listed ({e})") from e
        if len(names) > 1 and (missing := [name for name, found in zip(names, parts, strict=True) if not found]):
            what = f"data.path={pattern!r} names {len(names)} shards, and {len(missing)} are not there: {missing[0]}"
            raise UserError(what, "name those that are there, or all by *")
        return sorted({part for found in parts for part in found})

    def _glob(self, fsspec, pattern: str) -> list[str]:
        system, path = fsspec.core.url_to_fs(pattern)
        if system.isdir(path):
            path = path.rstrip("/") + "/*.tar"
        found = system.glob(path) if any(c in path for c in "*?[") else [path] if system.exists(path) else []
        return [name if self.local else system.unstrip_protocol(name) for name in found]

    def compressed(self, folder: str) -> list[str]:
        """Names of compressed tars in a folder; none of what is no folder."""
        import fsspec

        system, path = fsspec.core.url_to_fs(folder)
        names = system.ls(path, detail=False) if system.isdir(path) else []
        return sorted(name.rpartition("/")[2] for name in names if name.lower().endswith(COMPRESSED_NAMES))

    def state(self, address: str) -> tuple[int, str]:
        """A file's size in bytes, and what is another once it is written anew: its time, elsewhere ETag or the like."""
        if self.local:
            found = os.stat(address)
            return found.st_size, str(found.st_mtime_ns)
        found = self._system.info(address)
        return int(found["size"]), str(next((found[name] for name in STAMPS if found.get(name)), ""))

    def open(self, address: str) -> io.IOBase:
        if not self.local:
            return self._system.open(address, "rb", block_size=1 << 20)
        if not os.path.isfile(address):  # a pipe would be waited for without end
            raise OSError(errno.EINVAL, "it is no file", address)
        return open(address, "rb")

    def read(self, address: str, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`; fewer at the end. Safe for threads."""
        if not self.local:
            return self._system.cat_file(address, start=offset, end=offset + size)
        with open(address, "rb", buffering=0) as stream:
            return os.pread(stream.fileno(), size, offset)


def _braces(pattern: str) -> list[str]:
    """ "a{08..10}.tar" → a08.tar, a09.tar, a10.tar; several braces multiply."""
    head, brace, rest = pattern.partition("{")
    inner, closing, tail = rest.partition("}")
    low, dots, high = inner.partition("..")
    if not brace:
        return [pattern]
    numbers = dots and low.isdecimal() and high.isdecimal() and max(len(low), len(high)) < 20
    if not closing or not (numbers and int(low) <= int(high)):
        raise UserError(f"data.path={pattern!r} has braces without a range", "write it as {000..099}")
    ends, width = _braces(tail), len(low)
    if (int(high) - int(low) + 1) * len(ends) > 1_000_000:
        raise UserError(f"data.path={pattern!r} names more than a million shards")
    return [f"{head}{n:0{width}d}{end}" for n in range(int(low), int(high) + 1) for end in ends]
