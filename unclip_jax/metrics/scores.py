"""Scores of drawn pictures without real ones: fit to the caption by CLIP, and the Inception score."""

import numpy as np

from unclip_jax.errors import UserError
from unclip_jax.metrics.distances import checked, unit


def cosines(z_img: np.ndarray, z_txt: np.ndarray) -> np.ndarray:
    """Cosine of each picture's embedding with its own caption's, f64[N] in [-1, 1]."""
    if len(z_img) != len(z_txt):
        raise UserError(f"{len(z_img)} pictures and {len(z_txt)} captions must be as many")
    return np.sum(unit(checked(z_img)) * unit(checked(z_txt)), -1)


def clip_score(z_img: np.ndarray, z_txt: np.ndarray) -> dict[str, np.ndarray]:
    """The score of each picture with its caption, by the two conventions in use.

    Returns:
      "clip_score": 100 cos (as torchmetrics, without its clamping at 0); "clip_s": 2.5 max(cos, 0) (Hessel et al.
      2021). Each f64[N]; the score of a set is the mean. Papers that report 0.32 give "clip_score" / 100.
    """
    cos = cosines(z_img, z_txt)
    return {"clip_score": 100 * cos, "clip_s": 2.5 * np.maximum(cos, 0)}


def inception_score(logits: np.ndarray, splits: int = 10, seed: int = 0) -> tuple[float, float]:
    """(mean, standard deviation) over parts of exp(mean KL(p(y|x) || p(y))) (Salimans et al. 2016).

    Args:
      logits: [N, classes]. splits: parts, at most N; seed: of the order that they are cut from.
    """
    logits = checked(logits, "logits")
    if splits > len(logits):
        raise UserError(f"splits={splits} must be at most the number of pictures, {len(logits)}")
    logits = logits[np.random.default_rng(seed).permutation(len(logits))]
    shifted = logits - logits.max(1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    scores = []
    for part in np.array_split(log_p, splits):
        mean = np.log(np.exp(part).mean(0, keepdims=True))
        scores.append(np.exp((np.exp(part) * (part - mean)).sum(1).mean()))
    return float(np.mean(scores)), float(np.std(scores))
