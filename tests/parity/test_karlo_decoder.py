"""Our decoder with Karlo's settings against diffusers' UnCLIPTextProjModel and UNet2DConditionModel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

ref = pytest.importorskip("tests.parity.karlo_reference", reason="needs the packages torch and diffusers")
torch = ref.torch

from tests.random_params import run  # noqa: E402
from unclip_jax.diffusion.sample import initial_noise, step_noise  # noqa: E402
from unclip_jax.diffusion.schedule import make_schedule  # noqa: E402
from unclip_jax.models.decoder import Condition, Decoder  # noqa: E402
from unclip_jax.tasks.decoder import DecoderTask  # noqa: E402

TIME = np.array([999, 500, 1, 0], np.int32)
RNG = np.random.default_rng(0)
X, Z = RNG.standard_normal((4, ref.SIDE, ref.SIDE, 3)), RNG.standard_normal((4, ref.EMBED))
KEEP = np.array([True, False, True, False])


def models(dtype):
    """(our module, its parameters, text_proj, UNet)."""
    theirs = ref.text_proj_model(), ref.decoder_model()
    model, params = ref.ours("decoder", *theirs[::-1])
    if dtype == np.float64:
        theirs = [ref.double(m) for m in theirs]
        params = jax.tree.map(lambda a: a.astype(np.float64), params)
    return Decoder(**model, dtype=jnp.dtype(dtype)), params, *theirs


def conditions(dtype, module, params, text_proj):
    """(ours, theirs) of four captions and embeddings, two of these dropped: each (context, emb, mask)."""
    states, mask, z_txt = ref.captions(dtype)
    z = Z.astype(dtype)
    tokens = np.zeros(mask.shape, np.int32)
    got = run(module, params, z, KEEP, tokens, mask, None, z_txt, states, method="condition")
    null = text_proj.learned_classifier_free_guidance_embeddings.numpy()
    context, emb = text_proj(
        image_embeddings=torch.from_numpy(np.where(KEEP[:, None], z, null)),
        prompt_embeds=torch.from_numpy(z_txt),
        text_encoder_hidden_states=torch.from_numpy(states),
        do_classifier_free_guidance=False,
    )
    seen = torch.nn.functional.pad(torch.from_numpy(mask), (4, 0), value=True)
    return (got.context, got.emb, got.mask), (context, emb, seen)


def predictions(dtype, module, params, text_proj, unet):
    """(ours, theirs), both from diffusers' conditions."""
    _, (context, emb, mask) = conditions(dtype, module, params, text_proj)
    wanted = unet(
        sample=ref.nchw(X.astype(dtype)),
        timestep=torch.from_numpy(TIME),
        encoder_hidden_states=context,
        class_labels=emb,
        attention_mask=mask,
    ).sample
    cond = Condition(emb.numpy(), context.numpy(), mask.numpy())
    return run(module, params, X.astype(dtype), TIME, cond, method="denoise"), ref.nhwc(wanted), cond


def test_in_f32():
    given = models(np.float32)
    got, wanted = conditions(np.float32, *given[:3])
    for a, b in zip(got, wanted, strict=True):
        assert ref.error(a, b.numpy()) < 1e-5
    got, wanted, _ = predictions(np.float32, *given)
    assert ref.error(got, wanted) < 1e-5


def swap(array, axis, first):
    """The numbers along an axis with the first so many put behind the others."""
    return np.roll(array, -first, axis)


