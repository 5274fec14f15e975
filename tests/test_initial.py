"""Weights a stage is begun from: what their arrays do not show is told; statistics of another CLIP stay behind."""

import functools
import itertools

import jax
import numpy as np
import pytest

from tests import tiny_runs, tiny_stack
from unclip_jax import train, weights
from unclip_jax.run import make_run
from unclip_jax.tokenizer import Tokenizer

OTHER = "0123456789abcdef"  # identity of a CLIP that no test has


@functools.cache
def clip():
    """The network and weights of the CLIP of `tiny_runs`."""
    run = tiny_runs.make("prior_diffusion")
    return run.task.clip, run.frozen["clip"]


def given(folder, stage: str, identity: str = "", words: str = "", **said) -> tuple[str, dict]:
    """(a stack with that stage, trained against the CLIP of that identity and with a config of this, its weights)."""
    made = tiny_runs.config(stage)
    with made.unlocked(), made.ignore_type():
        made.clip_identity = identity
        for key, value in said.items():
            *blocks, name = key.split("__")
            functools.reduce(lambda block, part: block[part], blocks, made)[name] = value
    params = jax.tree.map(np.float32, tiny_stack.weights(tiny_runs.make(stage).config, clip()[0]))
    words = words or tiny_stack.tokenizer().to_json()
    return str(weights.save_stack(folder / "given", {stage: (params, made, 1, {})}, words, "float32")), params


def told(recorded) -> str:
    return "\n".join(str(warning.message) for warning in recorded)


