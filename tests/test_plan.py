"""FLOPs against closed forms, HLO traffic against what was written, memory against what devices hold."""

import contextlib
import dataclasses
import os
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from tests import bad_configs, tiny_runs, toy
from unclip_jax import cli, cost, optim, sharding, tasks
from unclip_jax.cost import Collective, count_flops, count_gradient, read_hlo
from unclip_jax.errors import UserError
from unclip_jax.nn.transformer import Transformer
from unclip_jax.plan import chips, steps
from unclip_jax.plan import search as searching
from unclip_jax.plan.abstract import abstract
from unclip_jax.plan.search import search
from unclip_jax.plan.table import ranking, table


def shape(*dims):
    return jax.ShapeDtypeStruct(dims, jnp.float32)


def test_flops_of_products_and_convolutions():
    assert count_flops(jnp.matmul, shape(5, 7, 3), shape(5, 3, 11)) == 2 * 5 * 7 * 3 * 11
    assert count_flops(lambda a, b: a @ b @ b, shape(4, 6), shape(6, 6)) == 2 * 2 * 4 * 6 * 6

    def conv(x, w):
        return jax.lax.conv_general_dilated(x, w, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    x, w = shape(2, 8, 8, 3), shape(3, 3, 3, 5)
    forward = 2 * (2 * 4 * 4 * 5) * (3 * 3 * 3)
    assert count_flops(conv, x, w) == forward
    gradient = count_flops(jax.grad(lambda x, w: conv(x, w).sum(), (0, 1)), x, w)
    assert 2 * forward <= gradient <= 3 * forward * 1.2  # both gradients cost what the forward pass does, at least


def test_loops_count_as_often_as_they_run():
    """A scanned Transformer has the FLOPs of its layers one by one, and of the closed form."""
    width, heads, length, layers, batch = 32, 2, 10, 6, 3
    x = shape(batch, length, width)

    def flops(count):
        net = Transformer(width, count, heads)
        params = jax.eval_shape(net.init, jax.random.key(0), x)
        return count_flops(lambda params, x: net.apply(params, x), params, x)

    tokens = batch * length
    one = 2 * tokens * width * width * 12 + 2 * 2 * tokens * length * width
    assert flops(layers) == layers * flops(1) == layers * one


def test_branches_count_the_dearest_and_recomputation_counts():
    a = shape(8, 8)
    one = 2 * 8**3
    both = lambda x: jax.lax.cond(x[0, 0] > 0, lambda: x @ x @ x, lambda: x @ x)  # noqa: E731
    assert count_flops(both, a) == 2 * one
    f = lambda x: jnp.sin(jnp.sin(x @ x) @ x).sum()  # noqa: E731
    assert count_flops(jax.grad(jax.checkpoint(f)), a) > count_flops(jax.grad(f), a)


def test_a_gradient_is_counted_with_what_it_keeps():
    """Of tanh(x w) v: x and the hidden units, whose values give the slope of tanh too; parameters are not counted."""
    loss = lambda p, x: (jnp.tanh(x @ p["w"]) @ p["v"]).sum()  # noqa: E731
    flops, kept = count_gradient(loss, {"w": shape(5, 7), "v": shape(7, 3)}, shape(2, 5))
    first, second = 2 * 2 * 5 * 7, 2 * 2 * 7 * 3
    assert flops == 2 * first + 3 * second  # nobody asks for the gradient by x
    assert 4 * 2 * (5 + 7) <= kept <= 4 * 2 * (5 + 2 * 7)


HLO = """HloModule m, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%body.1 (p.1: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %p.1 = (s32[], bf16[4,8]{1,0}) parameter(0)
  %g.1 = bf16[4,8]{1,0:T(8,128)(2,1)} get-tuple-element(%p.1), index=1
  %ag.1 = bf16[16,8]{1,0} all-gather(%g.1), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  %f.1 = bf16[4,8]{1,0} fusion(%ag.1, %g.1), kind=kLoop, calls=%fused
  ROOT %t.1 = (s32[], bf16[4,8]{1,0}) tuple(%c.1, %f.1)
}

ENTRY %main.1 (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %start = f32[8]{0} all-reduce-start(%x), replica_groups={{0,1},{2,3}}, to_apply=%add
  %done = f32[8]{0} all-reduce-done(%start)
  %cps = (f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%done), source_target_pairs={{0,1},{1,0}}
  %cpd = f32[8]{0} collective-permute-done(%cps)
  %w = (s32[], bf16[4,8]{1,0}) while(%init), condition=%cond, body=%body.1, backend_config={"known_trip_count":{"n":"24"}}
  ROOT %out = f32[8]{0} add(%cpd, %x)
}
"""  # noqa: E501


def test_traffic_of_a_written_program():
    found = read_hlo(HLO)
    rows = {(c.kind, c.group): (c.count, c.bytes) for c in found.collectives}
    assert rows[("all-gather", 4)] == (24, 24 * 16 * 8 * 2)
    assert rows[("all-reduce", 2)] == (1, 32)
    assert rows[("collective-permute", 2)][0] == 1 and 32 <= rows[("collective-permute", 2)][1] <= 40
    loop = 24 * ((16 * 8 + 4 * 8) * 2 + (4 * 8 + 16 * 8 + 4 * 8) * 2)
    assert found.bytes >= loop + 3 * 32  # and the transfers outside it
    named = HLO.replace("[2,4]<=[8]", "mesh['a'=4,'b'=8] {'a','b':(2)2}")
    assert {c.group for c in read_hlo(named).collectives if c.kind == "all-gather"} == {8}
    assert Collective("all-reduce", 4, 1, 100.0).wire_bytes == 2 * 100 * 3 / 4
    assert Collective("reduce-scatter", 4, 1, 25.0).wire_bytes == 100 * 3 / 4
    assert Collective("all-gather", 4, 1, 100.0).wire_bytes == Collective("all-to-all", 4, 1, 100.0).wire_bytes == 75
    assert Collective("collective-permute", 4, 1, 100.0).wire_bytes == 100
    assert Collective("all-reduce", 0, 1, 100.0).wire_bytes == 0  # among how many was not told


@pytest.mark.parametrize("kind", cost.BYTES)
def test_elements_have_their_size(kind):
    kinds = {"pred": "bool", "c64": "complex64", "c128": "complex128"}
    letters = {"bf": "bfloat", "f": "float", "s": "int", "u": "uint"}
    head = kind.rstrip("0123456789")
    name = kinds.get(kind) or (f"float8_{kind[2:]}" if kind[:3] == "f8e" else letters[head] + kind[len(head):])
    size = 1 / 2 if kind in ("s4", "u4") else jnp.dtype(name).itemsize
    text = f"ENTRY %main (x: {kind}[3,<=5]) -> {kind}[3,<=5] {{\n  %a = {kind}[3,<=5] all-to-all(%x), channel_id=1\n}}"
    assert read_hlo(text) == (15 * size, (Collective("all-to-all", 0, 1, 15 * size),))


CALLS = """HloModule m

%twice (a: f32[4]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  %n = f32[4]{0} negate(%a)
  ROOT %r = f32[4]{0} all-reduce(%n), replica_groups=[2,4]<=[8], to_apply=%add
}

%once (b: f32[4]) -> f32[4] {
  %b = f32[4]{0} parameter(0)
  ROOT %n = f32[4]{0} negate(%b)
}

%wrapped (c: f32[2]) -> f32[8] {
  %c = f32[2]{0} parameter(0)
  ROOT %g = f32[8]{0} all-gather(%c), replica_groups=[2,4]<=[8], dimensions={0}
}

%wrapped.2 (d: f32[2]) -> f32[8] {
  %d = f32[2]{0} parameter(0)
  ROOT %g = f32[8]{0} all-gather(%d), replica_groups=[2,4]<=[8], dimensions={0}
}

%outer (e: f32[2]) -> f32[8] {
  %e = f32[2]{0} parameter(0)
  ROOT %w = f32[8]{0} fusion(%e), kind=kCustom, calls=%wrapped.2
}

ENTRY %main (x: f32[4], i: s32[], y: f32[2]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  %i = s32[] parameter(1)
  %y = f32[2]{0} parameter(2)
  %cond = f32[4]{0} conditional(%i, %x, %x), branch_computations={%once, %twice}
  %when = f32[4]{0} conditional(%p, %x, %x), true_computation=%twice, false_computation=%once
  %call = f32[4]{0} call(%when), to_apply=%twice
  %gs = (f32[2]{0}, f32[8]{0}) all-gather-start(%y), replica_groups=[2,4]<=[8], dimensions={0}
  %gd = f32[8]{0} all-gather-done(%gs)
  %as = ((f32[2]{0}), f32[8]{0}, u32[]) async-start(%y), calls=%wrapped
  %ad = f32[8]{0} async-done(%as)
  %t = (f32[4]{0}, f32[2]{0}) tuple(%x, %y)
  %e = f32[4]{0} get-tuple-element(%t), index=0
  %b = f32[2,2]{1,0} bitcast(%e)
  ROOT %f = f32[8]{0} fusion(%y), kind=kCustom, calls=%outer
}
"""


def test_what_is_called_counts_and_of_a_condition_the_dearest_branch():
    """Collectives without a channel are one each; a start holds its operand beside its result."""
    found = read_hlo(CALLS)
    assert found.collectives == (Collective("all-gather", 4, 3, 3 * 32), Collective("all-reduce", 4, 3, 3 * 16))
    starts = (8 + 32 + 8) + (8 + 32 + 4 + 8)  # results and what is read; a counter is among the second's
    assert found.bytes == 3 * 2 * (16 + 16) + starts + (32 + 8)


@pytest.mark.parametrize("turned", [False, True])
def test_of_a_compiled_condition_the_dearest_branch_counts(turned):
    """As in a train step, of which the branch that changes nothing comes first."""
    ways = [lambda x: x, lambda x: jnp.tanh(x @ x) @ x]
    both = jax.jit(lambda which, x: jax.lax.cond(which, *ways[:: -1 if turned else 1], x))
    text = both.lower(True, shape(64, 64)).compile().as_text()
    assert read_hlo(text).bytes > 3 * 2 * 64 * 64 * 4


TPU = """HloModule m

%all-reduce-scatter.3 (input: f32[16,8]) -> f32[4,8] {
  %input = f32[16,8]{1,0} parameter(0)
  %ar = f32[16,8]{1,0} all-reduce(%input), channel_id=7, replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %ds = f32[4,8]{1,0} dynamic-slice(%ar, %c), dynamic_slice_sizes={4,8}
}

%begin (p: bf16[4,8]) -> (bf16[16,8]) {
  %p = bf16[4,8]{1,0} parameter(0)
  %ag.1 = bf16[16,8]{1,0} all-gather(%p), channel_id=3, replica_groups=mesh['a'=4] {'a'}, dimensions={0}
  ROOT %s = (bf16[16,8]{1,0}) custom-call(%ag.1), custom_call_target="AsyncCollectiveStart"
}

%end (p: bf16[16,8]) -> bf16[16,8] {
  %p = bf16[16,8]{1,0} parameter(0)
  %ag.2 = bf16[16,8]{1,0} all-gather(%p), channel_id=3, replica_groups=mesh['a'=4] {'a'}, dimensions={0}
  ROOT %d = bf16[16,8]{1,0} custom-call(%ag.2), custom_call_target="AsyncCollectiveDone"
}

%cond (p: (s32[], bf16[4,8])) -> pred[] {
  %bound = s32[]{:T(128)} constant(24)
  %p = (s32[]{:T(128)}, bf16[4,8]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %bound), direction=LT
}

%body (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %p = (s32[], bf16[4,8]{1,0}) parameter(0)
  %g = bf16[4,8]{1,0} get-tuple-element(%p), index=1
  %f1 = (bf16[16,8]{1,0}) fusion(%g), kind=kCustom, calls=%begin
  %f2 = bf16[16,8]{1,0} fusion(%f1), kind=kCustom, calls=%end
  %f3 = f32[4,8]{1,0} fusion(%f2), kind=kCustom, calls=%all-reduce-scatter.3
  ROOT %t = (s32[], bf16[4,8]{1,0}) tuple(%i, %g)
}

ENTRY %main (x: bf16[4,8]) -> bf16[4,8] {
  %x = bf16[4,8]{1,0} parameter(0)
  %w = (s32[], bf16[4,8]{1,0}) while(%init), condition=%cond, body=%body
  ROOT %out = bf16[4,8]{1,0} get-tuple-element(%w), index=1
}
"""


def test_what_a_tpus_compiler_hides_is_found_once_for_each_round_of_the_loop():
    rows = {(c.kind, c.group): (c.count, c.bytes) for c in read_hlo(TPU).collectives}
    assert rows == {("all-gather", 4): (24, 24 * 16 * 8 * 2), ("reduce-scatter", 4): (24, 24 * 4 * 8 * 4)}


def test_collectives_of_a_compiled_program():
    """Eight simulated devices: a scan of 5 products with weights split over them gathers or reduces 5 times."""
    mesh = sharding.make_mesh(fsdp=8, data=1)
    weights = jax.ShapeDtypeStruct(
        (5, 64, 64), jnp.float32, sharding=jax.NamedSharding(mesh, jax.P(None, "fsdp")))  # fmt: skip
    x = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=jax.NamedSharding(mesh, jax.P("fsdp")))
    run = jax.jit(lambda x, w: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0])
    found = read_hlo(run.lower(x, weights).compile().as_text())
    assert sum(c.count for c in found.collectives) % 5 == 0 and found.collectives
    assert {c.group for c in found.collectives} == {8}