def test_in_f64_and_what_would_differ():
    with jax.enable_x64():
        module, params, text_proj, unet = models(np.float64)
        got, wanted = conditions(np.float64, module, params, text_proj)
        for a, b in zip(got, wanted, strict=True):
            assert ref.error(a, b.numpy()) < 1e-10
        flat = text_proj.clip_extra_context_tokens_proj(torch.from_numpy(Z))
        other = flat.reshape(4, 4, -1).numpy()  # feature c of token t at t * W + c
        assert ref.error(got[0][KEEP, :4], other[KEEP]) > 1e-1

        got, wanted, cond = predictions(np.float64, module, params, text_proj, unet)
        assert ref.error(got, wanted) < 1e-10

        def differs(params=params, cond=cond):
            return ref.error(run(module, params, X, TIME, cond, method="denoise"), wanted) > 1e-3

        net = params["net"]
        up = net["up2_block0"]  # of 48 channels from below and 48 skipped
        kernels = {
            "norm1": jax.tree.map(lambda a: swap(a, 0, 48), up["norm1"]),
            "conv1": {**up["conv1"], "kernel": swap(up["conv1"]["kernel"], 2, 48)},
            "skip": {**up["skip"], "kernel": swap(up["skip"]["kernel"], 2, 48)},
        }
        assert differs({**params, "net": {**net, "up2_block0": {**up, **kernels}}}), "skipped features first"
        emb = jax.tree.map(lambda a: swap(a, -1, 48), up["emb"])
        assert differs({**params, "net": {**net, "up2_block0": {**up, "emb": emb}}}), "shift before scale"
        assert differs(cond=cond._replace(mask=np.ones_like(cond.mask))), "padding seen"
        right = np.concatenate([cond.mask[:, 4:], cond.mask[:, :4]], 1)
        assert differs(cond=cond._replace(mask=right)), "image tokens' mask on the wrong side"
        assert differs(cond=cond._replace(emb=np.zeros_like(cond.emb))), "no embedding beside the time"


@pytest.mark.slow
def test_guided_steps_with_learned_variance():
    """Four steps in f64 at guidance 8; the uncond half has the empty caption and the learned image vector."""
    steps, scale, shape = 4, 8.0, (ref.SIDE, ref.SIDE, 3)
    with jax.enable_x64():
        module, params, text_proj, unet = models(np.float64)
        states, mask, z_txt = ref.captions(np.float64)
        rows, empty = [0, 3], [2, 2]
        tokens = np.zeros((2, ref.LENGTH), np.int32)
        cond = {"z_img": Z[:2], "tokens": tokens, "states": states[rows], "mask": mask[rows], "z_txt": z_txt[rows]}
        cond["empty"] = {"tokens": tokens, "states": states[empty], "mask": mask[empty], "z_txt": z_txt[empty]}
        keys = jax.random.split(jax.random.key(3), 2)
        sampler = dict(name="ddpm", steps=steps, guidance=scale)
        task = DecoderTask(module, make_schedule("cosine"), None, ref.SIDE, sampler, empty_caption=True)
        got = jax.jit(task.sample)(params, cond, keys)

        halves = empty + rows
        context, emb = text_proj(
            image_embeddings=torch.from_numpy(Z[:2]),
            prompt_embeds=torch.from_numpy(z_txt[halves]),
            text_encoder_hidden_states=torch.from_numpy(states[halves]),
            do_classifier_free_guidance=True,
        )
        seen = torch.nn.functional.pad(torch.from_numpy(mask[halves]), (4, 0), value=True)
        noises = [ref.nchw(step_noise(keys, i, shape)) for i in range(steps)]

        def predict(x, t, last, vary_too=False):
            out = unet(torch.cat([x, x]), t, context, class_labels=emb, attention_mask=seen).sample
            u, c = out.chunk(2)
            guided = u + scale * (c - u)
            return guided if vary_too else torch.cat([guided[:, :3], c[:, 3:]], 1)

        start = ref.nchw(initial_noise(keys, shape))
        draw = lambda predict, exact=True: ref.nhwc(  # noqa: E731
            ref.loop(ref.scheduler("decoder", steps, exact), predict, start, noises).clamp(-1, 1)
        )
        assert ref.error(got, draw(predict)) < 1e-9
        assert ref.error(got, draw(predict, exact=False)) < 1e-2
        assert ref.error(got, draw(lambda *a: predict(*a, vary_too=True))) > 1e-2
