"""OpenCLIP's and OpenAI's CLIP against a small network of the same structure in torch, written here from the paper.

open_clip itself needs torchvision and is not asked for; the layout of its files is that of torch's own
MultiheadAttention, which this network uses. Checked with torch 2.13.0.
"""

import json

import jax
import numpy as np
import pytest

from tests.parity import tiny_clip
from unclip_jax import tasks, weights
from unclip_jax.errors import UserError
from unclip_jax.interop import convert, stages

torch = pytest.importorskip("torch", reason="parity with OpenCLIP needs the package torch")

LENGTH, WIDTH, HEADS, DEPTH, DIM, SIDE, PATCH = tiny_clip.LENGTH, 128, 2, 2, 8, 16, 8


class Block(torch.nn.Module):
    def __init__(self, quick: bool):
        super().__init__()
        self.ln_1, self.ln_2 = torch.nn.LayerNorm(WIDTH), torch.nn.LayerNorm(WIDTH)
        self.attn = torch.nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.mlp = torch.nn.ModuleDict({"c_fc": torch.nn.Linear(WIDTH, 4 * WIDTH), "c_proj": torch.nn.Linear(4 * WIDTH, WIDTH)})  # fmt: skip # noqa: E501
        self.quick = quick

    def forward(self, x, mask):
        h = self.ln_1(x)
        x = x + self.attn(h, h, h, attn_mask=mask, need_weights=False)[0]
        h = self.mlp["c_fc"](self.ln_2(x))
        h = h * torch.sigmoid(1.702 * h) if self.quick else torch.nn.functional.gelu(h)
        return x + self.mlp["c_proj"](h)


