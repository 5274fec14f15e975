"""The one attention function; every backend is chosen here, while it is traced.

Fused kernels keep the scores [B, H, N, S] out of memory. They are left to XLA where a kernel gains nothing or might not
run: `implementation` is the whole choice, but that XLA cannot split a kernel over devices, so that `attention` does it
over the mesh that `sharding.split_rows` tells of, and takes none where there are devices and no mesh.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, PartitionSpec

from unclip_jax.nn.device import alone, in_order, platform
from unclip_jax.nn.rows import BATCH

HEADS = "tensor"
EIGHT = 8  # what kernels like head dimensions, and cuDNN lengths, to be multiples of
LANES, BLOCK = 128, 512  # of the TPU's kernel: sequences are cut in blocks, multiples of LANES, of at most BLOCK
FEW = 3  # keys that are not worth a matrix product
SHORT = 48  # a sequence from which on cuDNN computes it
LONG = 1024  # a sequence from which on the TPU's kernel computes it
# From here on, cuDNN's gradient leaves out that of a mask, which is as large as the scores and which nobody asks for.
CONSTANT_MASKS = jax.__version_info__ >= (0, 11, 2)

KV = tuple[jax.Array, jax.Array]  # of a layer: keys and values [B, S, H, D]
Part = Sequence[KV]


def attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """softmax(q kᵀ / sqrt(D)) v, the softmax in f32, or in f64 where q is f64.

    Args:
      q: [B, N, H, D].
      k: [B, S, H, D].
      v: [B, S, H, D].
      mask: bool, broadcastable to [B, H, N, S]; True where a query may look. A row without any True stays finite: it
        is the mean of all values where XLA computes it. cuDNN's cannot be vmapped over masks that are one for all
        heads (jax-ml/jax#36702).

    Returns:
      [B, N, H, D] in q's dtype.
    """
    k, v = k.astype(q.dtype), v.astype(q.dtype)
    if mask is not None:
        mask = jnp.asarray(mask)[(None,) * (4 - mask.ndim)]
    mesh = jax.sharding.get_abstract_mesh()
    shapes = q.shape, k.shape, None if mask is None else mask.shape
    chosen = implementation(platform(), q.dtype, *shapes)
    if chosen == "xla" or not _splits(mesh, q.shape[0]) or (chosen == "cudnn" and not _has_cudnn()):
        return _by_xla(q, k, v, mask)
    return _split(KERNELS[chosen], mesh, q, k, v, mask)


def _by_xla(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> jax.Array:
    """As it is written, of any dtype; jax's own has its softmax in f32 at most, and keeps it three times to train."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("BNHD,BSHD->BHNS", q, k, preferred_element_type=wide) / q.shape[-1] ** 0.5
    return jnp.einsum("BHNS,BSHD->BNHD", _weights(q.dtype, scores, mask), v)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weights(dtype: jnp.dtype, scores: jax.Array, mask: jax.Array | None) -> jax.Array:
    """softmax(scores) over what the mask shows, as `dtype`; the backward pass keeps it and nothing else."""
    return jax.nn.softmax(scores if mask is None else jnp.where(mask, scores, -1e30)).astype(dtype)


def _kept_weights(dtype, scores, mask):
    weights = _weights(dtype, scores, mask)
    return weights, (weights, mask)


def _weights_gradient(dtype, kept, g):
    weights, mask = kept
    wide = jnp.promote_types(dtype, jnp.float32)
    weights, g = weights.astype(wide), g.astype(wide)
    to_scores = weights * (g - (weights * g).sum(-1, keepdims=True))
    return to_scores if mask is None else jnp.where(mask, to_scores, 0), None


_weights.defvjp(_kept_weights, _weights_gradient)


def attention_in_parts(q: jax.Array, parts: Sequence[Part], mask: jax.Array | None = None) -> jax.Array:
    """`attention` to keys and values that lie in several places, which are read where they are.

    For few queries on long sequences, where copying all keys together takes longer than computing with them.

    Args:
      q: [B, N, H, D].
      parts: of the sequence, one after another; each one or more pairs (k, v) [B', S_i, H, D], the first of which is
        for the first of so many equal parts of the B rows, and so on. Runs of rows share one of a pair's B'.
      mask: bool, broadcastable to [B, H, N, S], S = the sum of S_i, in the parts' order.

    Returns:
      [B, N, H, D] in q's dtype.
    """
    _, n, h, d = q.shape
    wide = jnp.promote_types(q.dtype, jnp.float32)

    def scores(q, k):
        sharing = q.reshape(k.shape[0], -1, h, d)
        if k.shape[1] <= FEW:
            score = (sharing.astype(wide)[:, :, None] * k.astype(wide)[:, None]).sum(-1).transpose(0, 3, 1, 2)
        else:
            score = jnp.einsum("BNHD,BSHD->BHNS", sharing, k.astype(q.dtype), preferred_element_type=wide)
        return score.reshape(k.shape[0], h, -1, n, k.shape[1]).swapaxes(1, 2).reshape(q.shape[0], h, n, -1)

    def values(weights, v):
        own = weights.reshape(v.shape[0], -1, h, n, v.shape[1]).swapaxes(1, 2).reshape(v.shape[0], h, -1, v.shape[1])
        if v.shape[1] <= FEW:
            part = (own.astype(wide).transpose(0, 2, 3, 1)[..., None] * v.astype(wide)[:, None]).sum(2)
        else:
            part = jnp.einsum("BHNS,BSHD->BNHD", own, v.astype(q.dtype), preferred_element_type=wide)
        return part.reshape(-1, n, h, d)

    def by_rows(function, x, part, which):
        each = zip(jnp.split(x, len(part)), part, strict=True)
        return jnp.concatenate([function(rows, pair[which]) for rows, pair in each])

    seen = [by_rows(scores, q, part, 0) / d**0.5 for part in parts]
    if mask is not None:
        ends = np.cumsum([score.shape[-1] for score in seen])
        masks = jnp.split(jnp.broadcast_to(mask, (*mask.shape[:-1], ends[-1])), ends[:-1], axis=-1)
        seen = [jnp.where(own, score, -1e30) for own, score in zip(masks, seen, strict=True)]
    top = functools.reduce(jnp.maximum, [score.max(-1, keepdims=True) for score in seen])
    weights = [jnp.exp(score - top) for score in seen]
    total = sum(w.sum(-1, keepdims=True) for w in weights)
    out = sum(by_rows(values, w.astype(q.dtype), part, 1) for w, part in zip(weights, parts, strict=True))
    return in_order((out / total.swapaxes(1, 2)).astype(q.dtype))


def implementation(
    platform: str, dtype: jnp.dtype, q: tuple[int, ...], k: tuple[int, ...], mask: tuple[int, ...] | None
) -> str:
    """Who computes attention of q [B, N, H, D], k [B, S, H, D] and a mask of such a shape: "xla" or one of KERNELS.

    A kernel saves writing N x S scores a head and costs a launch and tiles that short sequences leave empty. cuDNN's
    is worth it from SHORT tokens on; so one query at a time is XLA's. The TPU's, which no TPU timed, is for where the
    scores would fill the memory.
    """
    (_, n, _, d), s = q, k[1]
    if d > 128 or d % EIGHT:
        return "xla"
    if platform == "gpu" and dtype in (jnp.bfloat16, jnp.float16) and (mask is None or CONSTANT_MASKS):
        return "cudnn" if min(n, s) >= SHORT else "xla"
    of_keys = mask is None or mask[1:3] == (1, 1)
    return "flash" if platform == "tpu" and dtype == jnp.bfloat16 and min(n, s) >= LONG and of_keys else "xla"


def _splits(mesh: AbstractMesh, batch: int) -> bool:
    """Whether it is known how a batch of this size lies on the devices."""
    if mesh.empty:
        return alone()
    return batch % math.prod(mesh.shape[axis] for axis in BATCH) == 0


def _split(kernel, mesh: AbstractMesh, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> jax.Array:
    """kernel(q, k, v, mask), each device with its rows and heads."""
    if mesh.empty or mesh.size == 1:
        return kernel(q, k, v, mask)
    heads = HEADS if q.shape[2] % mesh.shape[HEADS] == 0 else None
    vectors = PartitionSpec(BATCH, None, heads)
    own = None
    if mask is not None:
        own = PartitionSpec(BATCH if mask.shape[0] > 1 else None, heads if mask.shape[1] > 1 else None)
    specs = (vectors, vectors, vectors, own)
    return jax.shard_map(kernel, in_specs=specs, out_specs=vectors, check_vma=False)(q, k, v, mask)


@functools.cache
def _has_cudnn() -> bool:
    """Whether jax finds cuDNN and a GPU that its flash attention runs on (Ampere or later)."""
    try:
        if float(jax.local_devices(backend="gpu")[0].compute_capability) < 8:
            return False
        x = jax.ShapeDtypeStruct((1, 64, 1, 64), jnp.bfloat16)
        jax.eval_shape(functools.partial(jax.nn.dot_product_attention, implementation="cudnn"), x, x, x)
    except (RuntimeError, NotImplementedError, ValueError, AttributeError):  # no GPU, no CUDA, no cuDNN, too old
        return False
    return True


def _cudnn(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> jax.Array:
    """By cuDNN, of sequences filled up to lengths it takes, with queries that are cut off again and keys unseen.

    Its gradient wants even lengths, and its loads of a mask rows of 16 bytes.
    """
    n, s = q.shape[1], k.shape[1]
    q, k, v = (jnp.pad(x, ((0, 0), (0, -x.shape[1] % EIGHT), (0, 0), (0, 0))) for x in (q, k, v))
    seen = None
    if mask is not None:  # becomes a bias, which may be one for all samples or heads, but not for all queries
        mask = jnp.broadcast_to(mask, (*mask.shape[:2], n, s))
        mask = jnp.pad(mask, ((0, 0), (0, 0), (0, -n % EIGHT), (0, -s % EIGHT)))
    elif s % EIGHT:
        seen = jnp.full(k.shape[0], s, jnp.int32)
    out = jax.nn.dot_product_attention(q, k, v, mask=mask, key_value_seq_lengths=seen, implementation="cudnn")
    return out[:, :n]


def _flash(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> jax.Array:
    """By jax's kernel for TPUs, in whole blocks; a mask, of keys alone, puts them in a segment that no query is in."""
    from jax.experimental.pallas.ops.tpu import flash_attention as tpu  # takes as long as all else here to import

    (b, n, _, d), s = q.shape, k.shape[1]
    (wide, rows), (long, columns) = _blocks(n), _blocks(s)
    seen = jnp.broadcast_to(True if mask is None else mask[:, 0, 0], (b, s))
    seen = jnp.pad(seen.astype(jnp.int32), ((0, 0), (0, long - s)))
    segments = tpu.SegmentIds(jnp.ones((b, wide), jnp.int32), seen)
    sizes = tpu.BlockSizes(
        block_b=1, block_q=rows, block_q_dq=rows, block_q_dkv=rows, block_q_major_dkv=rows,
        block_k=columns, block_k_major=columns, block_k_dq=columns, block_k_major_dq=columns, block_k_dkv=columns,
        block_k_major_dkv=columns,
    )  # fmt: skip
    q, k, v = (
        jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, 0))).swapaxes(1, 2)
        for x, length in ((q, wide), (k, long), (v, long))
    )
    out = tpu.flash_attention(q, k, v, segment_ids=segments, sm_scale=d**-0.5, block_sizes=sizes)
    return out.swapaxes(1, 2)[:, :n]


def _blocks(length: int) -> tuple[int, int]:
    """(at least `length`, the size of the blocks that it is cut in)."""
    count = -(-length // BLOCK)
    size = -(-length // (count * LANES)) * LANES
    return count * size, size


KERNELS = {"cudnn": _cudnn, "flash": _flash}


def causal_mask(queries: int, keys: int) -> jax.Array:
    """bool[1, 1, queries, keys]: the last `queries` of a sequence of `keys`, each seeing itself and all before it."""
    return jnp.tril(jnp.ones((queries, keys), bool), keys - queries)[None, None]


def caption_mask(mask: jax.Array, queries: int, total: int) -> jax.Array:
    """bool[B, 1, queries, total]: the last `queries` of a sequence that begins with a caption, mask bool[B, L].

    Causal; padding is unseen but by itself, so that no row is empty.
    """
    seen = jnp.pad(mask, ((0, 0), (0, total - mask.shape[1])), constant_values=True)[:, None, None]
    itself = jnp.eye(total, dtype=bool)[-queries:][None, None]
    return causal_mask(queries, total) & (seen | itself)
