"""Each stage, trained by the one loop on eight pictures, learns them by heart."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny_runs
from tests.tiny_runs import one_device  # noqa: F401 (fixture)
from unclip_jax import checkpoint_read, data, train
from unclip_jax.data import loader
from unclip_jax.run import make_run

pytestmark = pytest.mark.usefixtures("one_device")


def fit(stage: str, workdir, **changes):
    """Trains; returns the run, the eight pictures as a batch, the last parameters, and what metrics.jsonl tells."""
    config = tiny_runs.memorise(stage)
    with config.unlocked():
        config.loader.update(changes)
    assert train.train(config, workdir) == 0
    run = make_run(config, workdir)
    batch = next(loader.batches(data.make(**config.data), run.tokenizer, 8, shuffle=False))
    params, _, step, _ = checkpoint_read.load_params(workdir, which="params")
    assert step == config.num_steps
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").open()]
    return run, batch, params, {name: np.array([line[name] for line in lines]) for name in lines[0]}


@pytest.mark.slow
def test_clip_tells_the_eight_pairs_apart(tmp_path):
    _, batch, _, told = fit("clip", tmp_path)
    assert len(np.unique(batch["tokens"], axis=0)) == 8
    assert (told["accuracy"][-50:] == 1).all() and told["accuracy"][0] < 0.5
    # A guess costs ln 8; a right caption twice as likely as the seven others together costs ln 1.5.
    assert told["loss"][0] > 0.5 * np.log(8) and told["loss"][-50:].max() < np.log(1.5)


@pytest.mark.slow
def test_prior_draws_each_captions_own_embedding(tmp_path):
    run, batch, params, told = fit("prior_diffusion", tmp_path)

    @jax.jit
    def draw(params, batch):
        batch = run.task.encode(run.frozen, batch)
        z = run.task.sample(params, batch, jax.random.split(jax.random.key(7), 8))
        return z, batch["z_img"]

    drawn, true = (np.asarray(z, np.float64) for z in draw(params, batch))
    mean, std = true.mean(0), true.std(0)
    np.testing.assert_allclose(params["mean"], mean, atol=1e-4)  # of the data, untouched by 240 steps
    np.testing.assert_allclose(params["std"], std, rtol=1e-3, atol=1e-3)
    # Whitened, other pictures' embeddings are as far as they can be: their cosines average to -1/7.
    drawn, true = ((z - mean) / std for z in (drawn, true))
    cosine = (drawn @ true.T) / np.linalg.norm(drawn, axis=1)[:, None] / np.linalg.norm(true, axis=1)
    assert np.diag(cosine).mean() > 0.95 and (cosine.argmax(1) == np.arange(8)).all()
    assert told["mse"][-50:].mean() < 0.2 * told["mse"][:3].mean()


def test_prior_ar_draws_each_captions_own_codes(tmp_path):
    run, batch, params, told = fit("prior_ar", tmp_path)

    @jax.jit
    def draw(params, batch, keys):
        batch = run.task.encode(run.frozen, batch)
        z = jax.lax.map(lambda key: run.task.sample(params, batch, jax.random.split(key, 8)), keys)
        upper = jnp.sum(batch["z_txt"] * batch["z_img"], -1) > params["dots"][0]
        codes = run.task.codes(params, z.reshape(-1, z.shape[-1])).reshape(*z.shape[:2], -1)
        return codes, upper, run.task.codes(params, batch["z_img"]), batch["z_img"]

    drawn, upper, true, z = (np.asarray(a) for a in draw(params, batch, jax.random.split(jax.random.key(7), 100)))
    np.testing.assert_allclose(params["mean"], z.mean(0), atol=1e-4)  # of the data, untouched by training
    spread = np.linalg.svd(z.astype(np.float64) - z.mean(0, dtype=np.float64), compute_uv=False) / np.sqrt(8)
    np.testing.assert_allclose(params["std"], spread[:5], rtol=1e-3, atol=1e-3)
    # A dot product of the upper half is asked for, which half of the captions were never seen with.
    right = (drawn == true[None]).mean((0, 2))
    assert len(np.unique(true, axis=0)) == 8 and upper.sum() == 4
    assert right[upper].mean() > 0.9 and right.mean() > 0.75
    assert told["loss"][0] == pytest.approx(np.log(16), rel=0.1) and told["loss"][-1] < 0.02


BSR = {"degrade": "bsr", "factor": 2}


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "loaded"), [("decoder", {}), ("upsampler", {}), ("upsampler", BSR)])
def test_images_are_learned_far_beyond_the_mean(stage, loaded, tmp_path):
    run, batch, _, told = fit(stage, tmp_path, **loaded)
    # A new network predicts 0 for v = sqrt(abar) eps - sqrt(1 - abar) x0, which costs E v^2 = abar + (1 - abar) x0^2.
    abar = run.task.schedule.alphas_cumprod
    at_first = np.mean(abar + (1 - abar) * np.mean(batch["image"] ** 2))
    assert told["mse"][0] == pytest.approx(at_first, rel=0.2)
    assert told["mse"][-50:].mean() < 0.3 * at_first