class Tower(torch.nn.Module):
    def __init__(self, quick: bool):
        super().__init__()
        self.resblocks = torch.nn.ModuleList([Block(quick) for _ in range(DEPTH)])

    def forward(self, x, mask=None):
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Visual(torch.nn.Module):
    def __init__(self, quick: bool):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, WIDTH, PATCH, PATCH, bias=False)
        self.class_embedding = torch.nn.Parameter(torch.zeros(WIDTH))
        self.positional_embedding = torch.nn.Parameter(torch.zeros((SIDE // PATCH) ** 2 + 1, WIDTH))
        self.ln_pre, self.ln_post = torch.nn.LayerNorm(WIDTH), torch.nn.LayerNorm(WIDTH)
        self.transformer = Tower(quick)
        self.proj = torch.nn.Parameter(torch.zeros(WIDTH, DIM))

    def forward(self, pixels):
        x = self.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class Clip(torch.nn.Module):
    def __init__(self, pieces: int, quick: bool):
        super().__init__()
        self.visual, self.transformer = Visual(quick), Tower(quick)
        self.token_embedding = torch.nn.Embedding(pieces, WIDTH)
        self.positional_embedding = torch.nn.Parameter(torch.zeros(LENGTH, WIDTH))
        self.ln_final = torch.nn.LayerNorm(WIDTH)
        self.text_projection = torch.nn.Parameter(torch.zeros(WIDTH, DIM))
        self.logit_scale = torch.nn.Parameter(torch.tensor(3.0))

    def text(self, tokens):
        mask = torch.full((LENGTH, LENGTH), float("-inf")).triu(1)
        x = self.token_embedding(tokens) + self.positional_embedding
        x = self.ln_final(self.transformer(x, mask))
        return x[torch.arange(len(x)), tokens.argmax(-1)] @ self.text_projection


def network(pieces: int, quick: bool) -> Clip:
    torch.manual_seed(1)
    model = Clip(pieces, quick).eval()
    with torch.no_grad():
        for name, array in model.named_parameters():
            if array.ndim == 1:
                array.normal_(float(name.endswith("weight")), 0.1)
            elif array.ndim:
                array.normal_(0, 0.1 if "embedding" in name else array.shape[-1] ** -0.5)
    return model


def save_open_clip(folder, quick=True, suffix=".bin", **text):
    """OpenCLIP's directory: a config, weights under its names, and the tokenizer."""
    pieces = tiny_clip.save_tokenizer(folder)
    model = network(pieces, quick)
    tower = {"width": WIDTH, "layers": DEPTH}
    about = {
        "embed_dim": DIM,
        "quick_gelu": quick,
        "vision_cfg": {**tower, "image_size": SIDE, "patch_size": PATCH, "head_width": WIDTH // HEADS},
        "text_cfg": {**tower, "heads": HEADS, "context_length": LENGTH, "vocab_size": pieces, **text},
    }
    content = {"model_cfg": about, "preprocess_cfg": {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    if suffix == ".bin":
        torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    else:
        from safetensors.torch import save_file

        save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return model


def errors(model, stack, mean, std) -> dict[str, float]:
    clip = tasks.load_clip(str(stack))
    words = stages.load_tokenizer(None, str(stack), LENGTH)
    tokens, mask = words.encode(["a red cat", "", "the cat and the hat and the mat and a hat"], warn=False)
    image = np.random.default_rng(2).uniform(-1, 1, (2, SIDE, SIDE, 3)).astype(np.float32)
    pixels = torch.tensor((((image + 1) / 2 - mean) / std).transpose(0, 3, 1, 2), dtype=torch.float32)
    run = jax.jit(lambda p, *a: clip.model.apply({"params": p}, *a)[:2])
    pad = np.repeat(image[:1], len(tokens) - len(image), 0)
    z_img, z_txt = run(clip.params, np.concatenate([image, pad]), tokens, mask)
    with torch.no_grad():
        want = {"z_txt": (z_txt, model.text(torch.tensor(tokens.astype(np.int64)))), "z_img": (z_img[:2], model.visual(pixels))}  # fmt: skip # noqa: E501
    return {name: float(np.abs(got - np.asarray(w)).max() / np.abs(w).max()) for name, (got, w) in want.items()}


@pytest.mark.parametrize(("quick", "suffix"), [(True, ".bin"), (False, ".safetensors")])
def test_embeddings_are_theirs(tmp_path, quick, suffix):
    model = save_open_clip(tmp_path / "theirs", quick, suffix)
    out = convert.convert_in("open-clip", str(tmp_path / "theirs"), tmp_path / "ours")
    found = errors(model, out, np.array([0.4, 0.5, 0.6]), np.array([0.2, 0.3, 0.4]))
    print(found)
    assert max(found.values()) <= 1e-5
    np.testing.assert_allclose(weights.load_stack(out).stages["clip"].params["logit_scale"], model.logit_scale.item())


def test_openai_s_names_tell_their_sizes(tmp_path):
    """A file of OpenAI's, as a state_dict: no config beside it, three numbers in it, half precision."""
    tokenizer = tmp_path / "tokenizer"
    model = network(tiny_clip.save_tokenizer(tokenizer), quick=True).half().float()
    numbers = {"input_resolution": SIDE, "context_length": LENGTH, "vocab_size": model.token_embedding.num_embeddings}
    state = {name: array.half() for name, array in model.state_dict().items()}
    torch.save({**state, **{name: torch.tensor(n) for name, n in numbers.items()}}, tmp_path / "clip.pt")
    out = convert.convert_in("open-clip", str(tmp_path / "clip.pt"), tmp_path / "ours", str(tokenizer))
    found = errors(model, out, np.array(stages.OPENAI_MEAN), np.array(stages.OPENAI_STD))
    print(found)
    assert max(found.values()) <= 1e-5
    stage = weights.load_stack(out).stages["clip"]
    assert stage.config.model.vision.image_size == SIDE and stage.extra["source"] == "clip.pt"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"hf_model_name": "xlm"}, "hf_model_name='xlm' is none of the settings"),
        ({"mlp_ratio": 3}, "mlp_ratio=3 must be 4"),
        ({"no_causal_mask": True}, "no_causal_mask=True is none"),
        ({"layers": [1, 2]}, "layers=[1, 2] must be a whole number"),
        ({"layers": 3}, "lacks"),
        ({"layers": 1}, "has unknown"),
        ({"vocab_size": 9}, "the CLIP an embedding of 9"),
        ({"width": 64}, "does not fit"),
    ],
    ids=str,
)
def test_what_our_clip_is_not_is_refused(tmp_path, change, told):
    save_open_clip(tmp_path / "theirs", suffix=".safetensors", **change)
    with pytest.raises(UserError) as error:
        convert.convert_in("open-clip", str(tmp_path / "theirs"), tmp_path / "ours")
    assert told in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "ours").exists()


def test_weights_without_a_config_are_refused(tmp_path):
    save_open_clip(tmp_path / "theirs")
    (tmp_path / "theirs/open_clip_config.json").unlink()
    with pytest.raises(UserError, match="no open_clip_config.json beside it"):
        convert.convert_in("open-clip", str(tmp_path / "theirs"), tmp_path / "ours")
