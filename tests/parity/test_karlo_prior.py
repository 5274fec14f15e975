"""Our prior with Karlo's settings against diffusers' PriorTransformer: the network, and 25 guided steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

ref = pytest.importorskip("tests.parity.karlo_reference", reason="needs the packages torch and diffusers")
torch = ref.torch

from tests.random_params import run  # noqa: E402
from unclip_jax.diffusion.sample import initial_noise, step_noise  # noqa: E402
from unclip_jax.diffusion.schedule import make_schedule  # noqa: E402
from unclip_jax.models.prior import Prior  # noqa: E402
from unclip_jax.nn.embed import sinusoid  # noqa: E402
from unclip_jax.tasks.prior_diffusion import PriorTask  # noqa: E402

TIME = np.array([999, 500, 1, 0], np.int32)
XT = np.random.default_rng(0).standard_normal((4, ref.EMBED))


def both(dtype, mask=None, with_mask=True, **over):
    """(our prediction, theirs) for four captions at four times."""
    theirs = ref.prior_model()
    model, params = ref.ours("prior", theirs)
    states, own_mask, z_txt = ref.captions(dtype)
    if dtype == np.float64:
        theirs = ref.double(theirs)
        params = jax.tree.map(lambda a: a.astype(np.float64), params)
    xt = XT.astype(dtype)
    wanted = theirs(
        torch.from_numpy(xt),
        timestep=torch.from_numpy(TIME),
        proj_embedding=torch.from_numpy(z_txt),
        encoder_hidden_states=torch.from_numpy(states),
        attention_mask=torch.from_numpy(own_mask) if with_mask else None,
    ).predicted_image_embedding
    module = Prior(**{**model, **over}, dtype=jnp.dtype(dtype))
    got = run(module, params["net"], xt, TIME, states, own_mask if mask is None else mask, z_txt, None)
    return got, wanted.numpy()


def test_sinusoid():
    """Both are f32; a rounding of the frequency, 6e-8, is 6e-5 of an angle of 999."""
    from diffusers.models.embeddings import get_timestep_embedding

    times = np.arange(0, 1000, 37)
    wanted = get_timestep_embedding(torch.from_numpy(times), 64, flip_sin_to_cos=True, downscale_freq_shift=0)
    np.testing.assert_allclose(sinusoid(jnp.asarray(times), 64), wanted.numpy(), rtol=0, atol=1e-4)


def test_network_in_f32():
    assert ref.error(*both(np.float32)) < 1e-5


def test_network_in_f64_and_what_would_differ():
    """Among them: no causal mask (diffusers without an attention mask), padding seen, another GELU."""
    with jax.enable_x64():
        got, wanted = both(np.float64)
        assert ref.error(got, wanted) < 1e-10
        assert ref.error(*both(np.float64, with_mask=False)) > 1e-2
        assert ref.error(*both(np.float64, mask=np.ones((4, ref.LENGTH), bool))) > 1e-2
        assert ref.error(*both(np.float64, activation="gelu_tanh")) > 1e-6
        assert ref.error(got, np.roll(wanted, 1, 0)) > 1e-1


def test_25_guided_steps():
    """In f64; the third caption, the empty one, is what the others are guided away from."""
    with jax.enable_x64():
        theirs = ref.prior_model()
        model, params = ref.ours("prior", theirs)
        params = jax.tree.map(lambda a: a.astype(np.float64), params)
        theirs = ref.double(theirs)
        states, mask, z_txt = ref.captions(np.float64)
        rows, empty = [0, 1, 3], [2, 2, 2]
        cond = {"states": states[rows], "mask": mask[rows], "z_txt": z_txt[rows]}
        cond["empty"] = {"states": states[empty], "mask": mask[empty], "z_txt": z_txt[empty]}

        keys = jax.random.split(jax.random.key(3), 3)
        sampler = dict(name="ddpm", steps=25, guidance=4.0, candidates=1)
        module, clip = Prior(**model, dtype=jnp.float64), None
        task = PriorTask(module, make_schedule("cosine"), clip, sampler, clip_x0=5.0, empty_caption=True)
        got = jax.jit(task.sample)(params, cond, keys)

        own = jax.vmap(lambda key: jax.random.fold_in(key, 0))(keys)  # of the one candidate
        noises = [torch.from_numpy(np.array(step_noise(own, i, (ref.EMBED,)))) for i in range(25)]
        halves = empty + rows
        fixed = dict(
            proj_embedding=torch.from_numpy(z_txt[halves]),
            encoder_hidden_states=torch.from_numpy(states[halves]),
            attention_mask=torch.from_numpy(mask[halves]),
        )

        def predict(x, t, last):
            u, c = theirs(torch.cat([x, x]), timestep=t, **fixed).predicted_image_embedding.chunk(2)
            return u + 4.0 * (c - u)

        start = torch.from_numpy(np.array(initial_noise(own, (ref.EMBED,))))
        for exact, bound in ((True, 1e-10), (False, 2e-3)):
            wanted = theirs.post_process_latents(ref.loop(ref.scheduler("prior", 25, exact), predict, start, noises))
            assert ref.error(got, wanted.numpy()) < bound, exact
        unguided = jax.jit(lambda *a: task.sample(*a, guidance=1.0))(params, cond, keys)
        assert ref.error(unguided, wanted.numpy()) > 1e-2
