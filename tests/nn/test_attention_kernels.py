"""Which kernel computes attention, that it is split as batches are, and that each gives what XLA does.

cuDNN runs on a GPU alone: `JAX_PLATFORMS=cuda pytest -m gpu tests/nn/test_attention_kernels.py`. Elsewhere jax's
own attention stands in for it, so that what is done around it is tested.
"""

import functools
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo  # for a stand-in of the installed cuDNN's version, private
from jax.experimental.pallas import tpu as pltpu

from unclip_jax import sharding
from unclip_jax.cost import count_flops
from unclip_jax.nn import attention as module
from unclip_jax.nn.attention import attention, causal_mask, implementation

ROOT = Path(__file__).resolve().parent.parent.parent
plain = jax.nn.dot_product_attention
on_gpu = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
# (N, S, shape of the mask): even and odd lengths, masks of keys and of all, for one head and one sample or for each.
CASES = [
    (256, 344, None), (256, 337, None), (257, 257, None), (256, 344, (4, 1, 1, 344)), (256, 337, (4, 1, 1, 337)),
    (257, 257, (1, 1, 257, 257)), (256, 337, (4, 4, 256, 337)), (1024, 1105, (4, 1, 1, 1105)),
]  # fmt: skip


def inputs(n, s, shape, dtype=jnp.float32, heads=4, d=64):
    """q, k, v and a mask that lets half of the keys be seen, one of them by everybody."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((4, length, heads, d)), dtype) for length in (n, s, s))
    mask = None
    if shape:
        mask = rng.random(shape) < 0.5
        mask[..., 0] = True
    return q, k, v, mask


def value_and_gradients(function, q, k, v, mask):
    """f32 arrays: the output and, weighted by numbers of its own, its gradients."""
    weight = jnp.asarray(np.random.default_rng(1).standard_normal(q.shape), jnp.float32)

    def loss(q, k, v):
        out = function(q, k, v, mask)
        return (out.astype(jnp.float32) * weight).sum(), out

    gradients, out = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
    return [np.asarray(a, np.float32) for a in (out, *gradients)]


@pytest.fixture
def cudnn(monkeypatch):
    """A GPU with cuDNN, to all appearances; jax's own attention stands in where cuDNN's is called."""

    def stand_in(*args, implementation=None, **more):
        asked.append(implementation)
        return plain(*args, **more)

    asked = []
    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    monkeypatch.setattr(module, "implementation", lambda *_: "cudnn")
    monkeypatch.setattr(module, "_has_cudnn", lambda: True)
    monkeypatch.setattr(module, "_splits", lambda *_: True)
    return asked


PIXELS = (4, 1024, 6, 64), (4, 1105, 6, 64)  # 32 x 32 of them and 81 tokens of context
MASKED = "cudnn" if module.CONSTANT_MASKS else "xla"
OF_KEYS, OF_ALL = (4, 1, 1, 1105), (4, 1, 1024, 1105)


@pytest.mark.parametrize(
    ("chosen", "platform", "dtype", "q", "k", "mask"),
    [
        ("cudnn", "gpu", "bfloat16", *PIXELS, None),
        ("cudnn", "gpu", "float16", (4, 257, 16, 64), (4, 257, 16, 64), None),
        ("cudnn", "gpu", "bfloat16", (4, 1024, 3, 128), (4, 1105, 3, 128), None),
        ("xla", "gpu", "float32", *PIXELS, None),
        ("xla", "gpu", "bfloat16", (4, 1024, 3, 136), (4, 1105, 3, 136), None),  # heads too wide
        ("xla", "gpu", "bfloat16", (4, 1024, 6, 20), (4, 1105, 6, 20), None),  # no multiple of 8
        ("xla", "gpu", "bfloat16", (4, 1, 32, 64), (4, 1105, 32, 64), None),  # one token against a cache
        ("xla", "gpu", "bfloat16", (4, 2, 32, 64), (4, 81, 32, 64), (4, 1, 2, 81)),  # the prior's steps
        (MASKED, "gpu", "bfloat16", (4, 64, 6, 64), (4, 145, 6, 64), (4, 1, 1, 145)),  # 8 x 8 pixels
        ("flash", "tpu", "bfloat16", *PIXELS, None),
        ("flash", "tpu", "bfloat16", *PIXELS, OF_KEYS),
        ("xla", "tpu", "bfloat16", *PIXELS, OF_ALL),
        ("xla", "tpu", "float32", *PIXELS, None),
        ("xla", "tpu", "bfloat16", (4, 256, 6, 64), (4, 337, 6, 64), None),
        ("xla", "cpu", "bfloat16", *PIXELS, None),
    ],
)
def test_the_choice(chosen, platform, dtype, q, k, mask):
    assert implementation(platform, jnp.dtype(dtype), q, k, mask) == chosen


@pytest.mark.parametrize(("constant", "chosen"), [(True, "cudnn"), (False, "xla")])
@pytest.mark.parametrize("mask", [OF_KEYS, OF_ALL])
def test_cudnn_takes_a_mask_where_jax_leaves_out_its_gradient(constant, chosen, mask, monkeypatch):
    monkeypatch.setattr(module, "CONSTANT_MASKS", constant)
    assert implementation("gpu", jnp.dtype("bfloat16"), *PIXELS, mask) == chosen


def test_the_platform_is_the_mesh_s_else_the_default_device_s():
    platform = module.platform
    kind = jax.sharding.AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    mesh = jax.sharding.AbstractMesh((1, 1, 1), sharding.AXES, abstract_device=kind)
    assert platform() == jax.default_backend()
    assert sharding.split_rows(platform, mesh)() == "tpu"
    with jax.default_device(jax.devices("cpu")[0]):
        assert platform() == "cpu"


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="for a machine without a GPU")
def test_without_cudnn_xla_does_it(monkeypatch):
    monkeypatch.setattr(module, "platform", lambda: "gpu")
    monkeypatch.setattr(module, "_splits", lambda *_: True)
    q, k, v, _ = inputs(256, 344, None, jnp.bfloat16)
    assert (attention(q, k, v) == plain(q, k, v)).all()


@pytest.mark.parametrize(("n", "s", "shape"), CASES)
def test_what_cudnn_needs_around_it_changes_nothing(n, s, shape, cudnn):
    args = inputs(n, s, shape)
    expected = value_and_gradients(lambda q, k, v, mask: plain(q, k, v, mask=mask), *args)
    for ours, theirs in zip(value_and_gradients(attention, *args), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
    assert set(cudnn) == {"cudnn"}


@pytest.mark.parametrize("heads", [4, 3])
@pytest.mark.parametrize("shape", [None, (4, 1, 1, 337), (1, 1, 256, 337), (1, "heads", 256, 337)])
def test_a_mesh_splits_rows_and_heads(heads, shape, cudnn):
    shape = shape and tuple(heads if size == "heads" else size for size in shape)
    args = inputs(256, 337, shape, heads=heads)
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    expected = value_and_gradients(lambda q, k, v, mask: plain(q, k, v, mask=mask), *args)
    q, k, v = (jax.device_put(a, sharding.batch_sharding(mesh)) for a in args[:3])
    split = value_and_gradients(sharding.split_rows(attention, mesh), q, k, v, args[3])
    for ours, theirs in zip(split, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
    flops = count_flops(sharding.split_rows(attention, mesh), *args)
    parts = 1 if heads % 2 == 0 else 2  # heads that the axis "tensor" does not divide are computed twice
    assert flops == 4 * 4 * heads * 256 * 344 * 64 * parts


def test_devices_and_no_mesh_are_left_to_xla():
    assert jax.device_count() == 1 or not module._splits(jax.sharding.get_abstract_mesh(), 8)
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2, devices=8)
    assert [module._splits(mesh, batch) for batch in (8, 4, 6)] == [True, True, False]


@pytest.mark.parametrize("shape", [None, (4, 1, 1, 337), (1, 1, 256, 337)])
def test_cudnn_s_calls_in_a_scan_with_remat(shape, monkeypatch):
    """Lowered for a GPU that is not there: forward, again, backward, no gradient of a mask, all products counted."""
    version = SimpleNamespace(cudnn_get_version=lambda: 91000)
    monkeypatch.setattr(fused_attention_stablehlo, "cuda_versions", version)
    monkeypatch.setattr(module, "platform", lambda: "gpu")
    monkeypatch.setattr(module, "_splits", lambda *_: True)
    monkeypatch.setattr(module, "_has_cudnn", lambda: True)
    monkeypatch.setattr(module, "CONSTANT_MASKS", True)
    q, k, v, mask = inputs(256, 337, shape, jnp.bfloat16)

    def loss(q, k, v):
        step = jax.checkpoint(lambda x, _: (attention(x, k, v, mask), None))
        return jax.lax.scan(step, q, None, length=3)[0].astype(jnp.float32).sum()

    gradient = jax.jit(jax.grad(loss, (0, 1, 2)))
    text = gradient.trace(q, k, v).lower(lowering_platforms=("cuda",)).as_text()
    kind = "ScaleBiasSoftmax" if shape else "Softmax"
    calls = [line for line in text.splitlines() if "__cudnn$" in line]
    assert re.findall(r"@__cudnn\$fmha(\w+)", "".join(calls)) == [kind, kind, kind + "Backward"]
    if jax.__version_info__ >= (0, 11, 2):
        results = calls[-1].rsplit("->", 1)[1]
        assert results.count("tensor<") == 4  # of q, k, v, and a workspace
    assert count_flops(gradient, q, k, v) == 3 * (2 + 2 + 4) * 2 * 4 * 4 * 256 * 344 * 64


@pytest.mark.parametrize(("length", "whole", "block"), [(1024, 1024, 512), (1105, 1152, 384), (4177, 4608, 512)])
def test_blocks_are_whole(length, whole, block):
    assert module._blocks(length) == (whole, block)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [None, (4, 1, 1, 333)])
def test_the_tpu_s_kernel_gives_what_xla_does(shape, monkeypatch):
    """Interpreted, in three blocks of keys of which the last is not full, and two of queries."""
    monkeypatch.setattr(module, "BLOCK", 128)
    args = inputs(200, 333, shape, heads=1)
    expected = value_and_gradients(lambda q, k, v, mask: plain(q, k, v, mask=mask), *args)
    with pltpu.force_tpu_interpret_mode():
        ours = value_and_gradients(module._flash, *args)
    for one, other in zip(ours, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)


def test_the_tpu_s_kernel_is_counted_as_xla_s_products_are():
    q, k, v, _ = inputs(1024, 1024, None)
    slope = lambda f: count_flops(jax.grad(lambda *x: f(*x).sum(), (0, 1, 2)), q, k, v)  # noqa: E731
    assert slope(lambda *x: module._flash(*x, None)) == slope(plain) == (2 + 4) * 2 * q.size * 1024


ON_TPU = """
import jax
import jax.numpy as jnp
from jax.experimental import topologies

