"""Zero-shot classification with prompt ensembling, and CLIP scores, against transformers' CLIP on the same weights."""

import numpy as np
import pytest

from tests.parity import tiny_clip
from unclip_jax import tasks
from unclip_jax.evaluation import features
from unclip_jax.interop import convert, stages
from unclip_jax.metrics import probes, scores
from unclip_jax.tokenizer import Tokenizer

torch = pytest.importorskip("torch", reason="parity with transformers needs the package torch")
CLASSES, TEMPLATES = ["cat", "hat", "red mat", "cat on a mat"], ["a {}", "the red {}", "it's a {}, ok?"]
IMAGES = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3)).astype(np.uint8)


def test_scores_and_classes_are_transformers(tmp_path):
    theirs = tiny_clip.save(tmp_path / "clip")
    clip = tasks.load_clip(convert.convert_in("hf-clip", str(tmp_path / "clip"), tmp_path / "stack"))
    tokenizer = Tokenizer.from_json(clip.tokenizer_json)
    prompts = probes.class_prompts(CLASSES, TEMPLATES)
    z_img = features.extractor(features.clip(clip.model, clip.params, ""))(IMAGES)["features"]
    z_txt = features.embed_texts(clip.model, clip.params, tokenizer, prompts)
    ours = probes.unit(z_img) @ probes.class_embeddings(z_txt, len(CLASSES)).T

    pixels = (IMAGES / 255 - np.array(stages.OPENAI_MEAN)) / np.array(stages.OPENAI_STD)
    tokens, mask = tokenizer.encode(prompts)
    with torch.no_grad():
        model = theirs.double()
        image = model.vision_model(pixel_values=torch.tensor(pixels.transpose(0, 3, 1, 2)))
        image = model.visual_projection(image.pooler_output)
        ids, seen = torch.tensor(tokens.astype(np.int64)), torch.tensor(mask.astype(np.int64))
        text = model.text_projection(model.text_model(input_ids=ids, attention_mask=seen).pooler_output)
        unit = lambda z: z / z.norm(dim=-1, keepdim=True)  # noqa: E731
        ensemble = unit(unit(text).reshape(len(CLASSES), len(TEMPLATES), -1).mean(1))
        expected = (unit(image) @ ensemble.T).numpy()
        cosines = (unit(image) * unit(text)).sum(-1).numpy()
    np.testing.assert_allclose(ours, expected, atol=1e-6)
    assert (ours.argmax(1) == expected.argmax(1)).all() and len(set(expected.argmax(1))) > 1
    np.testing.assert_allclose(scores.clip_score(z_img, z_txt)["clip_score"], 100 * cosines, atol=1e-4)
