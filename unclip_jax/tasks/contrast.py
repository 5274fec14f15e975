"""Contrastive losses over all pairs of a global batch, a strip of the similarity matrix at a time.

    loss      of N unit vectors of images x_i and of captions y_j, l_ij = scale x_i · y_j
    softmax   -1/2N sum_i [ln softmax_j(l_ij)_i + ln softmax_i(l_ij)_j = i]           Radford et al. 2021, figure 3
    sigmoid   -1/N sum_ij ln sigmoid(±(l_ij + bias)), + for i = j, - else             Zhai et al. 2023, arXiv 2303.15343

A strip is all images with `chunk` captions. With the batch split over P devices each holds N/P x chunk similarities and
`chunk` captions of others at a time, forwards and backwards, where strips are computed anew: memory is linear in N/P.
Strip k holds the captions k, k + N/chunk, k + 2N/chunk, …, so that every device has as many of it as any other and
keeps its own of all strips; that takes a `chunk` that is a multiple of P.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid, logsumexp


class Seen(NamedTuple):
    """What the similarities say of each image over all captions, and of each caption over all images.

    Attributes:
      by_image, by_text: log-sum-exp of l_ij over j, and over i, f32[N].
      image_hit, text_hit: whether the own partner is the most similar, the first of equals, bool[N].
      own: l_ii, f32[N].
    """

    by_image: jax.Array
    by_text: jax.Array
    image_hit: jax.Array
    text_hit: jax.Array
    own: jax.Array


def softmax_loss(image, text, scale, chunk: int = 0) -> tuple[jax.Array, Seen]:
    """The symmetric cross-entropy, a scalar in nats, and what was seen.

    Args:
      image, text: unit vectors f32[N, D].
      scale: the temperature's inverse, a scalar.
      chunk: captions of a strip, 0 for all at once; the largest common divisor with N counts.
    """
    seen = jax.lax.stop_gradient(see(image, text, scale, chunk))
    value = jnp.mean((seen.by_image + seen.by_text) / 2 - seen.own)

    def slope(logits, own, columns):
        """A sum with the gradient of the loss: d logsumexp = sum of softmax dl, where the softmax is exp(l - known)."""
        by_image = jnp.exp(logits - seen.by_image[:, None])
        by_text = jnp.exp(logits - seen.by_text[columns][None, :])
        return jnp.sum((by_image + by_text) / 2 - jnp.where(own, logits, 0))

    total = _sum_of_strips(slope, image, text, scale, chunk) / len(image)
    return value + (total - jax.lax.stop_gradient(total)), seen


def sigmoid_loss(image, text, scale, bias, chunk: int = 0) -> jax.Array:
    """The sum of binary cross-entropies of all pairs over N, a scalar in nats. Arguments as in `softmax_loss`."""

    def entropy(logits, own, columns):
        return -jnp.sum(log_sigmoid(jnp.where(own, 1.0, -1.0) * (logits + bias)))

    return _sum_of_strips(entropy, image, text, scale, chunk) / len(image)


def see(image, text, scale, chunk: int = 0) -> Seen:
    """`Seen` of unit vectors f32[N, D], arguments as in `softmax_loss`. Not for gradients: it would keep all strips."""
    n = len(image)

    def strip(known, part):
        total, best, place, own = known
        captions, columns = part
        logits, mine = _strip(image, captions, columns, scale)
        top, at = logits.max(1), columns[logits.argmax(1)]
        better = (top > best) | ((top == best) & (at < place))
        known = (
            jnp.logaddexp(total, logsumexp(logits, 1)),
            jnp.where(better, top, best),
            jnp.where(better, at, place),
            own + jnp.sum(jnp.where(mine, logits, 0), 1),
        )
        return known, (logsumexp(logits, 0), logits.argmax(0) == columns)

    low = jnp.full((n,), -jnp.inf, image.dtype)
    known = (low, low, jnp.full((n,), n, jnp.int32), jnp.zeros((n,), image.dtype))
    (total, _, place, own), (by_text, text_hit) = jax.lax.scan(strip, known, _strips(text, chunk))
    # columns of strip k are k, k + N/chunk, …: back in order
    by_text, text_hit = (a.swapaxes(0, 1).reshape(n) for a in (by_text, text_hit))
    return Seen(total, by_text, place == jnp.arange(n), text_hit, own)


def _sum_of_strips(function, image, text, scale, chunk):
    """The sum of function(logits [N, c], whether i = j bool[N, c], columns i32[c]) over strips, each computed again
    in the backward pass."""

    @jax.checkpoint
    def strip(total, part):
        captions, columns = part
        logits, own = _strip(image, captions, columns, scale)
        return total + function(logits, own, columns), None

    return jax.lax.scan(strip, jnp.zeros((), image.dtype), _strips(text, chunk))[0]


def _strips(text, chunk: int):
    """([strips, c, D], their numbers i32[strips, c])."""
    n = len(text)
    c = math.gcd(n, chunk) if chunk else n
    split = lambda a: a.reshape(c, n // c, *a.shape[1:]).swapaxes(0, 1)  # noqa: E731
    return split(text), split(jnp.arange(n, dtype=jnp.int32))


def _strip(image, captions, columns, scale):
    return scale * image @ captions.T, jnp.arange(len(image), dtype=jnp.int32)[:, None] == columns[None, :]
