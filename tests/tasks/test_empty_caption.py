"""Captions dropped as Karlo drops them: the empty caption, as CLIP encodes it, stands in their place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny_stack
from tests.tasks import stubs
from unclip_jax import tasks
from unclip_jax.diffusion.schedule import make_schedule
from unclip_jax.pipeline import UnCLIP
from unclip_jax.tasks.decoder import DecoderTask
from unclip_jax.tasks.prior_diffusion import PriorTask
from unclip_jax.tasks.teacher import ask_empty, drop_captions

BOS, EOS = 1, 2
TOKENS = np.array([[BOS, 5, 6, EOS, 0], [BOS, 7, EOS, 0, 0]], np.int32)
MASK = np.array([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]], bool)
BATCH = {"tokens": TOKENS, "mask": MASK}


def test_the_empty_caption_is_bos_and_eos():
    clip = stubs.clip()
    batch = ask_empty(clip, {}, BATCH)
    assert set(batch["empty"]) == {"tokens", "mask", "z_txt", "states"}
    np.testing.assert_array_equal(batch["empty"]["mask"], [[True, True, False, False, False]] * 2)
    np.testing.assert_array_equal(batch["empty"]["tokens"][:, :2], [[BOS, EOS]] * 2)
    wanted, _ = clip.apply({}, batch["empty"]["tokens"], batch["empty"]["mask"], method="embed_text")
    np.testing.assert_array_equal(batch["empty"]["z_txt"], wanted)


def test_captions_are_dropped_row_by_row():
    batch = {**BATCH, "z_img": np.ones((2, 3)), "empty": {"tokens": TOKENS * 0 + 9, "mask": ~MASK, "states": 0}}
    out = drop_captions(batch, np.array([False, True]))
    np.testing.assert_array_equal(out["tokens"], [[9] * 5, TOKENS[1]])
    np.testing.assert_array_equal(out["mask"], [~MASK[0], MASK[1]])
    assert out["z_img"] is batch["z_img"] and "states" not in out


@pytest.mark.parametrize("drop", [0.0, 1.0])
def test_prior_learns_the_empty_caption(drop):
    calls = stubs.Calls()

    def answer(xt, time, caption, mask, z_txt, keep):
        calls.note(caption=caption, mask=mask, keep=keep)
        return xt

    clip = stubs.clip()
    net = stubs.Net({"__call__": answer}, {"vocab_size": 9})
    task = PriorTask(net, make_schedule("cosine", 20), clip, {}, text_drop=drop, empty_caption=True)
    batch = task.encode({"clip": {}}, {**BATCH, "image": np.zeros((2, stubs.SIDE, stubs.SIDE, 3), np.float32)})
    task.loss({"net": {}, "mean": jnp.zeros(6), "std": jnp.ones(6)}, batch, jax.random.key(0))
    (call,) = calls
    assert call.keep is None
    np.testing.assert_array_equal(call.mask, batch["empty"]["mask"] if drop else MASK)
    np.testing.assert_array_equal(call.caption, batch["empty"]["tokens"] if drop else TOKENS)


def test_decoder_is_guided_away_from_the_empty_caption_and_no_image():
    calls = stubs.Calls()

    def condition(z_img, keep_image, tokens, mask, keep_text, z_txt, states):
        calls.note(z_img=z_img, keep_image=keep_image, tokens=tokens, mask=mask, keep_text=keep_text)
        return jnp.zeros(z_img.shape[:1])

    net = stubs.Net({"condition": condition, "denoise": lambda xt, time, cond: jnp.concatenate([xt, xt], -1)})
    sampler = {"name": "ddpm", "steps": 2, "guidance": 3.0}
    task = DecoderTask(net, make_schedule("cosine", 20), stubs.clip(), stubs.SIDE, sampler, empty_caption=True)
    batch = task.encode({"clip": {}}, BATCH)
    z_img = np.arange(12.0).reshape(2, 6)
    task.sample({}, {**batch, "z_img": z_img}, jax.random.split(jax.random.key(0), 2))
    (call,) = calls
    assert call.keep_text is None
    np.testing.assert_array_equal(call.keep_image, [True, True, False, False])
    np.testing.assert_array_equal(call.mask, np.concatenate([MASK, batch["empty"]["mask"]]))
    np.testing.assert_array_equal(call.tokens, np.concatenate([TOKENS, batch["empty"]["tokens"]]))
    np.testing.assert_array_equal(call.z_img, np.concatenate([z_img, z_img]))


def test_a_stack_draws_the_empty_prompt_alike_at_any_guidance_of_the_prior():
    """For it, what guides is what is guided; another prompt is drawn otherwise."""
    configs = tiny_stack.configs()
    del configs["upsampler"]
    configs["prior"].model.caption = "states"
    for name in ("prior", "decoder"):
        configs[name].objective.empty_caption = True
    decoder = configs["decoder"].model
    decoder.text, decoder.add_text_embedding = None, True
    clip = tasks.make(configs["clip"]).model
    made = {name: tasks.make(config, clip=clip) for name, config in configs.items()}
    params = {name: tiny_stack.weights(config, clip) for name, config in configs.items()}
    assert "null_text" not in params["prior"]["net"] and "null_image" in params["decoder"]
    stack = UnCLIP(tiny_stack.tokenizer(), made, configs, params)
    one, five = (
        stack.generate(["", "a red circle"], prior_guidance=g, return_stages=True, progress=False).z_img
        for g in (1.0, 5.0)
    )
    np.testing.assert_allclose(one[0], five[0], rtol=0, atol=1e-3)
    assert np.abs(one[1] - five[1]).max() > 1e-2