from unclip_jax import sharding
from unclip_jax.nn import attention as module

mesh = sharding.make_mesh(
    data=2, tensor=2, devices=list(topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices)
)
batch = sharding.batch_sharding(mesh)


def loss(q, k, v, mask):
    step = jax.checkpoint(lambda x, _: (module.attention(x, k, v, mask), None))
    return jax.lax.scan(step, q, None, length=3)[0].astype(jnp.float32).sum()


def temporary():
    program = jax.jit(sharding.split_rows(jax.grad(loss, (0, 1, 2)), mesh), out_shardings=batch)
    shapes = [((8, length, 8, 64), jnp.bfloat16) for length in (4096, 4177, 4177)] + [((8, 1, 1, 4177), bool)]
    compiled = program.lower(*(jax.ShapeDtypeStruct(*shape, sharding=batch) for shape in shapes)).compile()
    return compiled.as_text().count("tpu_custom_call"), compiled.memory_analysis().temp_size_in_bytes


flash = temporary()
jax.clear_caches()
module.implementation = lambda *_: "xla"
print("found", *flash, *temporary())
"""


@pytest.mark.tpu
@pytest.mark.slow
@pytest.mark.skipif(find_spec("libtpu") is None, reason="libtpu is not installed (extra [tpu])")
def test_the_tpu_s_kernel_compiles_split_and_takes_less_memory():
    """Forward and backward, scanned with remat, for 64 x 64 pixels on four chips; in a process of its own, see
    test_plan_tpu.
    """
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    env |= {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", ON_TPU], env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    kernels, bytes_of_kernel, none, bytes_of_xla = map(int, done.stdout.split("found")[1].split())
    assert kernels >= 4 and none == 0  # forward, again, and the two of the gradient
    assert bytes_of_kernel < bytes_of_xla / 8


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize(("n", "s", "shape"), CASES)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_cudnn_gives_what_xla_does(n, s, shape, dtype):
    """Each against attention in f32 of the same numbers: no further from it than XLA's in the same dtype, or nearly."""
    args = inputs(n, s, shape, dtype)
    kernel = implementation("gpu", jnp.dtype(dtype), args[0].shape, args[1].shape, shape)
    assert kernel == "cudnn" and module._has_cudnn()
    split = sharding.split_rows(attention, sharding.make_mesh(devices=jax.devices()[:1]))
    text = jax.jit(split).lower(*args).as_text()
    assert "__cudnn$fmha" in text
    xla = lambda q, k, v, mask: plain(q, k, v, mask=mask)  # noqa: E731
    with jax.default_matmul_precision("float32"):
        exact = value_and_gradients(xla, *(a.astype(jnp.float32) for a in args[:3]), args[3])
    for ours, theirs, right in zip(
        value_and_gradients(split, *args), value_and_gradients(xla, *args), exact, strict=True
    ):
        assert np.isfinite(ours).all()
        scale = np.sqrt(np.mean(right**2))
        error, allowed = (np.sqrt(np.mean((a - right) ** 2)) / scale for a in (ours, theirs))
        assert error < max(2 * allowed, 4 * float(jnp.finfo(dtype).eps)), (error, allowed)