def test_another_clips_statistics_are_measured_anew(tmp_path, recwarn):
    init, params = given(tmp_path, "prior_diffusion", OTHER)
    run = make_run(tiny_runs.config("prior_diffusion", init=init), tmp_path / "run")
    assert f"trained against the CLIP {OTHER}, and config.clip is {run.config.clip_identity}" in told(recwarn)
    assert "statistics measured anew: mean, std;" in told(recwarn)
    batches = functools.partial(train._batches, run)
    state = train._fresh(run, batches)
    jax.tree.map(np.testing.assert_array_equal, state.params["net"], params["net"])

    model, own = clip()
    embed = jax.jit(lambda image: model.apply({"params": own}, image, method="embed_image"))
    stream = batches(0)
    z = np.concatenate([embed(next(stream)["image"]) for _ in range(32)])
    for tree in (state.params, state.ema):
        np.testing.assert_allclose(tree["mean"], z.mean(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(tree["std"], z.std(0), rtol=1e-3)


def test_the_same_clips_statistics_are_kept(tmp_path, recwarn):
    identity = tiny_runs.make("prior_ar").config.clip_identity
    init, params = given(tmp_path, "prior_ar", identity)
    run = make_run(tiny_runs.config("prior_ar", init=init), tmp_path / "run")
    assert told(recwarn) == ""
    np.testing.assert_array_equal(run.initial["components"], params["components"])
    assert len(run.initial) == len(jax.tree.leaves(params))


def test_a_stage_that_knows_no_clip_is_not_asked_for_its_own(tmp_path, recwarn):
    init, _ = given(tmp_path, "upsampler", OTHER)
    make_run(tiny_runs.config("upsampler", init=init), tmp_path / "run")
    assert told(recwarn) == ""


def test_codes_of_another_clip_are_measured_anew(tmp_path, recwarn):
    init, params = given(tmp_path, "prior_ar", OTHER)
    run = make_run(tiny_runs.config("prior_ar", init=init), tmp_path / "run")
    assert "statistics measured anew: components, dots, mean, std;" in told(recwarn)
    assert len(run.initial) == len(jax.tree.leaves(params["net"])) and all(n.startswith("net/") for n in run.initial)


@pytest.mark.parametrize(
    ("stage", "said", "words"),
    [
        ("clip", {"model__norm": None}, "model.norm: None -> "),
        ("clip", {"model__vision__activation": "quick_gelu"}, "model.vision.activation: 'quick_gelu' -> 'gelu'"),
        ("clip", {"model__vision__mean": (0.4, 0.4, 0.4)}, "model.vision.mean: (0.4, 0.4, 0.4) -> (0.5, 0.5, 0.5)"),
        ("upsampler", {"objective__target": "eps"}, "objective.target: 'eps' -> 'v'"),
        ("upsampler", {"model__groups": 2}, "model.groups: 2 -> 4"),
        ("upsampler", {"diffusion__shift": 0.5}, "diffusion.shift: 0.5 -> 1.0"),
        ("upsampler", {"model__dropout": 0.1, "model__dtype": "bfloat16", "objective__blur_share": 0.0}, ""),
        ("upsampler", {"model__scale_shift": True, "objective__enlarge": "bicubic", "diffusion__shift": 1.0}, ""),
    ],
)
def test_settings_that_no_array_shows_are_told(stage, said, words, tmp_path, recwarn):
    init, _ = given(tmp_path, stage, **said)
    make_run(tiny_runs.config(stage, init=init), tmp_path / "run")
    if words:
        assert f"init={init!r} was trained with other settings: {words}" in told(recwarn)
    else:
        assert told(recwarn) == ""


def test_of_karlos_two_upsamplers_that_of_all_steps_but_the_last_is_trained_on(tmp_path, recwarn):
    made = tiny_runs.config("upsampler")
    with made.unlocked():
        made.objective.last_steps = 1
    params = jax.tree.map(np.float32, tiny_stack.weights(made))
    init = str(weights.save_stack(tmp_path / "given", {"upsampler": (params, made, 0, {})}, "{}", "float32"))
    run = make_run(tiny_runs.config("upsampler", init=init), tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, train._fresh(run, None).params, params["net"])
    assert "was trained with other settings: objective.last_steps: 1 -> 0" in told(recwarn)


def test_another_tokenizer_of_as_many_pieces_is_told(tmp_path, recwarn):
    init, _ = given(tmp_path, "clip")
    own = tiny_stack.tokenizer()
    make_run(tiny_runs.config("clip", init=init, tokenizer__path=f"{init}/tokenizer.json"), tmp_path / "run")
    assert told(recwarn) == ""
    texts = ["".join(pair) for pair in itertools.product("abcdefghijklmnopqrstuvwxyz", repeat=2)]
    Tokenizer.train(texts, own.vocab_size, own.max_len).save(tmp_path / "other.json")
    make_run(tiny_runs.config("clip", init=init, tokenizer__path=tmp_path / "other.json"), tmp_path / "run")
    heard = told(recwarn)
    assert f"init={init!r} was trained with another tokenizer" in heard and "leave config.tokenizer.path out" in heard


def test_a_clip_of_another_tokenizer_is_told(tmp_path, recwarn):
    own = tiny_stack.tokenizer()
    texts = ["".join(pair) for pair in itertools.product("abcdefghijklmnopqrstuvwxyz", repeat=2)]
    init, _ = given(tmp_path, "prior_diffusion", words=Tokenizer.train(texts, own.vocab_size, own.max_len).to_json())
    make_run(tiny_runs.config("prior_diffusion", init=init), tmp_path / "run")
    heard = told(recwarn)
    assert f"init={init!r} was trained with another tokenizer" in heard and "train against its CLIP" in heard


def test_what_is_not_taken_of_other_weights_is_told(tmp_path, recwarn):
    init, params = given(tmp_path, "upsampler")
    number = len(jax.tree.leaves(params))
    config = tiny_runs.config("upsampler", init=init, init_partly=True)
    with config.unlocked():
        config.model.positions = True
    make_run(config, tmp_path / "run")
    taken = f"init={init!r} gives {number} of the {number + 1} arrays; random or measured: positions; left there: none"
    assert taken in told(recwarn)