@pytest.mark.parametrize("stage", tiny_runs.STAGES_SLOWLY)
def test_held_bytes_are_those_that_a_device_holds(stage):
    """The abstract run against a real state under the same shardings."""
    config = tiny_runs.config(stage, mesh__fsdp=4)
    clip = tiny_runs.config("clip") if stage in tiny_runs.WITH_CLIP else None
    run = abstract(config, jax.devices(), clip)
    state = jax.tree.map(lambda a: jax.device_put(np.zeros(a.shape, a.dtype), a.sharding), run.state)
    device = jax.devices()[3]
    real = sum(s.data.nbytes for a in jax.tree.leaves(state) for s in a.addressable_shards if s.device == device)
    counts = steps.count_train(run)
    report = steps.plan_train(run, "h100", compiled=False, counts=counts)
    assert sum(report.held[k] for k in ("parameters", "average", "optimizer")) == real - 4  # but for the step
    assert 0 < report.model_flops <= report.flops and report.peak > real and report.fits
    alike = abstract(config, 8, clip)
    assert steps.plan_train(alike, "h100", compiled=False, counts=counts).held == report.held
    assert jax.tree.map(np.shape, abstract(config, 8, clip, like=run).state) == jax.tree.map(np.shape, alike.state)


@pytest.mark.parametrize("stage", [stage for stage in tiny_runs.STAGES if stage != "clip"])
def test_a_stage_is_drawn_as_in_a_stack(stage):
    """From its caption and what the stage before drew, at full size; CLIP's image tower has nothing to say."""
    clip, config = tiny_runs.config("clip"), tiny_runs.config(stage)
    if stage == "upsampler":
        config.loader.crop = 8
    run = abstract(config, 1, clip if stage in tiny_runs.WITH_CLIP else None)
    teacher, b = tasks.make(clip).model, config.batch_size
    length, wide = teacher.text["max_len"], shape(b, teacher.embed_dim)
    tokens, mask = jax.ShapeDtypeStruct((b, length), jnp.int32), jax.ShapeDtypeStruct((b, length), jnp.bool_)
    rows, asked = {"low": shape(b, 16 // run.task.factor, 16 // run.task.factor, 3)} if stage == "upsampler" else {}, 0
    if stage in tiny_runs.WITH_CLIP:
        ask = lambda params, *caption: teacher.apply({"params": params}, *caption, method="embed_text")  # noqa: E731
        asked = count_flops(ask, run.frozen["clip"], tokens, mask)
        states = shape(b, length, teacher.text["width"])
        rows = {"tokens": tokens, "mask": mask, "z_txt": wide, "states": states, "z_img": wide}

    def draw(params, rows):
        return run.task.sample(params, rows, jax.random.split(jax.random.key(0), b))

    report = steps.plan_sample(run, "h100", compiled=False)
    assert report.flops == asked + count_flops(draw, run.state.averaged, rows) > asked
    drawn = jax.eval_shape(draw, run.state.averaged, rows).shape
    assert drawn == ((b, 16, 16, 3) if stage in ("decoder", "upsampler") else wide.shape)


@pytest.mark.parametrize("stage, caption", [("prior_diffusion", "tokens"), ("prior_ar", "states")])
def test_a_prior_of_embeddings_has_no_pictures_to_encode(stage, caption):
    """Its batches are what CLIP says of pictures, which costs nothing any more, though CLIP's weights are held."""
    clip, config = tiny_runs.config("clip"), tiny_runs.config(stage)
    with config.unlocked():
        config.model.update(caption=caption)
        if caption == "states":
            config.model.text = None
        pictures = abstract(config, 1, clip)
        config.data.source = "embeddings"
        run = abstract(config, 1, clip)
        config.data.update(source="mixture", parts=({"source": "embeddings", "path": "a", "weight": 1.0},))
        assert abstract(config, 1, clip).batch == run.batch
    said = jax.eval_shape(pictures.task.encode, pictures.frozen, pictures.batch)
    left_out = ("image", "states") if caption == "tokens" else ("image",)
    kinds = lambda batch: {name: (a.shape, a.dtype) for name, a in batch.items()}  # noqa: E731
    assert kinds(run.batch) == kinds({name: a for name, a in said.items() if name not in left_out})
    encode = count_flops(pictures.task.encode, pictures.frozen, pictures.batch)
    with_pictures, without = (steps.count_train(one, residuals=False) for one in (pictures, run))
    assert without.flops == with_pictures.flops - encode < with_pictures.flops
    reports = [steps.plan_train(one, "h100", False, counts=without) for one in (pictures, run)]
    assert reports[0].held == reports[1].held and reports[0].peak > reports[1].peak


def test_embeddings_are_for_priors():
    config = tiny_runs.config("decoder")
    config.data.source = "embeddings"
    with pytest.raises(UserError, match="priors only"):
        abstract(config, 1, tiny_runs.config("clip"))


def test_sharpness_aware_steps_hold_the_place_above():
    """As many bytes more as the parameters have that the second gradient is taken at."""
    plain, sharp = tiny_runs.config("clip"), tiny_runs.config("clip")
    with sharp.unlocked():
        sharp.optim.sam_rho = 0.1
    counts = steps.Counts(1.0, 1.0, 1.0)
    runs = [abstract(config, 1) for config in (plain, sharp)]
    peaks = [steps.plan_train(run, "h100", compiled=False, counts=counts).peak for run in runs]
    places = []
    gradient = lambda params: places.append(params) or (0.0, params)  # noqa: E731
    jax.eval_shape(optim.sharpness_aware(gradient, 0.1), runs[1].state.params)
    assert peaks[1] - peaks[0] == sum(4 * a.size for a in jax.tree.leaves(places[1])) and len(places) == 2


def test_what_a_program_does_not_read_is_held_all_the_same():
    place = jax.NamedSharding(sharding.make_mesh(devices=jax.devices()[:1]), jax.P())
    read, idle = (jax.ShapeDtypeStruct((size,), jnp.float32, sharding=place) for size in (1000, 5000))
    base = steps.Report("sample", 1, "v5e", {}, 1, True, 1.0, 1.0, {}, None, 1e9)
    double = lambda given: 2 * given["read"]  # noqa: E731
    alone, beside = (steps._compile(base, jax.jit(double), (args,)).peak
                     for args in ({"read": read}, {"read": read, "idle": idle}))  # fmt: skip
    assert beside - alone == 4 * 5000 and alone >= 4 * 1000


@pytest.mark.slow
def test_a_compiled_step_reports_what_the_compiler_says():
    report = steps.plan_train(abstract(tiny_runs.config("clip"), jax.devices()), "v5e")
    assert report.peak and report.traffic and report.collectives and report.fits
    assert set(report.seconds) == {"compute", "memory", "links"} and 0 < report.mfu_ceiling < 1
    assert "fits" in table([report]) and "predicted" in table([report])


def test_quick_asks_less_of_the_compiler_while_it_lasts():
    """By what the jax at hand calls it."""

    def effort():
        names = ("exec_time_optimization_effort", "memory_fitting_effort", "optimization_level", "memory_fitting_level")
        return [getattr(jax.config, f"jax_{name}", None) for name in names]

    before = effort()
    with pytest.raises(KeyError), steps.quick():
        least = [-1.0, -1.0, *before[2:]] if before[0] is not None else [None, None, "O1", "O1"]
        assert effort() == least != before
        raise KeyError
    assert effort() == before


@pytest.mark.parametrize("known", [True, False])
def test_libtpu_finds_its_variables_while_it_is_asked_and_they_are_unset_again(known, monkeypatch):
    """Those that were set keep their values throughout, also where libtpu does not know the slice."""
    for name in chips.LIBTPU:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TPU_ACCELERATOR_TYPE", "v6e-8")
    before, seen = dict(os.environ), {}

    def describe(**_):
        seen.update(os.environ)
        if not known:
            raise RuntimeError("no such slice")
        return SimpleNamespace(devices=["a chip"])

    monkeypatch.setattr(topologies, "get_topology_desc", describe)
    with contextlib.nullcontext() if known else pytest.raises(UserError, match="no such slice"):
        assert chips.tpu_devices("v5e:1x1") == ("v5e", ["a chip"])
    assert seen == {**chips.LIBTPU, **before} and os.environ == before


def run_cli(capsys, *argv):
    code = cli.main(["plan", *map(str, argv)])
    return code, *capsys.readouterr()


@pytest.mark.slow
def test_the_command_plans_the_papers_prior_on_gpus(capsys, tmp_path):
    out = tmp_path / "plan.json"
    code, said, _ = run_cli(
        capsys, "--config", "configs/dalle2/prior_diffusion.py", "--device", "h100:64", "--out", out)  # fmt: skip
    assert code == 0 and "rough estimate" in said and "fits" in said and out.is_file()
    code, said, _ = run_cli(capsys, "--config", "configs/dalle2/clip.py", "--device", "h100:8")
    assert code == 1 and "DOES NOT FIT" in said


def test_the_exit_code_tells_of_every_step(capsys, monkeypatch):
    planned, argv = steps.plan_sample, ("--config", "configs/shapes/upsampler.py:tiny", "--device", "h100:1")
    assert run_cli(capsys, *argv, "--what", "both")[0] == 0
    monkeypatch.setattr(steps, "plan_sample", lambda *args: dataclasses.replace(planned(*args), peak=1e12))
    code, said, _ = run_cli(capsys, *argv, "--what", "both")
    assert code == 1 and said.count("DOES NOT FIT") == 1
    assert said.rstrip().endswith("what would help: more devices in mesh.fsdp, a smaller batch_size")


BAD = {
    "topology": (["--topology", "v5q:4x4"], "CHIP one of v4, v5e"),
    "shape": (["--topology", "v5e:4by4"], "such as v5e:4x4"),
    "flat": (["--topology", "v5p:4x4"], "'v5p:4x4' is no slice of v5p, which have 3 sides of 1, 2, 4, 8, 12, … chips"),
    "deep": (["--topology", "v6e:8x16x2"], "is no slice of v6e, which have 2 sides of 1, 2, 4, 8, 16 chips"),
    "odd": (["--topology", "v5p:4x8x7"], "such as v5p:4x8x8"),
    "slices of GPUs": (["--device", "h100:8", "--slices", "2"], "--slices 2 joins TPU slices, and --device names GPUs"),
    "gpu": (["--device", "h100x8"], "did you mean 'h100'"),
    "count": (["--device", "h100:0"], "GPU or GPU:COUNT"),
    "neither": ([], "required"),
    "search of drawing": (["--device", "h100:8", "--search", "--what", "sample"], "--search tries train steps"),
    "batch": (["--device", "h100:12", "--config.mesh.fsdp=12"], "batch_size=4096 must be a multiple of 12"),
    "config": (["--device", "h100:8", "--config.keep=0"], "keep=0 must be a whole number >= 1"),
    "clip": (["--device", "h100:8", "--clip", "configs/dalle2/decoder.py"], "--clip configs"),
}


# What the data, the weights or the memory tell; in place of a trained CLIP a plan asks for its config.
UNTOLD = {"split", "eval split", "no tokenizer", "no clip", "clip missing", "too large"}
REFUSED = {case: bad for case, bad in bad_configs.BAD.items() if case not in UNTOLD}


@pytest.mark.parametrize(("stage", "changes", "words"), REFUSED.values(), ids=REFUSED)
def test_what_training_refuses_is_not_planned(stage, changes, words, monkeypatch):
    toy.add(monkeypatch)
    with pytest.raises(UserError, match=words):
        steps.count_train(abstract(bad_configs.changed(stage, changes), 8, tiny_runs.config("clip")))


def test_a_plan_asks_neither_for_data_nor_for_weights():
    config = bad_configs.changed("prior_diffusion", {"clip": "no/run", "init": "no/run", "track": "a project"})
    with config.unlocked():
        config.data = {"source": "folder", "path": "none", "split": "train", "size": 16}
    assert abstract(config, 8, tiny_runs.config("clip")).batch["image"].shape == (8, 16, 16, 3)


@pytest.mark.parametrize("case", BAD)
def test_mistakes_are_one_line(case, capsys):
    argv, match = BAD[case]
    code, _, err = run_cli(capsys, "--config", "configs/dalle2/prior_diffusion.py", *argv)
    assert code == 2 and match in err and len(err.splitlines()) == 1


def test_the_command_leaves_the_environment_as_it_was(capsys, monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    before = dict(os.environ)
    assert run_cli(capsys, "--config", "configs/shapes/upsampler.py:tiny", "--device", "h100x8")[0] == 2
    assert os.environ == before


def test_a_search_says_what_no_mesh_helps():
    with pytest.raises(UserError, match="every.log=0"):
        search(tiny_runs.config("clip", every__log=0), 8, "h100")
    with pytest.raises(UserError, match="no mesh"):
        search(tiny_runs.config("clip", batch_size=7), 8, "h100")


def test_counts_follow_from_those_without_recomputation():
    """With a second gradient in each step."""
    config, clip = tiny_runs.config("prior_diffusion"), tiny_runs.config("clip")
    with config.unlocked():
        config.optim.sam_rho = 0.1
    plain, run = (abstract(tasks.with_policy(config, policy), 1, clip) for policy in ("none", "full"))
    plain = steps.count_train(plain)
    counts = steps.count_train(run, plain=plain)
    assert counts.flops == count_flops(run.step, *steps._step_args(run)) > plain.flops
    assert counts.model_flops == plain.model_flops and counts.residuals < plain.residuals


FLOPS, KEPT = {"none": 100, "dots": 103, "full": 133}, {"none": 90, "dots": 20, "full": 2}


@pytest.fixture
def counted(monkeypatch):
    """The runs that are counted, by given numbers a picture; nothing is traced for them."""
    runs = []

    def count(run, plain=None):
        size, (policy,) = run.config.batch_size, tasks.policies(run.config)
        assert (plain is None) == (policy == "none")
        runs.append(run)
        return steps.Counts(1e9 * size * FLOPS[policy], 1e11 * size, 1e6 * size * KEPT[policy])

    monkeypatch.setattr(searching, "count_train", count)
    return runs


@pytest.mark.slow
def test_a_search_ranks_what_fits_first(counted, monkeypatch):
    """Where all fits: the batch that was asked for, the least split, and nothing recomputed."""
    config = tiny_runs.config("clip", batch_size=32)
    reports = search(config, 8, "h100")
    assert len(counted) == 9 and len(reports) == 9 * 4 and all(r.fits for r in reports)
    places = [(r.batch_size, r.mesh["fsdp"], r.remat) for r in reports]
    quick = [(b, n, p) for b in (32, 16, 8) for n in (1, 2, 4, 8) for p in ("none", "dots")]
    assert places == quick + [(b, n, "full") for b in (32, 16, 8) for n in (1, 2, 4, 8)]
    told = ranking(reports).splitlines()
    assert len(told) == 22 and told[1].split()[:6] == ["1", "none", "8", "x", "1", "32"]
    assert "16 more, of which 16 fit" in told[-1]

    memory = reports[0].peak - 1e6 * 32 * (90 - 50) / 8  # less than 50 of a picture, or fewer pictures
    monkeypatch.setitem(chips.CHIPS, "h100", chips.CHIPS["h100"]._replace(memory=memory))
    reports = search(config, 8, "h100")
    assert [r.fits for r in reports] == [True] * 32 + [False] * 4
    assert all((r.batch_size, r.remat, r.fits) == (32, "none", False) for r in reports[32:])
    assert reports[0].remat == "dots" and "DOES NOT FIT" in ranking(reports, 40).splitlines()[-1]


def test_of_each_policy_the_best_is_compiled(counted, monkeypatch):
    """They come first, by what the compiler says: here that keeping is slower than computing again."""
    slow = {"none": 3e12, "dots": 2e12, "full": 1e12}
    moved = lambda r, *_: dataclasses.replace(r, peak=1.0, traffic=slow[r.remat], collectives=())  # noqa: E731
    monkeypatch.setattr(steps, "_compile", moved)
    reports = search(tiny_runs.config("clip"), jax.devices()[:2], "v5e")
    assert [r.compiled for r in reports] == [True] * 3 + [False] * (9 * 2 - 3)
    assert [r.remat for r in reports[:3]] == ["full", "dots", "none"]
    assert {(r.batch_size, r.mesh["fsdp"]) for r in reports[:3]} == {(8, 1)}


@pytest.mark.slow
@pytest.mark.tpu
def test_a_step_compiles_for_a_slice_that_is_not_here():
    pytest.importorskip("libtpu", reason="libtpu is not installed (extra [tpu])")
    chip, devices = chips.tpu_devices("v5e:2x2")
    report = steps.plan_train(abstract(tiny_runs.config("clip"), devices), chip)
    assert chip == "v5e" and report.devices == 4 and report.fits and report.collectives
