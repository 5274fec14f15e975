"""The FID Inception against torch, and its resizing against Pillow."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tests.parity import inception_reference
from unclip_jax import cli
from unclip_jax.errors import UserError
from unclip_jax.interop import inception as interop
from unclip_jax.interop.files import Source
from unclip_jax.metrics.inception import Inception
from unclip_jax.metrics.resample import resize

torch = pytest.importorskip("torch")
WIDTH = 1 / 16
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def reference():
    return inception_reference.make(WIDTH)


@pytest.fixture(scope="module")
def weights(reference, tmp_path_factory):
    """A file as torch.save makes it of a state_dict."""
    file = tmp_path_factory.mktemp("inception") / "pt_inception.pth"
    torch.save(reference.state_dict(), file)
    return file


@pytest.fixture(scope="module")
def made(weights):
    return interop.load(str(weights), WIDTH)


def test_features_and_logits_are_torchs(reference, made):
    x = RNG.uniform(-1, 1, (2, 99, 107, 3)).astype(np.float32)
    ours = jax.jit(lambda p, x: Inception(WIDTH).apply({"params": p}, x, method="features"))(made.params, x)
    with torch.no_grad():
        theirs = reference(torch.from_numpy(x.transpose(0, 3, 1, 2)))
    assert ours[0].shape == (2, 128) and ours[1].shape == (2, 1008)
    for a, b in zip(ours, theirs, strict=True):
        b = b.numpy()
        assert np.abs(a - b).max() < 1e-4 * np.abs(b).max() and b.std() > 0.01


def test_every_published_array_has_its_place_at_full_size():
    with torch.device("meta"):
        theirs = {name: tuple(a.shape) for name, a in inception_reference.Inception().state_dict().items()}
    shapes = jax.eval_shape(Inception().init, jax.random.key(0), jnp.zeros((1, 299, 299, 3)))["params"]
    shapes = {jax.tree_util.keystr(p, simple=True, separator="/"): a.shape
              for p, a in jax.tree_util.tree_leaves_with_path(shapes)}  # fmt: skip
    entries = interop.table(shapes)
    used = {entry.name for entry in entries}
    assert {name for name in set(theirs) ^ used if "num_batches" not in name} == {"fc.bias"}
    for entry in entries:
        assert np.prod(theirs[entry.name]) == np.prod(shapes[entry.path]), entry
    # torchvision's, which has 1000 logits and a bias; and the stored statistics of 17,216 channels.
    published = 23_834_568 - 1000 * (2048 + 1)
    assert sum(np.prod(shape) for shape in shapes.values()) == published + 2 * 17_216 + 1008 * 2048


@pytest.mark.parametrize(("old", "new"), [((64, 64), 299), ((256, 320), 299), ((301, 299), 299), ((33, 17), 8)])
def test_resizing_is_pillows_in_floating_point(old, new):
    whole = RNG.integers(0, 256, (*old, 3)).astype(np.uint8)
    for image in (whole, whole / np.float32(7)):  # stored ones, and drawn ones that nobody has rounded
        planes = [Image.fromarray(image[..., c].astype(np.float32), mode="F") for c in range(3)]
        theirs = np.stack([np.asarray(p.resize((new, new), Image.Resampling.BICUBIC)) for p in planes], -1).clip(0, 255)
        ours = np.asarray(resize(image[None], new))[0]
        assert np.abs(ours - theirs).max() < 1e-3


def test_pictures_are_resized_and_scaled_first(made, monkeypatch):
    images = RNG.integers(0, 256, (1, 64, 64, 3)).astype(np.uint8)
    module = Inception(WIDTH)
    seen = []
    monkeypatch.setattr(Inception, "features", lambda self, x: seen.append(x) or (x, x))
    module.apply({"params": made.params}, images)
    np.testing.assert_allclose(seen[0], (resize(images, 299) - 128) / 128, rtol=1e-6)


def test_converted_weights_are_the_same_and_need_no_torch(weights, made, tmp_path, monkeypatch):
    out = interop.convert(Source(weights, weights.name), tmp_path / "made", width=WIDTH)
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    again = interop.load(str(out), WIDTH)
    assert again.identity == made.identity
    jax.tree.map(np.testing.assert_array_equal, again.params, made.params)
    (out / "inception.safetensors").write_bytes((out / "inception.safetensors").read_bytes()[:-4] + b"abcd")
    with pytest.raises(UserError, match="SHA-256"):
        interop.load(str(out), WIDTH)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda s: s.pop("Mixed_6b.branch1x1.conv.weight"), "lacks 1 of the network's arrays: Mixed_6b.branch1x1"),
        (lambda s: s.update(extra=torch.ones(2)), "has unknown 1 of the network's arrays: extra"),
        (lambda s: s.update({"fc.weight": torch.ones(1000, 128)}), "fc.weight has the shape"),
        (lambda s: s["fc.weight"].fill_(float("nan")), "NaN"),
    ],
)
def test_other_weights_are_refused(reference, tmp_path, spoil, words):
    state = {name: a.clone() for name, a in reference.state_dict().items()}
    spoil(state)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(UserError, match=words):
        interop.load(str(tmp_path / "w.pth"), WIDTH)


def test_a_file_that_is_not_what_its_name_says_is_refused(weights, tmp_path):
    shutil.copy(weights, tmp_path / "pt_inception-2015-12-05-6726825d.pth")
    with pytest.raises(UserError, match="expected 6726825d"):
        interop.load(str(tmp_path / "pt_inception-2015-12-05-6726825d.pth"), WIDTH)


def test_the_command_says_what_is_wrong(weights, tmp_path, capsys):
    for path, words in ((tmp_path / "none.pth", "does not exist"), (weights, "which does not fit")):
        assert cli.main(["convert", "--from", "inception", str(path), str(tmp_path / "out")]) == 2
        err = capsys.readouterr().err.splitlines()
        assert len(err) == 1 and words in err[0] and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [("--sha256", 64 * "0", "has the SHA-256"), ("--dtype", "bfloat16", "float32"), ("--tokenizer", "t", "no token")],
)
def test_no_flag_of_the_command_is_passed_over(weights, tmp_path, capsys, flag, value, words):
    assert cli.main(["convert", "--from", "inception", str(weights), str(tmp_path / "out"), flag, value]) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1 and words in err[0] and not (tmp_path / "out").exists()


def test_what_a_conversion_says_of_itself(weights, tmp_path):
    out = interop.convert(Source(weights, weights.name), tmp_path / "made", width=WIDTH)
    about = json.loads((out / "inception.json").read_text())
    assert about["source"] == "pt_inception.pth" and len(about["sha256"]) == 64
