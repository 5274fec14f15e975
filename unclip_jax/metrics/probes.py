"""What embeddings know: retrieval, zero-shot classification and a linear probe (Radford et al. 2021, section 3)."""

from collections.abc import Sequence

import numpy as np

from unclip_jax.errors import UserError
from unclip_jax.metrics.distances import checked, unit

CHUNK = 2048


def recall(
    z_img: np.ndarray,
    z_txt: np.ndarray,
    ks: Sequence[int] = (1, 5, 10),
    chunk: int = CHUNK,
) -> dict[str, dict[int, float]]:
    """Shares of queries whose match is among the k nearest by cosine, both ways; caption i belongs to image i.

    Equal similarities count against the match, so that embeddings which are all alike find nothing.

    Args:
      z_img, z_txt: [N, D].
      ks: each at most N. chunk: queries at once.

    Returns: {"image_to_text": {k: share}, "text_to_image": {k: share}}.
    """
    z_img, z_txt = unit(checked(z_img)), unit(checked(z_txt))
    n, m = len(z_img), len(z_txt)
    if n != m:
        raise UserError(f"{n} images and {m} captions must be as many")
    if bad := [k for k in ks if not 1 <= k <= n]:
        raise UserError(f"recall@{bad[0]} needs at least {bad[0]} images and captions; there are {n}")
    return {
        "image_to_text": _shares(_ranks(z_img, z_txt, chunk), ks),
        "text_to_image": _shares(_ranks(z_txt, z_img, chunk), ks),
    }


def _ranks(queries, keys, chunk):
    """How many other keys are at least as near as the query's own, the one in its place."""
    ranks = np.empty(len(queries), np.int64)
    for start in range(0, len(queries), chunk):
        near = queries[start : start + chunk] @ keys.T
        own = np.diagonal(near, start)[:, None]
        # A hair's breadth is a tie: the same embedding twice gives products that differ by rounding.
        ranks[start : start + chunk] = (near >= own - 1e-12).sum(1) - 1
    return ranks


def _shares(ranks, ks):
    return {k: float((ranks < k).mean()) for k in ks}


def class_prompts(classes: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Each class put into each template, class by class; a template holds one "{}"."""
    if not classes:
        raise UserError("the list of classes is empty")
    if doubled := [name for name in classes if list(classes).count(name) > 1]:
        raise UserError(f"class {doubled[0]!r} is listed more than once")
    if not templates:
        raise UserError("there is no prompt template", "such as 'a photo of a {}'")
    for template in templates:
        if template.count("{}") != 1 or set(template.replace("{}", "")) & set("{}"):
            raise UserError(f"prompt template {template!r} must hold {{}} once", "such as 'a photo of a {}'")
    return [template.replace("{}", name) for name in classes for template in templates]


def class_embeddings(z: np.ndarray, classes: int) -> np.ndarray:
    """One unit embedding a class: its prompts' unit embeddings averaged. z: [classes * templates, D] as prompted."""
    return unit(unit(checked(z)).reshape(classes, -1, z.shape[-1]).mean(1))


def top_k(scores: np.ndarray, labels: np.ndarray, k: int = 1) -> np.ndarray:
    """Whether each row's true class is among its k best, bool[N]; ties count against it. scores: [N, classes]."""
    check_labels(labels, scores.shape[1])
    if not 1 <= k <= scores.shape[1]:
        raise UserError(f"top-{k} needs at least {k} classes; there are {scores.shape[1]}")
    true = np.take_along_axis(scores, np.asarray(labels)[:, None], 1)
    return (scores >= true).sum(1) <= k


def check_labels(labels: np.ndarray, classes: int) -> None:
    """Raises UserError for a label outside 0 … classes - 1."""
    labels = np.asarray(labels)
    if len(labels) and (labels.min() < 0 or labels.max() >= classes):
        bad = labels[(labels < 0) | (labels >= classes)][0]
        raise UserError(f"label {bad} is out of range; there are {classes} classes, 0 … {classes - 1}")


def linear_probe(z: np.ndarray, labels: np.ndarray, classes: int, penalty: float = 1e-3, steps: int = 1000):
    """Multinomial logistic regression on standardised embeddings by L-BFGS in float64.

    Minimises mean cross-entropy + penalty / 2 |W|^2; the bias is free.

    Returns: a function [M, D] -> scores f64[M, classes].
    """
    from scipy.optimize import minimize

    z, labels = checked(z), np.asarray(labels)
    check_labels(labels, classes)
    mean, std = z.mean(0), np.maximum(z.std(0), 1e-6)
    x = np.c_[(z - mean[None]) / std[None], np.ones(len(z))]
    target, shape = np.eye(classes)[labels], (x.shape[1], classes)
    decays = np.r_[np.full(x.shape[1] - 1, penalty), 0.0][:, None]

    def objective(flat):
        w = flat.reshape(shape)
        scores = x @ w
        scores -= scores.max(1, keepdims=True)
        log_p = scores - np.log(np.exp(scores).sum(1, keepdims=True))
        value = -(target * log_p).sum() / len(x) + 0.5 * (decays * w**2).sum()
        return value, (x.T @ (np.exp(log_p) - target) / len(x) + decays * w).ravel()

    options = {"maxiter": steps, "gtol": 1e-8, "ftol": 1e-14}
    w = minimize(objective, np.zeros(np.prod(shape)), jac=True, method="L-BFGS-B", options=options).x.reshape(shape)
    return lambda other: np.c_[(checked(other) - mean[None]) / std[None], np.ones(len(other))] @ w
