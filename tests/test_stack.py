"""A stack's weights as they come to the device that draws with them."""

import json
import shutil

import jax
import numpy as np
import pytest

from tests import tiny_stack
from unclip_jax import sharding, tasks, weights
from unclip_jax.errors import UserError
from unclip_jax.nn import drawing
from unclip_jax.stack import open_stack
from unclip_jax.weights import load_stack, save_stack


def test_for_a_gpu_the_host_cuts_and_joins_the_layers(monkeypatch):
    monkeypatch.setattr(drawing, "platform", lambda: "gpu")
    put, given = jax.device_put, []
    monkeypatch.setattr(drawing.jax, "device_put", lambda a, *where: given.extend([a][: len(where)]) or put(a, *where))
    opened = open_stack(tiny_stack.path())
    stored = load_stack(tiny_stack.path(), ["prior", "decoder"]).stages
    for stage in ("prior", "decoder"):
        del given[:]
        params, wanted = opened.params[stage], drawing.layers_apart(stored[stage].params, join=True)
        assert all(type(a) is np.ndarray for a in given) and len(given) == len(jax.tree.leaves(wanted))
        jax.tree.map(np.testing.assert_array_equal, params, wanted)
    assert "block0" in opened.params["prior"]["net"]["transformer"]
    assert params["net"]["stem"]["kernel"].format.layout.major_to_minor == (3, 0, 1, 2)


@pytest.mark.parametrize("change", [{"data": {"size": 64}}, {"objective": {"factor": 4}}])
def test_an_upsampler_that_does_not_follow_the_decoder_is_refused(change, tmp_path):
    stack = load_stack(tiny_stack.path())
    stages = {name: list(stage) for name, stage in stack.stages.items()}
    config = stages["upsampler"][1] = stages["upsampler"][1].copy_and_resolve_references()
    with config.unlocked():
        config.update(change)
    save_stack(tmp_path / "s", stages, stack.tokenizer_json)
    with pytest.raises(UserError, match="upsampler makes .* pixels of 16, and was made for"):
        open_stack(tmp_path / "s")


@pytest.mark.parametrize(
    ("stage", "key", "value"),
    [
        ("prior", "sampler", 0), ("upsampler", "data", 1.5), ("clip", "model", {"a": 1}),
        ("decoder", "objective", ["a"]),
        ("decoder", "diffusion", {"name": "cosine", "num_steps": 2**50}), ("prior", "task", None), ("clip", None, []),
    ],
    ids=str,
)  # fmt: skip
def test_configs_of_others_that_make_no_stage_are_refused(tmp_path, stage, key, value):
    shutil.copytree(tiny_stack.path(), tmp_path / "s")
    index = json.loads((tmp_path / "s/stack.json").read_text())
    if key is None:
        index["stages"][stage]["extra"] = value
    else:
        index["stages"][stage]["config"][key] = value
    (tmp_path / "s/stack.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="stack|does not fit its network"):
        open_stack(tmp_path / "s")


def test_for_a_cpu_layers_are_cut_and_nothing_else():
    params, stored = open_stack(tiny_stack.path()).params["prior"], load_stack(tiny_stack.path(), ["prior"])
    jax.tree.map(np.testing.assert_array_equal, params, drawing.layers_apart(stored.stages["prior"].params))


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
def test_shapes_are_those_of_the_weights(monkeypatch, backend, dtype):
    monkeypatch.setattr(drawing, "platform", lambda: backend)
    order = lambda a: a.format.layout.major_to_minor  # noqa: E731
    params = open_stack(tiny_stack.path(), dtype).params
    for where in (jax.local_devices()[0], sharding.replicated(sharding.make_mesh())):
        for stage in params:
            told, read = params.shapes(stage, where), params.read(stage, where)
            assert jax.tree.structure(told) == jax.tree.structure(read)
            for a, b in zip(jax.tree.leaves(told), jax.tree.leaves(read), strict=True):
                assert (a.shape, a.dtype, a.sharding) == (b.shape, b.dtype, b.sharding)
                assert a.format.layout is None or order(a) == order(b)
    kernel = params.shapes("decoder", jax.local_devices()[0])["net"]["stem"]["kernel"]
    assert (kernel.format.layout is not None) == (backend == "gpu")


def test_a_stage_of_a_bundled_stack_is_found_by_the_stacks_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shapes = weights.bundled()["shapes"]
    assert tasks.load_stage("shapes", "clip").step == tasks.load_stage(shapes, "clip").step
    (tmp_path / "shapes").mkdir()  # of pictures, maybe
    assert weights.located("shapes") == shapes and open_stack("shapes").params
    (tmp_path / "shapes" / "checkpoints").mkdir()  # a run of one's own comes first, and so does a stack
    with pytest.raises(UserError, match="holds no finished checkpoint"):
        tasks.load_stage("shapes", "clip")
    with pytest.raises(UserError, match="is the workdir of one training run"):
        open_stack("shapes")
    (tmp_path / "shapes" / "stack.json").touch()
    with pytest.raises(UserError, match="malformed"):
        open_stack("shapes")
