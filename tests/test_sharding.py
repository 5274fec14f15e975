"""Rules decide every array's sharding, or say why they cannot; shards hold what they should."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from unclip_jax import config, sharding
from unclip_jax.cost import read_hlo
from unclip_jax.errors import UserError
from unclip_jax.nn.rows import rows
from unclip_jax.plan.abstract import abstract


def _shape(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _specs(tree):
    return jax.tree.map(lambda s: tuple(s.spec), tree)


def _refused(function, *args, **kwargs) -> str:
    with pytest.raises(UserError) as error:
        function(*args, **kwargs)
    return str(error.value)


def test_mesh_takes_the_rest():
    assert dict(sharding.make_mesh().shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert dict(sharding.make_mesh(fsdp=4).shape) == {"data": 2, "fsdp": 4, "tensor": 1}
    assert dict(sharding.make_mesh(data=2, fsdp=-1, tensor=2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    four = sharding.make_mesh(fsdp=2, devices=jax.devices()[:4])
    assert four.size == 4 and set(four.devices.flat) == set(jax.devices()[:4])
    assert set(sharding.make_mesh().axis_types) == {AxisType.Auto}


@pytest.mark.parametrize(
    "axes, told",
    [
        ({"data": 3}, "must multiply to the 8 devices"),
        ({"fsdp": 3}, "8 devices"),
        ({"fsdp": 16}, "1, 2, 4, 8"),
        ({"fsdp": -1}, "only one axis"),
        ({"data": 0}, ">= 1"),
        ({"data": -2}, ">= 1"),
        ({"fsdp": 2.0}, "whole numbers"),
    ],
)
def test_bad_meshes_are_refused(axes, told):
    assert told in _refused(sharding.make_mesh, **axes)


class _Chip:
    """What JAX tells of a device where it lies."""

    platform, device_kind, core_on_chip, coords, slice_index = "tpu", "TPU v6 lite", 0, (0, 0, 0), 0

    def __init__(self, number, **told):
        self.id, self.process_index = number, number // 4
        vars(self).update(told)


def _slices(sides, count=1, **told):
    places = [(part, tuple(place)) for part in range(count) for place in np.ndindex(*sides)]
    return [_Chip(i, slice_index=part, coords=place, **told) for i, (part, place) in enumerate(places)]


@pytest.mark.parametrize("sides, fsdp", [((16, 16, 1), 8), ((4, 4, 4), 8), ((4, 4, 4), 32), ((2, 2, 1), 4)])
def test_a_mesh_need_not_fill_the_axes_of_its_slice(sides, fsdp):
    """Those who share weights lie side by side: a group of `fsdp` chips is a box of so many."""
    devices = _slices(sides)
    mesh = sharding.make_mesh(fsdp=fsdp, devices=devices)
    assert mesh.shape["fsdp"] == fsdp and set(mesh.devices.flat) == set(devices)
    for group in mesh.devices[:, :, 0]:
        places = np.array([chip.coords for chip in group])
        assert np.prod(np.ptp(places, axis=0) + 1) == fsdp


def test_only_data_spans_slices():
    devices = _slices((4, 4, 1), count=2, device_kind="TPU v5e")
    mesh = sharding.make_mesh(fsdp=4, tensor=2, devices=devices)
    assert dict(mesh.shape) == {"data": 4, "fsdp": 4, "tensor": 2} and set(mesh.devices.flat) == set(devices)
    assert all(len({chip.slice_index for chip in group.flat}) == 1 for group in mesh.devices)
    told = _refused(sharding.make_mesh, data=1, fsdp=32, devices=devices)
    assert "data=1 must be a multiple of the 2 slices" in told and "mesh.data=-1" in told


def test_hosts_of_a_gpu_cluster_make_one_mesh():
    """JAX calls what NVLink joins a slice; the others are reached too, and fsdp stays within one."""
    devices = [_Chip(i, platform="gpu", device_kind="NVIDIA H100", slice_index=i // 8) for i in range(16)]
    mesh = sharding.make_mesh(fsdp=8, devices=devices)
    assert [len({chip.slice_index for chip in group.flat}) for group in mesh.devices] == [1, 1]


def test_fsdp_takes_the_largest_axis_that_divides():
    mesh = sharding.make_mesh(data=2, fsdp=4)
    shapes = {
        "wide": _shape(256, 1024),
        "tall": _shape(1024, 256),
        "odd": _shape(1023, 256),
        "square": _shape(512, 512),
        "prime": _shape(257, 263),
        "small": _shape(64, 64),
        "scalar": _shape(),
        "none": _shape(0, 4),
    }
    assert _specs(sharding.infer(shapes, ((".*", "fsdp"),), mesh)) == {
        "wide": (None, "fsdp"), "tall": ("fsdp",), "odd": (None, "fsdp"), "square": (None, "fsdp"),
        "prime": (), "small": (), "scalar": (), "none": (),
    }  # fmt: skip
    assert _specs(sharding.infer({"a": _shape(8, 4)}, [["a", "fsdp"]], mesh, min_size=32)) == {"a": ("fsdp",)}
    assert _specs(sharding.infer({"a": _shape(8, 4)}, [["a", "fsdp"]], mesh, min_size=33)) == {"a": ()}
    alone = sharding.make_mesh()
    assert _specs(sharding.infer({"a": _shape(1024, 1024)}, ((".*", "fsdp"),), alone)) == {"a": ()}


def test_first_match_wins_and_optimizer_follows():
    mesh = sharding.make_mesh(data=1, fsdp=2, tensor=4)
    params = {"mlp": {"kernel": _shape(512, 512), "bias": _shape(512)}, "out": {"kernel": _shape(512, 512)}}
    state = {"step": _shape(), "params": params, "opt": jax.eval_shape(optax.adam(1e-3).init, params)}
    rules = (("mlp/kernel$", (None, "tensor")), ("bias$", "replicate"), ("^step$", "replicate"), (".*", "fsdp"))
    specs = _specs(sharding.infer(state, rules, mesh))
    expected = {"mlp": {"kernel": (None, "tensor"), "bias": ()}, "out": {"kernel": (None, "fsdp")}}
    assert specs["params"] == expected and specs["step"] == ()
    assert specs["opt"][0].mu == expected and specs["opt"][0].nu == expected
    both = sharding.infer({"a": _shape(16, 8)}, (("a", (("fsdp", "tensor"), None)),), mesh)
    assert _specs(both) == {"a": (("fsdp", "tensor"), None)}


@pytest.mark.parametrize(
    "rules, told",
    [
        ((("kernel", "fsdp"),), "a/bias (6,) matches no sharding rule"),
        ((("kernel", "fsdp"), ("bias", "replicate"), ("embed", "fsdp")), "'embed' decides for no array"),
        (((".*", "fsdp"), ("bias", "replicate")), "'bias' decides for no array"),
        (((".*", "fdsp"),), "did you mean 'fsdp'"),
        ((("(", "fsdp"),), "regular expression"),
        ((".*",), "must be a pair"),
        (((".*", None),), "must be 'fsdp', 'replicate' or a tuple"),
        ((("bias", ("tensor",)), (".*", "fsdp")), "6 must be a multiple of 4"),
        ((("bias", (None, "tensor")), (".*", "fsdp")), "more entries"),
        ((("kernel", ("tensr",)), (".*", "fsdp")), "did you mean 'tensor'"),
        ((("kernel", ("tensor", "tensor")), (".*", "fsdp")), "twice"),
    ],
)
def test_bad_rules_are_refused(rules, told):
    mesh = sharding.make_mesh(fsdp=2, tensor=4)
    shapes = {"a": {"kernel": _shape(8, 8), "bias": _shape(6)}}
    assert told in _refused(sharding.infer, shapes, rules, mesh)


def test_batches_are_split_over_data_and_fsdp():
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    batch = {"image": np.arange(8 * 3, dtype=np.float32).reshape(8, 3), "mask": np.arange(8) % 2 == 0}
    placed = sharding.put_batch(batch, sharding.batch_sharding(mesh), 8)
    for name, array in placed.items():
        np.testing.assert_array_equal(array, batch[name])
        assert array.dtype == batch[name].dtype
        assert {shard.data.shape[0] for shard in array.addressable_shards} == {2}
    assert sharding.replicated(mesh) == NamedSharding(mesh, PartitionSpec())


def test_batch_size_is_checked():
    mesh = sharding.make_mesh(fsdp=2)
    for good in (8, 64):
        sharding.check_batch(good, mesh)
    told = _refused(sharding.check_batch, 12, mesh)
    assert "batch_size=12 must be a multiple of 8 (data x fsdp devices)" in told and "8 or 16" in told
    assert "use 8" in _refused(sharding.check_batch, 3, mesh)
    for bad in (0, -8, 8.0, True, "8"):
        assert ">= 1" in _refused(sharding.check_batch, bad, mesh)


def test_a_sharded_step_equals_the_unsharded_one():
    key = jax.random.key(0)
    params = {"kernel": jax.random.normal(key, (256, 512))}
    x = np.asarray(jax.random.normal(jax.random.fold_in(key, 1), (16, 256)))

    def step(params, x):
        return jax.grad(lambda p: jnp.mean(jnp.tanh(x @ p["kernel"]) ** 2))(params)

    expected = jax.jit(step)(params, x)["kernel"]
    mesh = sharding.make_mesh(data=2, fsdp=4)
    placed = jax.device_put(params, sharding.infer(params, ((".*", "fsdp"),), mesh))
    assert {s.data.shape for s in placed["kernel"].addressable_shards} == {(256, 128)}
    got = jax.jit(step)(placed, sharding.put_batch(x, sharding.batch_sharding(mesh), 16))["kernel"]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-7)


def test_abstract_carries_shape_dtype_and_sharding():
    mesh = sharding.make_mesh(fsdp=8)
    shapes = {"a": jax.ShapeDtypeStruct((512, 512), jnp.bfloat16)}
    shardings = sharding.infer(shapes, ((".*", "fsdp"),), mesh)
    out = sharding.abstract(shapes, shardings)["a"]
    assert (out.shape, out.dtype, out.sharding) == ((512, 512), jnp.bfloat16, shardings["a"])


def test_rows_are_split_where_a_mesh_is_set_and_the_batch_divides():
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    split = jax.jit(sharding.split_rows(lambda x: rows(x) * 2, mesh))
    x = jax.device_put(jnp.ones((8, 6)), NamedSharding(mesh, PartitionSpec(None, "fsdp")))
    assert split(x).sharding.spec[0] == ("data", "fsdp")
    assert split(x[:3]).shape == (3, 6)  # cannot be split
    assert jax.make_jaxpr(rows)(x).eqns == []


def _moved(c) -> tuple[float, float]:
    """Bytes that the gradient of a config's loss moves between eight devices, and bytes of its weights."""
    run = abstract(c, jax.devices())
    shardings = jax.tree.map(lambda a: a.sharding, run.state.params)
    key = jax.random.key(0)
    loss = lambda p, batch: run.task.loss(p, run.task.encode(run.frozen, batch), key)[0]  # noqa: E731
    gradient = sharding.split_rows(jax.grad(loss), run.mesh)
    compiled = jax.jit(gradient, out_shardings=shardings).lower(run.state.params, run.batch).compile()
    weights = sum(4 * a.size for a in jax.tree.leaves(run.state.params))
    return sum(one.bytes for one in read_hlo(compiled.as_text()).collectives), weights


def test_a_gradient_moves_weights_and_never_activations():
    """Else XLA splits features over fsdp, as the embedding table is, and sums activations in every layer."""
    c = config.load_config("configs/shapes/clip.py:tiny")
    with c.unlocked():
        c.batch_size, c.mesh.fsdp = 2048, 8
        tower = dict(width=256, layers=2, heads=4)
        c.model.update(vision={**c.model.vision, **tower}, text={**c.model.text, **tower})
        c.tokenizer.update(vocab_size=512, max_len=16)
    moved, weights = _moved(c)
    layer = 4 * (c.batch_size // 8) * 16 * 256  # activations of one device in one layer
    assert layer > weights / 8
    assert moved < 5 * weights


@pytest.mark.slow
def test_resampled_activations_stay_where_they_are():
    """Else XLA splits the pixels that upsampling repeats, and gathers the whole batch on each device."""
    c = config.load_config("configs/shapes/upsampler.py:tiny")
    with c.unlocked():
        c.batch_size, c.mesh.fsdp = 512, 8
        c.model.update(channels=64, multipliers=(1, 2), groups=8)
    moved, weights = _moved(c)
    assert moved < 5 * weights
