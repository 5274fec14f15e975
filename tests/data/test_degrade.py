"""Each degradation alone, against scipy or a closed form; the order; and that (seed, position) decides a picture."""

import collections
import io
import math

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from unclip_jax.data import degrade as D
from unclip_jax.data import loader, shapes
from unclip_jax.errors import UserError


def picture(height=24, width=32, seed=0):
    return np.random.default_rng(seed).uniform(0, 255, (height, width, 3))


@pytest.mark.parametrize("sigma_x, sigma_y, angle", [(1.3, 1.3, 0.0), (2.0, 0.5, 0.7), (0.4, 3.0, 2.0)])
def test_kernels_have_the_moments_of_their_gaussian(sigma_x, sigma_y, angle):
    kernel = D.gaussian(sigma_x, sigma_y, angle)
    r = len(kernel) // 2
    y, x = np.mgrid[-r : r + 1, -r : r + 1]
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    wanted = turn @ np.diag([sigma_x**2, sigma_y**2]) @ turn.T
    found = np.array([[(kernel * a * b).sum() for b in (x, y)] for a in (x, y)])
    assert kernel.shape[0] % 2 == 1 and kernel.sum() == pytest.approx(1)
    np.testing.assert_allclose(found, wanted, atol=0.12 * max(sigma_x, sigma_y) ** 2)


@pytest.mark.parametrize("kernel", [D.gaussian(1.0, 1.0, 0), D.gaussian(2.0, 0.7, 0.6),
                                    np.random.default_rng(3).uniform(0, 1, (5, 5))])
def test_blur_is_scipys_convolution(kernel):
    x = picture()
    wanted = ndimage.convolve(x, kernel[..., None], mode="mirror")
    np.testing.assert_allclose(D.blur(x, kernel), wanted, atol=1e-9)


def test_a_flat_picture_stays_flat_but_for_noise_and_jpegs_rounding():
    flat = np.full((16, 16, 3), 90.0)
    np.testing.assert_allclose(D.blur(flat, D.gaussian(2, 1, 1)), 90, atol=1e-9)
    for method in D.METHODS:
        np.testing.assert_allclose(D.resize(flat, 7, 9, method), 90, atol=1e-4)
    assert np.abs(D.jpeg(flat, 50) - 90).max() <= 2


def test_resizing_by_boxes_is_the_mean_of_blocks():
    x = picture()
    means = x.reshape(12, 2, 16, 2, 3).mean((1, 3))
    np.testing.assert_allclose(D.resize(x, 12, 16, Image.Resampling.BOX), means, atol=1e-3)


@pytest.mark.parametrize("std", [1.0, 20.0])
def test_noise_has_its_spread_in_each_colour_alone_or_in_all_alike(std):
    x, alike = picture(64, 64), []
    for seed in range(20):
        z = D.noisy(x, std, np.random.default_rng(seed)) - x
        assert z.std() == pytest.approx(std, rel=0.06) and abs(z.mean()) < 5 * std / 64
        alike.append(np.allclose(z[..., 0], z[..., 1]))
    assert 3 <= sum(alike) <= 17


def test_jpeg_loses_more_at_a_lower_quality_and_is_pillows():
    x = ndimage.gaussian_filter(picture(32, 32), (2, 2, 0))
    error = [np.abs(D.jpeg(x, quality) - x).mean() for quality in (10, 50, 95)]
    assert error[0] > error[1] > error[2] > 0
    file = io.BytesIO()
    Image.fromarray(np.round(x).astype(np.uint8)).save(file, "JPEG", quality=50)
    np.testing.assert_array_equal(D.jpeg(x, 50), np.asarray(Image.open(file)))
    beyond = np.full((8, 8, 3), 300.0) * np.array([1, -1, 0])  # as noise makes them
    assert np.abs(D.jpeg(beyond, 95) - [255, 0, 0]).max() <= 2


def test_every_order_comes_equally_often():
    n, rng = 12_000, np.random.default_rng(0)
    counts = collections.Counter(tuple(D.order(rng)) for _ in range(n))
    total = math.factorial(len(D.STEPS))
    assert len(counts) == total
    chi2 = sum((count - n / total) ** 2 for count in counts.values()) / (n / total)
    assert chi2 < total - 1 + 5 * np.sqrt(2 * (total - 1))


def test_the_order_is_followed(monkeypatch):
    done = []

    def noted(name, real):
        return lambda x, *a: (done.append(name), real(x, *a))[1]

    for name in ("blur", "noisy", "jpeg", "resize"):
        monkeypatch.setattr(D, name, noted(name, getattr(D, name)))
    names = {"isotropic": "blur", "anisotropic": "blur", "noise": "noisy", "jpeg": "jpeg", "resize": "resize"}
    seen = set()
    for seed in range(8):
        done.clear()
        D.degrade(picture().astype(np.uint8), 4, np.random.default_rng(seed))
        wanted = [names[step] for step in D.order(np.random.default_rng(seed))]
        assert done == [*wanted, "resize", "jpeg"]
        seen.add(tuple(done))
    assert len(seen) > 4


def evenly(values, low, high):
    """Whether they lie in low … high and reach both ends, their mean that of an even spread within four deviations."""
    values, wide = np.asarray(values), high - low
    ends = low <= values.min() < low + 0.05 * wide and high - 0.05 * wide < values.max() <= high
    return ends and abs(values.mean() - (low + high) / 2) < 4 * wide / np.sqrt(12 * values.size)


