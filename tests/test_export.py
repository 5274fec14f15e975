"""export: from workdirs to a stack that draws, and refusal of stages that do not belong together."""

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from tests import tiny_stack
from unclip_jax import checkpoint, checkpoint_read, config, tasks
from unclip_jax.errors import UserError
from unclip_jax.evaluation import stages
from unclip_jax.export import _without_paths, collect
from unclip_jax.pipeline import UnCLIP
from unclip_jax.weights import load_stack, save_stack


def save(workdir, stage_config, params, tokenizer):
    meta = {"config": config.to_json(stage_config), "tokenizer": tokenizer and tokenizer.to_json()}
    with checkpoint.Checkpoints(workdir, async_=False) as saved:
        saved.save(7, {"params": jax.tree.map(np.zeros_like, params), "ema": params}, meta)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Workdirs as training leaves them: {name: path}, and a second CLIP that nothing was trained with."""
    root = tmp_path_factory.mktemp("runs")
    made, words = tiny_stack.configs(), tiny_stack.tokenizer()
    clip = tasks.make(made["clip"]).model
    params = {name: tiny_stack.weights(stage, clip) for name, stage in made.items()}
    for name in ("prior", "prior_ar", "decoder"):
        made[name].clip = str(root / "clip")
        made[name].clip_identity = tasks.clip_identity(params["clip"])
    made["glide"] = ConfigDict(made["decoder"].to_dict() | {"clip": "", "clip_identity": ""})
    made["glide"].model.embed_dim = 0
    params["glide"] = tiny_stack.weights(made["glide"])
    for name, stage in made.items():
        save(root / name, stage, params[name], None if name == "upsampler" else words)
    save(root / "other", made["clip"], tiny_stack.weights(made["clip"], seed=3), words)
    return {path.name: path for path in root.iterdir()}


@pytest.fixture(scope="module")
def stack(runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "stack"
    return collect(out, runs["clip"], runs["prior"], runs["decoder"], [runs["upsampler"]], dtype="float32")


@pytest.mark.slow
def test_the_stack_holds_the_averaged_weights(runs, stack):
    loaded = load_stack(stack)
    assert set(loaded.stages) == {"clip", "prior", "decoder", "upsampler"}
    for name, stage in loaded.stages.items():
        params = checkpoint_read.load_params(runs[name])[0]
        jax.tree.map(np.testing.assert_array_equal, stage.params, params)
        assert stage.step == 7


@pytest.mark.parametrize("priors", [("prior_ar",), ("prior", "prior_ar")])
def test_a_stack_may_hold_either_prior_or_both(priors, runs, tmp_path):
    given = {name: runs[name] if name in priors else None for name in ("prior", "prior_ar")}
    out = collect(tmp_path / "s", clip=runs["clip"], decoder=runs["decoder"], **given)
    assert set(load_stack(out).stages) == {"clip", "decoder", *priors}
    used = UnCLIP.load(out).settings()
    assert set(used) == {"decoder", priors[0]}  # diffusion where there is one


def test_a_stack_needs_a_prior(runs, tmp_path):
    with pytest.raises(UserError, match="needs a prior .*--prior-ar"):
        collect(tmp_path / "s", runs["clip"], None, runs["decoder"])


def test_a_decoder_without_clip_is_a_stack(runs, tmp_path):
    out = collect(tmp_path / "s", None, None, runs["glide"], [runs["upsampler"]], analytic=["decoder"])
    assert load_stack(out).stages["decoder"].params["x0_variance"].shape == (tiny_stack.TRAINED_STEPS,)
    again = UnCLIP.load(collect(tmp_path / "t", None, None, out))  # and a stack's tokenizer is known too
    assert set(again.tasks) == {"decoder"} and again.tokenizer.to_json() == tiny_stack.tokenizer().to_json()
    assert again.generate(["a red circle"], steps=2, progress=False).shape == (1, 16, 16, 3)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("clip", "prior", "glide"), "decoder in .* knows no CLIP, so it takes no CLIP and no prior"),
        ((None, "prior", "glide"), "prior in .* was trained with a CLIP, and none is given"),
        ((None, None, "decoder"), "decoder in .* was trained with a CLIP, and none is given.*by --clip"),
    ],
)
def test_clip_is_given_where_it_is_known_and_nowhere_else(given, words, runs, tmp_path):
    with pytest.raises(UserError, match=words):
        collect(tmp_path / "s", *(name and runs[name] for name in given))
    assert list(tmp_path.iterdir()) == []


def test_the_stack_loads_as_a_pipeline(stack):
    pipe = UnCLIP.load(stack)
    assert pipe.size == 32 and pipe.upsamplers == ["upsampler"]
    assert pipe.tokenizer.to_json() == tiny_stack.tokenizer().to_json()


def test_variances_are_measured_and_make_the_sampler_analytic_usable(runs, tmp_path):
    out = collect(tmp_path / "s", runs["clip"], runs["prior"], runs["decoder"], [], "bfloat16", False, ["prior"])
    table = load_stack(out).stages["prior"].params["x0_variance"]
    assert table.shape == (tiny_stack.TRAINED_STEPS,) and table.dtype == np.float32 and (np.asarray(table) > 0).all()
    pipe = UnCLIP.load(out)
    drawn = [pipe.generate(["a red circle"], prior_sampler=name, return_stages=True) for name in ("analytic", "ddpm")]
    assert np.abs(drawn[0].z_img - drawn[1].z_img).max() > 1e-3
    with pytest.raises(UserError, match="analytic='upsampler' is no stage .* use one of decoder, prior"):
        collect(tmp_path / "t", runs["clip"], runs["prior"], runs["decoder"], analytic=["upsampler"])


def test_the_stack_names_no_place_on_the_machine_that_trained(runs, stack):
    assert str(runs["clip"].parent) not in (stack / "stack.json").read_text()


def test_no_source_names_a_place():
    parts = ({"source": "webdataset", "path": "/here", "index": "/there", "weight": 2}, {"source": "shapes"})
    given = {"source": "tfds", "path": "coco", "data_dir": "/data", "index": "/idx", "size": 16, "parts": parts}
    own = ConfigDict({"clip": "/clip", "init": "/init", "tokenizer": None, "data": given}).lock()
    told = _without_paths(own)
    assert "/" not in told.to_json() and (told.data.size, told.data.parts[0]["weight"]) == (16, 2)
    assert own.data.parts[0]["path"] == "/here"


def test_the_upsampler_may_be_left_out(runs, tmp_path):
    out = collect(tmp_path / "s", runs["clip"], runs["prior"], runs["decoder"])
    assert UnCLIP.load(out).size == 16


def test_a_stacks_clip_may_be_exported_again(runs, stack, tmp_path):
    """As when a prior is trained anew on a published stack's CLIP; bf16 weights keep their identity."""
    first = collect(tmp_path / "a", runs["clip"], runs["prior"], runs["decoder"])
    again = collect(tmp_path / "b", first, runs["prior"], runs["decoder"])
    identities = [load_stack(path).stages["clip"].extra["clip_identity"] for path in (stack, first, again)]
    assert len(set(identities)) == 1


