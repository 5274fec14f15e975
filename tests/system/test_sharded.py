"""A step on eight devices, however the mesh divides them, is the step on one."""

import jax
import numpy as np
import optax
import pytest

from tests import tiny_runs
from unclip_jax import sharding
from unclip_jax.data import loader
from unclip_jax.train_step import compile_step, make_train_step

MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2)]
# Inner widths of transformer blocks and of residual blocks over the axis "tensor", where the mesh has one.
MLP, CONV = (r"blocks/fc1/kernel$", (None, None, "tensor")), (r"conv1/kernel$", (None, None, None, "tensor"))
TENSOR = {"clip": [MLP], "prior_diffusion": [MLP], "prior_ar": [MLP], "decoder": [MLP, CONV], "upsampler": [CONV]}
STEPS = 5


def run_steps(run, tx, mesh) -> tuple:
    """The state after a few steps from one and the same start, each step's metrics, and the state's shardings."""
    host = tiny_runs.state(run)
    host = host._replace(opt=jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), jax.eval_shape(tx.init, host.params)))
    tensor = TENSOR[run.config.task] if mesh.shape["tensor"] > 1 else []
    shardings = sharding.infer(host, [*tensor, (".*", "fsdp")], mesh, min_size=1)
    state = jax.device_put(host, shardings)
    frozen = jax.device_get(run.frozen)
    frozen = jax.device_put(frozen, sharding.infer_frozen(frozen, mesh, min_size=1))
    step = make_train_step(run.task, tx, 0.9, seed=3)
    step = compile_step(step, mesh, shardings)
    stream = loader.batches(run.source, run.tokenizer, 8, seed=1)
    metrics = []
    for index in range(STEPS):
        batch = sharding.put_batch(next(stream), sharding.batch_sharding(mesh), 8)
        state, told = step(state, frozen, batch, index)
        metrics.append(jax.device_get(told))
    return state, metrics


@pytest.mark.parametrize("stage", tiny_runs.STAGES_SLOWLY)
def test_sharded_is_unsharded(stage):
    run = tiny_runs.make(stage)
    # Not Adam: its step is g / |g| at first, which makes rounding of gradients that are 0 as large as any.
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9))
    expected, told = run_steps(run, tx, sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1]))
    expected = jax.device_get(expected)
    assert told[0]["grad_norm"] > 1e-3
    for sizes in MESHES:
        mesh = sharding.make_mesh(*sizes)
        state, metrics = run_steps(run, tx, mesh)
        check_split(state, mesh)
        for step in range(STEPS):
            for name, value in told[step].items():
                np.testing.assert_allclose(metrics[step][name], value, rtol=1e-5, atol=1e-5, err_msg=f"{sizes} {name}")

        def compare(path, leaf, wanted, sizes=sizes):
            np.testing.assert_allclose(leaf, wanted, rtol=1e-5, atol=1e-5, err_msg=f"{sizes} {path}")

        jax.tree_util.tree_map_with_path(compare, jax.device_get(state), expected)


def check_split(state, mesh):
    """Most bytes of parameters, average and momentum are divided as the mesh says; none where it has one such part."""
    for tree in (state.params, state.ema, state.opt):
        leaves = jax.tree.leaves(tree)
        whole = sum(a.nbytes for a in leaves)
        held = sum(a.addressable_shards[0].data.nbytes for a in leaves)
        parts = mesh.shape["fsdp"]
        assert held == whole if parts == 1 else held < whole * (1 / parts + 0.2)
    axes = {axis for a in jax.tree.leaves(state.params) for axis in jax.tree.leaves(tuple(a.sharding.spec))}
    assert axes == {name for name in ("fsdp", "tensor") if mesh.shape[name] > 1}
