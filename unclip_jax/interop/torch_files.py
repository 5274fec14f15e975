"""Torch files, read by torch's own restricted reader or not at all.

At all: by torch >= 2.6; before it, the restriction could be got round (CVE-2025-32434).
"""

import functools
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from unclip_jax.errors import UserError
from unclip_jax.storage import MAX_JSON_BYTES
from unclip_jax.tensors import DTYPES

SINCE = (2, 6)
KINDS = {str(dtype) for dtype in DTYPES.values()}  # torch's names of the dtypes that NumPy can hold


def arrays(file: Path) -> list[tuple[str, str, tuple[int, ...], Callable[[], np.ndarray]]]:
    """(name, its dtype's or else its layout's name, shape, function that reads it) of all arrays in a file.

    Raises:
      UserError: no torch that reads it safely, or a file that holds anything but one dict of tensors.
    """
    try:
        import torch
    except ImportError:
        fix = "pip install 'unclip_jax[torch]', or give the same weights as safetensors"
        raise UserError(f"{file} is a torch file, and torch is not installed", fix) from None
    if tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) < SINCE:
        raise UserError(f"torch {torch.__version__} reads torch files unsafely", "install torch 2.6 or newer")
    _check_zip(file)
    try:
        unsafe = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(file)))
        content = None if unsafe else _mapped(file)
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, KeyError and others
        what = " ".join(str(error).split())[:200]
        raise UserError(f"{file} cannot be read as weights ({what})", "give the same weights as safetensors") from None
    if unsafe:
        what = f"{file} holds more than weights: {', '.join(unsafe[:5])}; reading it could run code"
        raise UserError(what, "give safetensors, or a file that torch.save made of a state_dict alone")
    taker, state = _Taker(file), _state(file, content)
    for name, tensor in state.items():
        if type(name) is not str or not _plain(tensor):
            fix = "save a state_dict of plain tensors under names, by torch.save or as safetensors"
            raise UserError(f"{file}: {str(name)[:100]!r} is no array under a name", fix)
    return [
        (name, _kind(tensor), tuple(tensor.shape), functools.partial(taker.take, name))
        for name, tensor in state.items()
    ]


def _plain(tensor) -> bool:
    """Whether NumPy can have it as it is; not a view that makes much of a few bytes, nor a shape alone."""
    import torch

    if tensor.layout is not torch.strided or tensor.is_quantized:
        return True  # which is told by its kind
    if tensor.is_nested or tensor.is_neg() or tensor.device.type != "cpu":
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _kind(tensor) -> str:
    import torch

    return str(tensor.dtype if tensor.layout is torch.strided else tensor.layout).removeprefix("torch.")


def _mapped(file: Path):
    """What a torch file holds, its tensors mapped from it."""
    import torch

    return torch.load(file, map_location="cpu", mmap=True, weights_only=True)


class _Taker:
    """Copies of a torch file's tensors by name. Pages of a mapped file that were read count as memory of the process as
    long as it is mapped, so after every `LIMIT` bytes it is mapped anew."""

    LIMIT = 2**28

    def __init__(self, file: Path):
        self.file, self.state, self.read = file, None, 0

    def take(self, name: str) -> np.ndarray:
        if self.state is None:
            self.state = _state(self.file, _mapped(self.file))
        array = _array(self.state[name])
        self.read += array.nbytes
        if self.read > self.LIMIT:
            self.state, self.read = None, 0
        return array


def _array(tensor) -> np.ndarray:
    """A copy of a tensor: numbers outlive the file they were mapped from."""
    import torch

    if tensor.dtype is torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(DTYPES["BF16"]).copy()
    return tensor.detach().numpy().copy()


def _check_zip(file: Path) -> None:
    """Refuses by its directory a zip that is damaged, compressed (torch's are not) or a program."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        raise UserError(f"{file} is truncated or no torch file", "copy it again") from None
    if any(re.search(r"(^|/)(code/|constants\.pkl$)", entry.filename) for entry in entries):
        raise UserError(f"{file} is a TorchScript program, not weights", "give safetensors of the same network")
    pickles = [entry for entry in entries if entry.filename.endswith("data.pkl")]
    if len(pickles) != 1:
        raise UserError(f"{file} is a zip, but no torch file", "give a safetensors or a torch file")
    whole = sum(entry.file_size for entry in entries)
    if any(entry.compress_type for entry in entries) or whole > file.stat().st_size:
        raise UserError(f"{file} is compressed to a part of its size, which torch never does", "do not trust it")
    if pickles[0].file_size > MAX_JSON_BYTES:
        raise UserError(f"{file} has a directory of {pickles[0].file_size} bytes, more than {MAX_JSON_BYTES} allowed")


def _state(file: Path, content) -> dict:
    """The one dict of tensors in what a torch file holds."""

    def sound(value) -> bool:
        return isinstance(value, dict) and bool(value) and all(hasattr(v, "layout") for v in value.values())

    inner = {k: v for k, v in content.items() if sound(v)} if isinstance(content, dict) else {}
    if sound(content):
        return content
    if len(inner) > 1:
        what = f"{file} holds several sets of weights: {', '.join(map(str, sorted(inner, key=str)))}"
        raise UserError(what, "save the one that is wanted (averaged or not) in a file of its own")
    if not inner:
        raise UserError(f"{file} holds no dict of arrays", "save a state_dict with torch.save")
    return next(iter(inner.values()))