def test_every_stage_may_come_from_a_stack(runs, stack, tmp_path):
    """As when only the prior was trained on."""
    again = load_stack(collect(tmp_path / "s", stack, runs["prior"], stack, [stack], dtype="float32"))
    for name, stage in load_stack(stack).stages.items():
        jax.tree.map(np.testing.assert_array_equal, stage.params, again.stages[name].params)
        assert stage.config == again.stages[name].config and stage.step == again.stages[name].step


def test_another_clip_is_refused_and_nothing_is_written(runs, tmp_path):
    with pytest.raises(UserError, match="prior in .* was trained with another CLIP .*by --clip"):
        collect(tmp_path / "s", runs["other"], runs["prior"], runs["decoder"])
    assert list(tmp_path.iterdir()) == []


def test_stages_that_were_converted_are_exported_with_those_that_were_trained(runs, tmp_path):
    """Theirs say nothing of a tokenizer, a loader or a batch, as what `unclip convert` writes."""
    stage = tasks.load_stage(runs["prior"], "prior_diffusion")
    with stage.config.unlocked():
        for block in ("tokenizer", "loader", "batch_size", "eval"):
            del stage.config[block]
    converted = save_stack(tmp_path / "converted", {"prior": stage[:3] + ({},)}, stage.tokenizer_json, "float32")
    out = collect(tmp_path / "s", runs["clip"], converted, runs["decoder"], dtype="float32")
    jax.tree.map(np.testing.assert_array_equal, load_stack(out).stages["prior"].params, stage.params)
    with pytest.raises(UserError, match="prior in .*converted was converted, and knows of no data to measure"):
        collect(tmp_path / "t", runs["clip"], converted, runs["decoder"], analytic=("prior",))


