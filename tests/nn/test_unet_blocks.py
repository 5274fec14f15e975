"""The UNet's parts against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.random_params import draw, run, with_initial
from unclip_jax.nn.unet_blocks import GroupNorm, PixelAttention, ResBlock, downsample, upsample


def picture(*shape, seed=0, offset=0.0):
    return (np.random.default_rng(seed).standard_normal(shape) + offset).astype(np.float32)


def group_norm(x, groups, gamma, beta, scale=0.0, shift=0.0):
    """x [B, H, W, C] in float64: each sample's groups of channels to mean 0 and variance 1."""
    out = np.zeros(x.shape)
    size = x.shape[-1] // groups
    for b, g in np.ndindex(len(x), groups):
        part = x[b, ..., g * size : (g + 1) * size].astype(np.float64)
        out[b, ..., g * size : (g + 1) * size] = (part - part.mean()) / np.sqrt(part.var() + 1e-5)
    out = out * gamma + beta
    return out * (1 + np.asarray(scale)) + np.asarray(shift)


@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("groups", [1, 4, 8])
def test_group_norm(groups, modulated):
    x, norm = picture(2, 4, 6, 8, offset=3), GroupNorm(groups)
    p = draw(norm, x)
    scale, shift = (picture(2, 8, seed=s) if modulated else None for s in (1, 2))
    args = (scale[:, None, None], shift[:, None, None]) if modulated else ()
    want = group_norm(x, groups, p["scale"], p["bias"], *args)
    np.testing.assert_allclose(run(norm, p, x, scale, shift), want, rtol=0, atol=2e-5)


def test_group_norm_of_a_constant_is_its_bias():
    """The variance by moments must not come out below zero."""
    x, norm = np.full((1, 8, 8, 8), 0.1, np.float32), GroupNorm(4)
    p = draw(norm, x)
    np.testing.assert_allclose(run(norm, p, x)[0, 0, 0], p["bias"], rtol=0, atol=1e-3)


def test_group_norm_in_bfloat16_computes_in_f32():
    x = jnp.asarray(picture(1, 16, 16, 8, offset=30), jnp.bfloat16)
    norm = GroupNorm(2, jnp.bfloat16)
    p = draw(norm, x)
    got = run(norm, p, x)
    assert got.dtype == jnp.bfloat16
    want = group_norm(np.asarray(x, np.float32), 2, p["scale"], p["bias"])
    np.testing.assert_allclose(np.asarray(got, np.float32), want, rtol=2**-8, atol=2e-3)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_backward_pass_of_a_norm_keeps_its_input_alone(dtype):
    """And what is small: of each sample or channel."""
    x, norm = jnp.asarray(picture(2, 16, 16, 8), dtype), GroupNorm(2, dtype, jax.nn.silu)
    p, (scale, shift) = draw(norm, x), picture(2, 2, 8)
    pull = jax.vjp(lambda p, x, *of: norm.apply({"params": p}, x, *of), p, x, scale, shift)[1]
    kept = [a for a in jax.tree.leaves(pull) if a.size > 2 * 2 * 8]
    assert [(a.shape, a.dtype) for a in kept] == [(x.shape, dtype)]


@pytest.mark.parametrize("modulated", [False, True])
def test_a_norm_s_gradient_is_that_of_its_formula(modulated):
    def formula(p, x, *of):
        parts = x.reshape(2, 4, 6, 4, 2)
        mean, square = (a.mean((1, 2, 4), keepdims=True) for a in (parts, jnp.square(parts)))
        gamma, beta = (p[name][None, None, None] for name in ("scale", "bias"))
        y = ((parts - mean) / jnp.sqrt(square - mean**2 + 1e-5)).reshape(x.shape) * gamma + beta
        return jax.nn.silu(y * (1 + of[0][:, None, None]) + of[1][:, None, None] if of else y)

    with jax.enable_x64():
        x, of = picture(2, 4, 6, 8).astype(np.float64), picture(2, 2, 8, seed=1).astype(np.float64)
        norm, of = GroupNorm(4, jnp.float64, jax.nn.silu), tuple(of) if modulated else ()
        p = draw(norm, x, dtype=np.float64)
        own = lambda p, x, *of: norm.apply({"params": p}, x, *of)  # noqa: E731
        found, wanted = (
            jax.jit(jax.grad(lambda *args, f=f: jnp.sin(f(*args)).sum(), argnums=tuple(range(2 + len(of)))))(p, x, *of)
            for f in (own, formula)
        )
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12), found, wanted)


def test_downsample_is_the_mean_of_four_pixels():
    x = picture(2, 4, 6, 3)
    want = (x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2]) / 4
    np.testing.assert_allclose(downsample(x), want, rtol=0, atol=1e-6)


def test_upsample_repeats_pixels():
    x = picture(2, 3, 2, 3)
    np.testing.assert_array_equal(upsample(x), np.kron(x, np.ones((1, 2, 2, 1), np.float32)))
    np.testing.assert_allclose(downsample(upsample(x)), x, rtol=0, atol=1e-6)