@on_gpu
@pytest.mark.gpu
def test_hidden_keys_and_empty_rows_on_a_gpu():
    q, k, v, _ = inputs(256, 337, None, jnp.bfloat16)
    mask = np.ones((4, 1, 1, 337), bool)
    mask[..., 100:200] = False
    split = jax.jit(sharding.split_rows(attention, sharding.make_mesh(devices=jax.devices()[:1])))
    hidden = ~mask[0, 0, 0][None, :, None, None]
    changed = [jnp.where(hidden, jnp.asarray(1e3, a.dtype), a) for a in (k, v)]
    assert (split(q, k, v, mask) == split(q, *changed, mask)).all()
    out, *gradients = value_and_gradients(split, q, k, v, causal_mask(256, 337) & False)
    assert all(np.isfinite(a).all() for a in (out, *gradients))


@on_gpu
@pytest.mark.gpu
def test_cudnn_in_a_scan_with_remat_on_a_gpu():
    q, k, v, mask = inputs(256, 337, (4, 1, 1, 337), jnp.bfloat16)

    def thrice(function, q, k, v, mask):
        step = jax.checkpoint(lambda x, _: (function(x, k, v, mask), None))
        return jax.lax.scan(step, q, None, length=3)[0]

    split = sharding.split_rows(functools.partial(thrice, attention), sharding.make_mesh(devices=jax.devices()[:1]))
    xla = functools.partial(thrice, lambda q, k, v, mask: plain(q, k, v, mask=mask))
    for ours, theirs in zip(
        value_and_gradients(split, q, k, v, mask), value_and_gradients(xla, q, k, v, mask), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=0.05 * np.abs(theirs).max())