def test_sizes_that_do_not_follow_each_other_are_refused_and_nothing_is_written(runs, tmp_path):
    given = [runs[name] for name in ("clip", "prior", "decoder")]
    with pytest.raises(UserError, match="upsampler_2 makes 64 pixels of 32, and was made for 32. Fix: export stages"):
        collect(tmp_path / "s", *given, [runs["upsampler"]] * 2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"prior": "decoder"},
            "holds a run of the task 'decoder', not 'prior_diffusion'",
        ),
        ({"clip": "prior"}, "give the workdir of a run of 'clip', or a stack"),
        ({"decoder": "nothing"}, "does not exist"),
    ],
    ids=str,
)
def test_a_wrong_workdir_is_named(runs, tmp_path, change, words):
    given = {name: runs[name] for name in ("clip", "prior", "decoder")}
    given |= {flag: runs.get(name, tmp_path / name) for flag, name in change.items()}
    with pytest.raises(UserError, match=words):
        collect(tmp_path / "s", **given)
    assert list(tmp_path.iterdir()) == []


def test_a_stack_that_is_there_stays_unless_told(runs, stack):
    with pytest.raises(UserError, match="exists"):
        collect(stack, runs["clip"], runs["prior"], runs["decoder"])
    assert "upsampler" in load_stack(stack).stages


@pytest.mark.parametrize("name", ["clip", "prior", "prior_ar", "upsampler"])
def test_a_stage_is_measured_by_its_own_metrics(runs, name):
    report = stages.measure(runs[name], num=6, seed=1).facts
    assert report["n"] == 8 and report["step"] == 7 and report["split"] == "test"
    assert "loss" in report["metrics"] and all(np.isfinite(value) for value in report["metrics"].values())
    if name == "clip":
        assert report == stages.measure(runs[name], num=6, seed=1).facts
        assert report["metrics"] != stages.measure(runs[name], num=6, seed=2).facts["metrics"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clip", "prior", "upsampler"])
def test_a_stage_of_a_stack_is_measured_as_its_run(runs, stack, name):
    """On other data too. But for the rounding of the stored weights, with each stack's own CLIP."""
    for given in ({}, {"source": "shapes:heldout"}):
        run = stages.measure(runs[name], num=6, seed=1, **given).facts
        own = stages.measure(stack, num=6, seed=1, stage=name, **given).facts
        assert all(own[k] == run[k] for k in ("data", "split", "n", "step"))
        assert own["metrics"].keys() == run["metrics"].keys()
        assert own["metrics"]["loss"] == pytest.approx(run["metrics"]["loss"], rel=0.05)
        assert own["split"] == ("heldout" if given else "test")


def test_a_stage_that_a_stack_does_not_have_is_told(stack):
    with pytest.raises(UserError, match="no stage 'decoderr'.*did you mean 'decoder'"):
        stages.measure(stack, stage="decoderr")


def test_a_stage_whose_clip_was_replaced_is_not_measured(runs, tmp_path):
    made = tiny_stack.configs()["prior"]
    made.clip, made.clip_identity = str(runs["other"]), "of another"
    clip = tasks.load_clip(str(runs["clip"])).model
    save(tmp_path / "prior", made, tiny_stack.weights(made, clip), tiny_stack.tokenizer())
    with pytest.raises(UserError, match="another CLIP"):
        stages.measure(tmp_path / "prior", num=4)
