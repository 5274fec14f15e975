"""Real pictures as the metrics want them: from features computed here, or from a file of statistics.

The file is an .npz: "mu" and "sigma" of the main network, as clean-fid and pytorch-fid have them, and of our own also
"n", "<network>_features" and "about", JSON that tells data, resizing and weights.
"""

import json
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from unclip_jax.errors import UserError
from unclip_jax.evaluation.features import Network
from unclip_jax.evaluation.work import Series
from unclip_jax.metrics import distances
from unclip_jax.storage import writing


class Reference(NamedTuple):
    """Real pictures: features by network where they are known, and the main network's moments."""

    by_network: dict[str, np.ndarray]
    main: str
    moments: distances.Moments
    n: int

    @property
    def features(self) -> np.ndarray | None:
        """The main network's, f64."""
        return self.by_network.get(self.main)

    def need(self, metric: str, network: str | None = None) -> np.ndarray:
        """A network's features, the main one's by default; UserError where only moments are known."""
        network = network or self.main
        if network not in self.by_network:
            what = f"metric '{metric}' needs {network} features of the real pictures, which these statistics lack"
            raise UserError(what, "give --data as well, and a file that does not exist yet")
        return self.by_network[network]


def of_series(series: Series, networks: Iterable[str], main: str) -> Reference:
    """Of features that `Protocol.look` computed."""
    found = {key: series.whole(f"{key}_features").astype(np.float64) for key in networks}
    moments = distances.Moments.of(found[main])
    return Reference(found, main, moments, moments.n)


def save(file: Path, real: Reference, about: Mapping, networks: Mapping[str, Network]) -> None:
    """Writes the statistics, whole or not at all. about: what decides the pictures."""
    facts = {"pictures": dict(about), "networks": {key: network.identity for key, network in networks.items()}}
    arrays = {f"{key}_features": features.astype(np.float32) for key, features in real.by_network.items()}
    arrays |= {"mu": real.moments.mean, "sigma": real.moments.covariance, "n": np.array(real.n)}
    with writing(file) as stream:
        np.savez(stream, about=np.array(json.dumps(facts, sort_keys=True)), **arrays)


def load(
    file: Path, main: Network, networks: Mapping[str, Network], size: int, about: Mapping | None = None
) -> Reference:
    """Reads statistics, and refuses those of other weights, another resolution or other data.

    Args:
      main: the network of fid. networks: all that are in use.
      size: side of the drawn pictures. about: what should decide the real ones, where that is known.
    """
    arrays = _read(file)
    missing = [name for name in ("mu", "sigma") if name not in arrays]
    if missing:
        raise UserError(f"{file} holds no {missing[0]!r}; expected mu and sigma", "give them as clean-fid has them")
    for name in ("mu", "sigma", "n", *(f"{key}_features" for key in networks)):
        if name in arrays and not (arrays[name].dtype.kind in "fiu" and np.isfinite(arrays[name]).all()):
            raise UserError(f"{file}: {name!r} must be of finite numbers", "give mu and sigma as clean-fid has them")
    mean, covariance = arrays["mu"].astype(np.float64), arrays["sigma"].astype(np.float64)
    if mean.shape != (main.dim,) or covariance.shape != (main.dim, main.dim):
        what = f"{file} has statistics of {mean.shape[-1:]} features, and {main.name} has {main.dim}"
        raise UserError(what, "give statistics of the same network")
    n = int(arrays["n"].item()) if "n" in arrays and arrays["n"].size == 1 else 0
    if "about" in arrays:
        _check(file, arrays, main, networks, size, about)
    else:
        warnings.warn(f"{file} does not say of what pictures, resizing and weights it is", stacklevel=2)
    found = {k: arrays[f"{k}_features"].astype(np.float64) for k in networks if f"{k}_features" in arrays}
    for key, features in found.items():
        if features.shape != (n, networks[key].dim):
            what = f"{file} has {key} features {features.shape}; expected {(n, networks[key].dim)}"
            raise UserError(what, "make it again")
    return Reference(found, main.name, distances.Moments(max(n, 2), mean, covariance * (max(n, 2) - 1)), n)


def _check(file: Path, arrays: Mapping, main: Network, networks: Mapping, size: int, about: Mapping | None) -> None:
    try:
        facts = json.loads(str(arrays["about"]))
        pictures, identities = dict(facts["pictures"]), dict(facts["networks"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{file} is malformed ({type(error).__name__} in 'about')", "make it again") from None
    for key in {main.name, *(k for k in networks if f"{k}_features" in arrays)}:
        if identities.get(key) != networks[key].identity:
            what = f"{file} was made with {identities.get(key) or 'another network'}, not {networks[key].identity}"
            raise UserError(what, "give statistics of the same weights and resizing, or another file to make them in")
    if pictures.get("size") != size:
        what = f"{file} is of real pictures of {pictures.get('size')} px, and the drawn ones have {size} px"
        raise UserError(what, "give statistics of the same resolution, or another file to make them in")
    if about is not None and pictures != dict(about):
        keys = sorted(k for k in {*pictures, *about} if pictures.get(k) != about.get(k))
        raise UserError(f"{file} is of other data: {', '.join(keys)} differ", "give another file to make them in")


def _read(file: Path) -> dict[str, np.ndarray]:
    if not file.is_file():
        raise UserError(f"reference {str(file)!r} does not exist", "give --data as well to make it, or another file")
    try:
        stored = np.load(file, allow_pickle=False)
        if not isinstance(stored, np.lib.npyio.NpzFile):
            raise ValueError("one array")
        with stored:
            return {name: np.asarray(stored[name]) for name in stored.files}
    except Exception as error:  # zipfile, zlib and NumPy raise nearly anything of what others wrote
        what = f"{file} is no .npz file of statistics ({type(error).__name__})"
        raise UserError(what, "give mu and sigma as clean-fid has them") from None
