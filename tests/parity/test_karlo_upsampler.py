"""Our upsampler with Karlo's settings against diffusers' UNet2DModel: both networks, and the seven steps they share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

ref = pytest.importorskip("tests.parity.karlo_reference", reason="needs the packages torch and diffusers")
torch = ref.torch

from tests.random_params import run  # noqa: E402
from unclip_jax.data.images import resize  # noqa: E402
from unclip_jax.diffusion.sample import initial_noise, step_noise  # noqa: E402
from unclip_jax.diffusion.schedule import make_schedule  # noqa: E402
from unclip_jax.models.unet import UNet  # noqa: E402
from unclip_jax.tasks.upsampler import UpsamplerTask  # noqa: E402

STEPS = 7
TIME = np.array([999, 166, 0], np.int32)
RNG = np.random.default_rng(0)
X, LOW = RNG.standard_normal((3, ref.SIDE, ref.SIDE, 6)), RNG.uniform(-1, 1, (2, ref.SIDE // 4, ref.SIDE // 4, 3))


def models(dtype):
    """(our module, parameters of both networks, diffusers' two models)."""
    theirs = ref.upsampler_models()
    model, params = ref.ours("upsampler", *theirs)
    if dtype == np.float64:
        theirs = [ref.double(m) for m in theirs]
        params = jax.tree.map(lambda a: a.astype(np.float64), params)
    return UNet(**model, dtype=jnp.dtype(dtype)), params, *theirs


@pytest.mark.parametrize(("dtype", "bound"), [(np.float32, 1e-5), (np.float64, 1e-10)])
def test_networks(dtype, bound):
    with jax.enable_x64(dtype == np.float64):
        module, params, *theirs = models(dtype)
        x = X.astype(dtype)
        for name, model in zip(("net", "last"), theirs, strict=True):
            wanted = ref.nhwc(model(ref.nchw(x), torch.from_numpy(TIME)).sample)
            assert ref.error(run(module, params[name], x, TIME), wanted) < bound
        assert ref.error(run(module, params["net"], x, TIME), wanted) > 1e-1, "the two are one"


@pytest.mark.parametrize("side", [4, 8])
def test_enlarging(side):
    low = RNG.uniform(-1, 1, (2, side, side, 3))
    with jax.enable_x64():
        wanted = torch.nn.functional.interpolate(
            ref.nchw(low), size=[4 * side] * 2, mode="bicubic", align_corners=False, antialias=True
        )
        assert ref.error(resize(jnp.asarray(low), 4 * side), ref.nhwc(wanted)) < 1e-10
        plain = torch.nn.functional.interpolate(ref.nchw(low), size=[4 * side] * 2, mode="bicubic")
        assert ref.error(ref.nhwc(plain), ref.nhwc(wanted)) > 1e-2, "torch's other bicubic kernel"


def test_seven_steps_the_last_by_the_second_network():
    """In f64."""
    shape = (ref.SIDE, ref.SIDE, 3)
    with jax.enable_x64():
        module, params, first, last_one = models(np.float64)
        keys = jax.random.split(jax.random.key(3), 2)
        sampler = dict(name="ddpm", steps=STEPS)
        task = UpsamplerTask(module, make_schedule("cosine"), ref.SIDE, sampler, last_steps=1)
        got = jax.jit(task.sample)(params, {"low": LOW}, keys)

        enlarged = torch.nn.functional.interpolate(
            ref.nchw(LOW), size=[ref.SIDE] * 2, mode="bicubic", align_corners=False, antialias=True
        )
        noises = [ref.nchw(step_noise(keys, i, shape)) for i in range(STEPS)]

        def predict(x, t, last):
            return (last_one if last else first)(torch.cat([x, enlarged], 1), t).sample

        start = ref.nchw(initial_noise(keys, shape))
        draw = lambda predict, exact=True: ref.nhwc(  # noqa: E731
            ref.loop(ref.scheduler("upsampler", STEPS, exact), predict, start, noises).clamp(-1, 1)
        )
        assert ref.error(got, draw(predict)) < 1e-9
        assert ref.error(got, draw(predict, exact=False)) < 1e-2
        assert ref.error(got, draw(lambda x, t, last: predict(x, t, False))) > 1e-2, "one network for all"
        assert ref.error(got, draw(lambda x, t, last: predict(x, t, not last))) > 1e-2, "the networks exchanged"
