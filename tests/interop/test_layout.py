"""A layout table turns each array as the two networks use it, both ways, and names what does not fit."""

import numpy as np
import pytest

from unclip_jax.errors import UserError
from unclip_jax.interop.layout import (
    CONV,
    DENSE,
    DENSE_OUT,
    FLAT,
    ROW,
    SAME,
    Entry,
    interleaved,
    part,
    prefixed,
    read,
    views,
)  # fmt: skip

HEADS, D, W, LAYERS = 2, 3, 4, 3
TABLE = [
    Entry("blocks/query/kernel", "layers.{}.q.weight", DENSE),
    Entry("blocks/query/bias", "layers.{}.q.bias", FLAT),
    Entry("blocks/out/kernel", "layers.{}.out.weight", DENSE_OUT),
    Entry("conv/kernel", "conv.weight", CONV),
    Entry("scale", "norm.weight", SAME),
    Entry("position", "position", ROW),
]
SHAPES = {
    "blocks/query/kernel": (LAYERS, W, HEADS, D),
    "blocks/query/bias": (LAYERS, HEADS, D),
    "blocks/out/kernel": (LAYERS, HEADS, D, W),
    "conv/kernel": (2, 2, 3, 5),
    "scale": (W,),
    "position": (7, W),
}


def ours(seed=0):
    rng = np.random.default_rng(seed)
    return {path: rng.standard_normal(shape).astype(np.float32) for path, shape in SHAPES.items()}