@pytest.mark.parametrize("resample", ["", "down", "up"])
def test_res_block_starts_as_its_skip(resample):
    """The last convolution starts at zero, so only the resampled input is left."""
    x, emb = picture(2, 4, 4, 8), picture(2, 6, seed=1)
    block = ResBlock(8, resample, groups=4)
    p = with_initial(draw(block, x, emb), "conv2", block, x, emb)
    want = {"": x, "down": downsample(x), "up": upsample(x)}[resample]
    np.testing.assert_allclose(run(block, p, x, emb), want, rtol=0, atol=1e-6)


def conv(x, kernel, bias):
    """3x3 convolution with zero padding, by nine shifts."""
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    h, w = x.shape[1:3]
    return bias + sum(padded[:, i : i + h, j : j + w] @ kernel[i, j] for i, j in np.ndindex(3, 3))


def silu(x):
    return x / (1 + np.exp(-x))


@pytest.mark.parametrize("scale_shift", [True, False])
def test_res_block(scale_shift):
    x, emb = picture(2, 4, 4, 8), picture(2, 6, seed=1)
    block = ResBlock(12, "down", scale_shift, groups=4)
    p = draw(block, x, emb)
    h = silu(group_norm(x, 4, p["norm1"]["scale"], p["norm1"]["bias"]))
    h = h.reshape(2, 2, 2, 2, 2, 8).mean((2, 4))
    h = conv(h, p["conv1"]["kernel"], p["conv1"]["bias"])
    e = (silu(emb.astype(np.float64)) @ p["emb"]["kernel"] + p["emb"]["bias"])[:, None, None]
    second = (4, p["norm2"]["scale"], p["norm2"]["bias"])
    h = group_norm(h, *second, e[..., :12], e[..., 12:]) if scale_shift else group_norm(h + e, *second)
    h = conv(silu(h), p["conv2"]["kernel"], p["conv2"]["bias"])
    skip = x.reshape(2, 2, 2, 2, 2, 8).mean((2, 4)) @ p["skip"]["kernel"][0, 0] + p["skip"]["bias"]
    np.testing.assert_allclose(run(block, p, x, emb), skip + h, rtol=0, atol=1e-4)


def test_dropout_acts_in_training_only():
    x, emb = picture(1, 4, 4, 8), picture(1, 6, seed=1)
    block = ResBlock(8, groups=4, dropout=0.5)
    p = draw(block, x, emb)
    first, second = (run(block, p, x, emb, train=True, rngs={"dropout": jax.random.key(i)}) for i in (0, 1))
    assert (first != second).any()
    np.testing.assert_array_equal(run(block, p, x, emb), run(ResBlock(8, groups=4), p, x, emb))


@pytest.mark.parametrize("context_len", [0, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_pixel_attention(context_len, masked):
    """Keys are [context, pixels]; the context is projected as it is; heads of 4 channels; the result is added."""
    x = picture(2, 2, 3, 8)
    context = picture(2, context_len, 5, seed=1) if context_len else None
    mask = np.array([[True, False, True], [False, False, True]]) if masked and context_len else None
    module = PixelAttention(head_channels=4, groups=2)
    p = draw(module, x, context, mask)
    h = group_norm(x, 2, p["norm"]["scale"], p["norm"]["bias"]).reshape(2, 6, 8)

    def project(name, a):
        return np.einsum("bnc,chd->bnhd", a, p[name]["kernel"]) + p[name]["bias"]

    q, k, v = (project(name, h) for name in ("query", "key", "value"))
    seen = np.ones((2, 6), bool)
    if context is not None:
        k = np.concatenate([project("context_key", context), k], 1)
        v = np.concatenate([project("context_value", context), v], 1)
        seen = np.concatenate([np.ones((2, 3), bool) if mask is None else mask, seen], 1)
    weight = np.exp(np.einsum("bnhd,bshd->bhns", q, k) / 2) * seen[:, None, None]
    out = np.einsum("bhns,bshd->bnhd", weight / weight.sum(-1, keepdims=True), v)
    out = np.einsum("bnhd,hdc->bnc", out, p["out"]["kernel"]) + p["out"]["bias"]
    got = run(module, p, x, context, mask)
    np.testing.assert_allclose(got, x + out.reshape(x.shape), rtol=0, atol=1e-5)


def test_pixel_attention_starts_as_identity():
    x = picture(1, 2, 2, 8)
    module = PixelAttention(head_channels=4, groups=2)
    p = with_initial(draw(module, x, None, None), "out", module, x, None, None)
    np.testing.assert_array_equal(run(module, p, x, None, None), x)


def test_pixel_attention_refuses_channels_that_do_not_split():
    with pytest.raises(ValueError, match="channels=6 must be a multiple of head_channels=4"):
        jax.eval_shape(lambda: PixelAttention(4, 2).init(jax.random.key(0), jnp.zeros((1, 2, 2, 6)), None, None))
