"""What a frozen CLIP says of a batch: its images at its own size, the decoder's at the decoder's."""

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from tests import tiny_stack
from unclip_jax import tasks

CONFIGS = tiny_stack.configs()
CLIP = tasks.make(CONFIGS["clip"]).model  # takes 16 px
FROZEN = {"clip": tiny_stack.weights(CONFIGS["clip"])}


def batch(size: int) -> dict:
    """Two pictures that brighten evenly, downwards and to the right: nearly the same at any size."""
    ramp = np.linspace(-1, 1, 2 * size + 1, dtype=np.float32)[1::2]
    image = np.stack(np.meshgrid(ramp, ramp, indexing="ij"))[..., None].repeat(3, -1)
    tokens, mask = tiny_stack.tokenizer().encode(["a red circle", "two rings"])
    return {"image": image, "tokens": tokens, "mask": mask}


def decoder(**over):
    config = ConfigDict(CONFIGS["decoder"].to_dict())
    config.objective.update(over)
    return tasks.make(config, CLIP)


@pytest.mark.parametrize("stage", ["prior", "decoder"])
def test_images_are_resized_for_clip(stage):
    encode = jax.jit(tasks.make(CONFIGS[stage], CLIP).encode)
    small, large = encode(FROZEN, batch(16)), encode(FROZEN, batch(32))
    z = np.asarray(small["z_img"])
    np.testing.assert_allclose(z, large["z_img"], rtol=0, atol=0.05 * np.abs(z).max())
    assert np.abs(z[0] - z[1]).max() > 0.2 * np.abs(z).max()


def test_decoder_draws_smaller_pictures_than_clip_sees():
    """The paper's: CLIP at 256 px, pictures of 64 px."""
    task = decoder(image_size=8)
    assert task.image_size == 8 and decoder().image_size == CONFIGS["decoder"].data.size
    out = jax.jit(task.encode)(FROZEN, batch(16))
    means = batch(16)["image"].reshape(2, 8, 2, 8, 2, 3).mean((2, 4))
    np.testing.assert_allclose(out["image"], means, rtol=0, atol=0.05)
    np.testing.assert_array_equal(out["z_img"], jax.jit(decoder().encode)(FROZEN, batch(16))["z_img"])


def test_without_images_only_the_caption_is_encoded():
    words = {k: v for k, v in batch(16).items() if k != "image"}
    assert set(jax.eval_shape(decoder().encode, FROZEN, words)) == {"tokens", "mask", "z_txt", "states"}