@pytest.mark.parametrize("name", D.SETTINGS)
def test_each_step_draws_from_its_range(name, monkeypatch):
    """Of 1000 pictures of 24 x 32 pixels, which no step but resizing changes, and that to nothing but another size."""
    drawn, ranges, n = collections.defaultdict(list), D.SETTINGS[name], 1000

    def resize(x, height, width, method):
        drawn["side"].append((height, width))
        drawn["method"].append(method)
        return np.zeros((height, width, 3))

    monkeypatch.setattr(D, "resize", resize)
    monkeypatch.setattr(D, "gaussian", lambda *of: of)
    monkeypatch.setattr(D, "blur", lambda x, of: drawn["blur"].append((of[0], of[1], x.shape[0] / 6, of[2])) or x)
    monkeypatch.setattr(D, "noisy", lambda x, std, rng: drawn["noise"].append(std) or x)
    monkeypatch.setattr(D, "jpeg", lambda x, quality: drawn["quality"].append(quality) or x)
    alike = []
    for seed in range(n):
        D.degrade(np.zeros((24, 32, 3), np.uint8), 4, np.random.default_rng(seed), name)
        alike += [step == "isotropic" for step in D.order(np.random.default_rng(seed)) if step.endswith("isotropic")]
    one, other, pixel, angle = np.array(drawn["blur"]).T
    np.testing.assert_array_equal(one == other, alike)
    assert evenly(one / pixel, *ranges.sigma) and evenly((other / pixel)[one != other], *ranges.sigma)
    assert len(set(pixel)) > 4 and evenly(angle, 0, np.pi) and evenly(drawn["noise"], *ranges.noise)
    for k in (0, 1):  # on the way, and at the end
        assert set(drawn["quality"][k::2]) == set(range(ranges.quality[0], ranges.quality[1] + 1))
        assert set(drawn["method"][k::2]) == set(D.METHODS)
    assert drawn["side"][1::2] == [(6, 8)] * n
    height, width = np.array(drawn["side"][::2]).T
    np.testing.assert_allclose(height / 24, width / 32, atol=0.5 / 24 + 0.5 / 32)
    assert evenly((width - 8) / 24, *ranges.scale)


@pytest.mark.parametrize("name", D.SETTINGS)
def test_a_small_picture_is_u8_still_like_the_large_one_and_decided_by_its_seed(name):
    scene = shapes.Shapes("test", 64)[0]["image"]
    plain = scene.reshape(16, 4, 16, 4, 3).mean((1, 3))
    drawn = [D.degrade(scene, 4, np.random.default_rng([1, k]), name) for k in range(12)]
    for k, small in enumerate(drawn):
        assert small.shape == (16, 16, 3) and small.dtype == np.uint8
        assert np.corrcoef(small.ravel(), plain.ravel())[0, 1] > {"bsr": 0.2, "bsr_light": 0.7}[name]
        np.testing.assert_array_equal(small, D.degrade(scene, 4, np.random.default_rng([1, k]), name))
    assert len({small.tobytes() for small in drawn}) == 12


def test_light_is_lighter():
    scene = shapes.Shapes("test", 64)[0]["image"]
    plain = scene.reshape(16, 4, 16, 4, 3).mean((1, 3))
    apart = {name: np.mean([np.abs(D.degrade(scene, 4, np.random.default_rng(k), name) - plain).mean()
                            for k in range(30)]) for name in D.SETTINGS}  # fmt: skip
    assert apart["bsr_light"] < 0.6 * apart["bsr"]


def batches(**settings):
    settings = {"crop": 32, "degrade": "bsr", "factor": 2, "seed": 3, **settings}
    return loader.batches(shapes.Shapes("train", 64, length=40), None, 4, **settings)


def test_batches_hold_small_pictures_that_position_and_seed_decide():
    """Whatever was read before, by whichever threads: so a resumed run sees the same."""
    stream = batches()
    first = [next(stream) for _ in range(3)]
    stream.close()
    again = batches(start_step=2, num_threads=5)
    np.testing.assert_array_equal(next(again)["low"], first[2]["low"])
    again.close()
    for batch in first:
        assert batch["low"].shape == (4, 16, 16, 3) and batch["low"].dtype == np.float32
        assert batch["low"].min() >= -1 and batch["low"].max() <= 1
        plain = batch["image"].reshape(4, 16, 2, 16, 2, 3).mean((2, 4))
        assert np.corrcoef(plain.ravel(), batch["low"].ravel())[0, 1] > 0.7
    plain = batches(degrade=None)
    bare = next(plain)
    plain.close()
    assert "low" not in bare
    np.testing.assert_array_equal(bare["image"], first[0]["image"])  # the crops are what they were
    other = batches(seed=4)
    assert (next(other)["low"] != first[0]["low"]).any()
    other.close()


def test_mistakes_are_named():
    with pytest.raises(UserError, match="loader.degrade='brs' is unknown. Fix: did you mean 'bsr'"):
        batches(degrade="brs")
    with pytest.raises(UserError, match="loader.factor=5 must divide the 32 pixels"):
        batches(factor=5)
    for factor in (5, 3, 16):
        with pytest.raises(ValueError, match=f"24 x 32 pixels must be divisible by factor={factor}"):
            D.degrade(picture().astype(np.uint8), factor, np.random.default_rng(0))
