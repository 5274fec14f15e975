"""Data sets of TFDS: written here as ArrayRecord, read without TensorFlow."""

import contextlib
import io

import numpy as np
import pytest
import tensorflow_datasets as tfds
from etils import epath
from PIL import Image

from unclip_jax.data import make
from unclip_jax.data.images import BadImage
from unclip_jax.errors import UserError

N = 120


def png(value):
    out = io.BytesIO()
    Image.new("RGB", (6, 4), (value, 0, 0)).save(out, "PNG")
    return out.getvalue()


class Toy(tfds.core.GeneratorBasedBuilder):
    pkg_dir_path = epath.Path(__file__).parent  # TFDS wants a package, and a test module is none
    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in ("captions", "held")]

    def _info(self):
        features = tfds.features.FeaturesDict({
            "image": tfds.features.Image(shape=(None, None, 3)),
            "captions": tfds.features.Sequence({"text": tfds.features.Text()}),
            "title": tfds.features.Text(),
        })  # fmt: skip
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        own = {"train": self._generate_examples(0, N)}
        return own | ({"validation": self._generate_examples(N, 7)} if self.builder_config.name == "held" else {})

    def _generate_examples(self, first, count):
        for k in range(first, first + count):
            texts = [] if k == 5 else [{"text": f"number {k}"}, {"text": f" the\n number {k}"}]
            yield k, {"image": png(k), "captions": texts, "title": f"title {k}"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("tfds"))
    for name in ("captions", "held"):
        Toy(data_dir=path, config=name, file_format="array_record").download_and_prepare()
    return path


def test_records_and_their_captions(folder):
    train = make("tfds", "train", size=4, path="toy/captions", data_dir=folder)
    test = make("tfds", "test", size=4, path="toy/captions", data_dir=folder)
    records = {}
    for source in (train, test):
        for i in range(len(source)):
            try:
                record = source[i]
            except UserError as error:
                assert "has no caption" in str(error)
                continue
            k = int(record["image"][0, 0, 0])
            assert k not in records and record["image"].shape == (4, 4, 3) and record["image"].dtype == np.uint8
            records[k] = record["captions"]
    assert records == {k: [f"number {k}", f"the number {k}"] for k in range(N) if k != 5}
    assert 0 < len(test) < 12


def test_a_caption_is_read_without_its_picture(folder, monkeypatch):
    source = make("tfds", "train", size=4, path="toy/captions", data_dir=folder)
    texts = []
    for i in range(len(source)):
        with contextlib.suppress(BadImage):
            texts.append(source[i]["caption"])
    monkeypatch.setattr("unclip_jax.data.tfds.decode_image", lambda *_: pytest.fail("a picture was decoded"))
    assert list(source.captions(len(source))) == texts


def test_a_split_of_its_own_is_the_held_out_one(folder):
    test = make("tfds", "heldout", size=4, path="toy/held", data_dir=folder, caption_key="title")
    assert sorted(test[i]["caption"] for i in range(len(test))) == [f"title {k}" for k in range(N, N + 7)]
    train = make("tfds", "train", size=4, path="toy/held", data_dir=folder, caption_key="")
    assert len(train) == N and train[0]["caption"] == ""


def test_mistakes_are_user_errors(folder):
    def refused(match, **kw):
        with pytest.raises(UserError, match=match) as error:
            make("tfds", **{"split": "train", "size": 4, "path": "toy/captions", "data_dir": folder, **kw})
        assert "\n" not in str(error.value)

    refused("needs data.path", path="")
    refused("no data set that TFDS opens", path="no_such_set_at_all")
    refused("data.image_key='photo' is no feature .*image", image_key="photo")
    refused("data.caption_key='caption' is no feature", caption_key="caption")
    refused("data.split='tset' is not a split", split="tset")