def refused(*args, **kwargs) -> str:
    with pytest.raises(UserError) as error:
        read(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_each_turn_computes_the_same_as_its_network_there():
    """y = W x of PyTorch, by loops, against the arrays here."""
    here, rng = ours(), np.random.default_rng(1)
    there = views(TABLE, here)
    x, h = rng.standard_normal(W), rng.standard_normal((HEADS, D))
    for k in range(LAYERS):
        query = there[f"layers.{k}.q.weight"] @ x + there[f"layers.{k}.q.bias"]
        want = np.einsum("i,ihd->hd", x, here["blocks/query/kernel"][k]) + here["blocks/query/bias"][k]
        np.testing.assert_allclose(query.reshape(HEADS, D), want, rtol=1e-6)
        out = there[f"layers.{k}.out.weight"] @ h.reshape(-1)
        np.testing.assert_allclose(out, np.einsum("hd,hdo->o", h, here["blocks/out/kernel"][k]), rtol=1e-6)
    picture = rng.standard_normal((3, 2, 2))
    conv = np.einsum("oihw,ihw->o", there["conv.weight"], picture)
    np.testing.assert_allclose(conv, np.einsum("hwio,ihw->o", here["conv/kernel"], picture), rtol=1e-6)
    assert there["position"].shape == (1, 7, W)


def test_read_gives_back_what_was_turned():
    here = ours()
    there = views(TABLE, here)
    back = read(TABLE, SHAPES, there, there.__getitem__)
    assert set(back) == set(here)
    for path, array in here.items():
        np.testing.assert_array_equal(back[path], array)
        assert back[path].dtype == array.dtype


def test_nothing_is_copied_to_be_written():
    here = ours()
    there = views(TABLE, here)
    assert len(there) == 3 * LAYERS + 3
    for array in there.values():
        assert any(np.shares_memory(array, own) for own in here.values())


def test_layers_of_several_dtypes_keep_the_widest():
    there = views(TABLE, ours())
    there["layers.0.q.bias"] = np.full(HEADS * D, 0.5, np.float16)
    there["layers.2.q.bias"] = there["layers.2.q.bias"].astype(np.float64) / 3
    back = read(TABLE, SHAPES, there, there.__getitem__)["blocks/query/bias"]
    assert back.dtype == np.float64
    np.testing.assert_array_equal(back[2].reshape(-1), there["layers.2.q.bias"])
    np.testing.assert_array_equal(back[0], np.full((HEADS, D), 0.5))


def test_a_part_of_a_fused_array_is_read_and_never_written():
    fused = np.arange(3 * HEADS * D * W, dtype=np.float32).reshape(3 * HEADS * D, W)
    table = [Entry(name, "qkv", part(DENSE, k, 3)) for k, name in enumerate(("q", "k", "v"))]
    shapes = dict.fromkeys("qkv", (W, HEADS, D))
    back = read(table, shapes, ["qkv"], {"qkv": fused}.__getitem__)
    for k, name in enumerate("qkv"):
        rows = fused[k * HEADS * D : (k + 1) * HEADS * D]
        np.testing.assert_array_equal(back[name].reshape(W, -1), rows.T)
    with pytest.raises(AssertionError, match="cannot be written"):
        views(table, back)


def test_parts_that_take_turns_by_heads_are_told_from_thirds():
    """Row (h, k, d) of a fused array is number d of head h's query, key or value."""
    fused = np.arange(3 * HEADS * D * W, dtype=np.float32).reshape(3 * HEADS * D, W)
    table = [Entry(name, "qkv", interleaved(DENSE, k, 3)) for k, name in enumerate("qkv")]
    back = read(table, dict.fromkeys("qkv", (W, HEADS, D)), ["qkv"], {"qkv": fused}.__getitem__)
    for k, name in enumerate("qkv"):
        for h in range(HEADS):
            for d in range(D):
                np.testing.assert_array_equal(back[name][:, h, d], fused[(h * 3 + k) * D + d])
    flat = [Entry(name, "qkv", interleaved(FLAT, k, 2)) for k, name in enumerate("kv")]
    back = read(flat, dict.fromkeys("kv", (HEADS, D)), ["qkv"], {"qkv": np.arange(2 * HEADS * D)}.__getitem__)
    np.testing.assert_array_equal(back["v"], [[3, 4, 5], [9, 10, 11]])


def test_arrays_of_as_many_numbers_in_another_shape_are_refused():
    there = views(TABLE, ours())
    for name in ("layers.1.q.weight", "layers.0.out.weight"):
        wrong = {**there, name: there[name].T}
        assert name in refused(TABLE, SHAPES, wrong, wrong.__getitem__)
    table = [Entry("q", "qkv", interleaved(DENSE, 0, 3))]
    wrong = {"qkv": np.zeros((W, 3 * HEADS * D), np.float32)}
    assert "(18, 4) does" in refused(table, {"q": (W, HEADS, D)}, wrong, wrong.__getitem__)


def test_a_part_of_a_larger_network_has_prefixes():
    inner = prefixed("visual/", "vision_model.", TABLE)
    there = views(inner, {f"visual/{path}": array for path, array in ours().items()})
    assert set(there) == {f"vision_model.{name}" for name in views(TABLE, ours())}


def test_what_does_not_fit_is_named():
    there = views(TABLE, ours())
    few = {name: array for name, array in there.items() if not name.endswith("q.bias")}
    told = refused(TABLE, SHAPES, few, few.__getitem__)
    assert "lacks 3 of the network's arrays: layers.0.q.bias, layers.1.q.bias, layers.2.q.bias" in told
    more = {**there, **{f"extra.{k:02}": np.zeros(1) for k in range(12)}}
    assert "has unknown 12" in refused(TABLE, SHAPES, more, more.__getitem__)
    assert "extra.09 and 2 more" in refused(TABLE, SHAPES, more, more.__getitem__)
    read(TABLE, SHAPES, more, more.__getitem__, ignored=[name for name in more if name.startswith("extra")])
    for name, shape in (("conv.weight", (5, 3, 2, 3)), ("layers.1.q.weight", (W, W)), ("norm.weight", (W + 1,))):
        wrong = {**there, name: np.zeros(shape, np.float32)}
        told = refused(TABLE, SHAPES, wrong, wrong.__getitem__)
        assert name in told and str(shape) in told


def test_more_layers_than_arrays_are_refused_before_their_names_are_made():
    there = views(TABLE, ours())
    endless = {path: (10**12, *shape[1:]) if shape[0] == LAYERS else shape for path, shape in SHAPES.items()}
    assert f"the config has {10**12} layers" in refused(TABLE, endless, there, there.__getitem__)
    wide = {"norm": (10**15,)}
    assert "norm.weight has the shape" in refused([Entry("norm", "norm.weight", SAME)], wide, there, there.__getitem__,
                                                  ignored=set(there))  # fmt: skip


def test_a_convolution_in_another_order_of_axes_is_refused():
    there = views(TABLE, ours())
    there["conv.weight"] = there["conv.weight"].transpose(2, 3, 1, 0)
    assert "conv.weight has the shape (2, 2, 3, 5)" in refused(TABLE, SHAPES, there, there.__getitem__)
