"""Remat policies in configs: every network of a stage is found, stored configs load, mistakes are told."""

import jax
import pytest

from tests import tiny_runs
from unclip_jax import config as configs
from unclip_jax import run as runs
from unclip_jax import tasks
from unclip_jax.errors import UserError

# What takes `remat` in each stage; the tiny prior_ar has no caption encoder of its own.
NETWORKS = {
    "clip": {"vision.remat", "text.remat"},
    "prior_diffusion": {"remat"},
    "prior_ar": {"remat"},
    "decoder": {"unet.remat", "text.remat"},
    "upsampler": {"remat"},
}


def clip_of(stage):
    return tasks.make(tiny_runs.config("clip")).model if stage in tiny_runs.WITH_CLIP else None


@pytest.mark.parametrize("stage", NETWORKS)
def test_every_network_of_a_stage_takes_the_policy(stage):
    plain = tiny_runs.config(stage)
    assert tasks.policies(plain) == ("none",) and tasks.without_remat("it", plain) == "it"
    changed = tasks.with_policy(plain, "dots")
    assert {line.partition(":")[0] for line in configs.diff(plain, changed)} == {f"model.{n}" for n in NETWORKS[stage]}
    assert tasks.policies(changed) == ("dots",)
    task, bare = (tasks.make(tasks.with_policy(plain, p), clip_of(stage)) for p in ("dots", "none"))
    assert tasks.without_remat(task, changed).model == bare.model


def test_stored_configs_and_earlier_runs_may_say_true_and_false():
    now = tasks.with_policy(tiny_runs.config("clip"), "full")
    text = configs.to_json(now)
    stored = configs.from_json(text.replace('"remat": "full"', '"remat": true', 1).replace('"full"', "false"))
    assert stored.model.vision.remat in (True, False) and tasks.policies(stored) == ("none", "full")
    shapes = [jax.eval_shape(tasks.make(c).init, jax.random.key(0)) for c in (stored, now)]
    assert shapes[0] == shapes[1]
    runs._check_same_run(now, stored, "runs/clip")  # goes on: the policy does not change what is learned


BLOCKS = [("clip", "model.text"), ("decoder", "model.unet"), ("upsampler", "model")]


@pytest.mark.parametrize(("stage", "block"), BLOCKS)
def test_unknown_names_are_told_before_anything_is_built(stage, block):
    made = tasks.with_policy(tiny_runs.config(stage), "full")
    configs.override(made, f"{block}.remat=dot")
    with pytest.raises(UserError, match=f"{block}.remat='dot' is no remat policy. Fix: did you mean 'dots'"):
        tasks.check(made, has_clip=True)
