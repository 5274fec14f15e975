"""GLIDE's network and loops in torch, written from the paper and from what its published state dicts are named.

A network here is a function of its weights, drawn at random when a name is first asked for, so that `state` holds
afterwards what a file of that size must: {name: tensor}. On the device "meta" only shapes are computed. Each `wrong`
is a misreading that converted weights would still load with.
"""

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="parity with GLIDE's network needs the package torch")
from torch.nn import functional as F  # noqa: E402

torch.set_grad_enabled(False)


class Text2ImUNet:
    """The base network, or with a `low` picture the upsampler.

    Args:
      model: keywords of our `Decoder`; `attention` is meant for square pictures of any side.
      vocab, length: of captions.
      seed: of the weights; None: no numbers, shapes alone.
    """

    def __init__(self, model, vocab: int, length: int, seed: int | None = 0):
        self.unet, self.layers, self.heads = model["unet"], model["text"]["layers"], model["text"]["heads"]
        self.width, self.vocab, self.length, self.seed = model["context_width"], vocab, length, seed
        self.rng, self.state = np.random.default_rng(seed), {}
        self.groups, self.head = self.unet.get("groups", 32), self.unet["head_channels"]

    def __call__(self, x, time, tokens, mask, low=None, wrong: str = ""):
        """x [B, 3, H, W], time [B], tokens and mask [B, L], low [B, 3, h, w] → [B, 6, H, W], in x's dtype."""
        self.dtype = x.dtype
        channels, depth = self.unet["channels"], self.unet["blocks"]
        half = channels // 2
        angle = time.to(x.dtype)[:, None] * torch.exp(torch.arange(half, device=x.device, dtype=x.dtype) *
                                                      (-math.log(10000) / half))  # fmt: skip
        emb = torch.cat([torch.cos(angle), torch.sin(angle)], 1)
        emb = self.linear("time_embed.2", F.silu(self.linear("time_embed.0", emb, 4 * channels)), 4 * channels)
        context = self.caption(tokens, mask, wrong)
        told = context[:, 0] if wrong == "first position" else context[:, -1]
        emb = emb + self.linear("transformer_proj", told, 4 * channels)
        context = context.transpose(1, 2)
        if low is not None:
            mode = dict(mode="nearest") if wrong == "nearest" else dict(mode="bilinear", align_corners=False)
            mode = dict(mode="bicubic", align_corners=False) if wrong == "bicubic" else mode
            x = torch.cat([x, F.interpolate(low, size=x.shape[2:], **mode)], 1)

        def step(h, name, width, way=""):
            h = self.residual(f"{name}.0", h, emb, width, way)
            attends = not way and h.shape[-1] in self.unet["attention"]
            return self.attention(f"{name}.1", h, context, wrong) if attends else h

        h = self.conv("input_blocks.0.0", x, channels)
        kept, number = [h], 1
        for level, multiplier in enumerate(self.unet["multipliers"]):
            for way in [""] * depth + ["down"] * (level + 1 < len(self.unet["multipliers"])):
                h = step(h, f"input_blocks.{number}", multiplier * channels, way)
                kept.append(h)
                number += 1
        h = self.residual("middle_block.0", h, emb, h.shape[1])
        h = self.attention("middle_block.1", h, context, wrong)
        h = self.residual("middle_block.2", h, emb, h.shape[1])
        number = 0
        for level, multiplier in reversed(list(enumerate(self.unet["multipliers"]))):
            for k in range(depth + 1):
                name = f"output_blocks.{number}"
                h = step(torch.cat([h, kept.pop()], 1), name, multiplier * channels)
                if level and k == depth:
                    place = 1 + (h.shape[-1] in self.unet["attention"])
                    h = self.residual(f"{name}.{place}", h, emb, h.shape[1], "up")
                number += 1
        return self.conv("out.2", F.silu(self.norm("out.0", h)), 6)

    def caption(self, tokens, mask, wrong=""):
        """[B, L, W]: every position sees every other, and a padded one is a learned vector of its own."""
        x = self.weight("token_embedding.weight", self.vocab, self.width)[tokens]
        x = x + self.weight("positional_embedding", self.length, self.width)
        padding = self.weight("padding_embedding", self.length, self.width)
        if wrong != "no padding embedding":
            x = torch.where(mask[..., None], x, padding.expand_as(x))
        b, n, w = x.shape
        for k in range(self.layers):
            name = f"transformer.resblocks.{k}"
            qkv = self.linear(f"{name}.attn.c_qkv", self.layer_norm(f"{name}.ln_1", x), 3 * w)
            q, key, v = self.fused(qkv.reshape(b, n, -1), self.heads, 3, wrong)
            scores = torch.einsum("bthc,bshc->bhts", q, key) / math.sqrt(w // self.heads)
            if wrong == "causal":
                scores = scores + torch.full((n, n), -1e30, dtype=scores.dtype).triu(1)
            seen = torch.einsum("bhts,bshc->bthc", scores.softmax(-1), v).reshape(b, n, w)
            x = x + self.linear(f"{name}.attn.c_proj", seen, w)
            h = F.gelu(self.linear(f"{name}.mlp.c_fc", self.layer_norm(f"{name}.ln_2", x), 4 * w))
            x = x + self.linear(f"{name}.mlp.c_proj", h, w)
        return self.layer_norm("final_ln", x)

    def residual(self, name, x, emb, width, way=""):
        resample = {
            "": lambda a: a,
            "down": lambda a: F.avg_pool2d(a, 2),
            "up": lambda a: a.repeat_interleave(2, 2).repeat_interleave(2, 3),
        }[way]
        h = self.conv(f"{name}.in_layers.2", resample(F.silu(self.norm(f"{name}.in_layers.0", x))), width)
        scale, shift = self.linear(f"{name}.emb_layers.1", F.silu(emb), 2 * width)[..., None, None].chunk(2, 1)
        h = F.silu(self.norm(f"{name}.out_layers.0", h) * (1 + scale) + shift)
        h = self.conv(f"{name}.out_layers.3", h, width)
        x = resample(x)
        return h + (x if x.shape[1] == width else self.conv(f"{name}.skip_connection", x, width, 1))

    def attention(self, name, x, context, wrong=""):
        b, c, *side = x.shape
        pixels = self.pointwise(f"{name}.qkv", self.norm(f"{name}.norm", x).flatten(2), 3 * c).transpose(1, 2)
        words = self.pointwise(f"{name}.encoder_kv", context, 2 * c).transpose(1, 2)
        q, k, v = self.fused(pixels, c // self.head, 3, wrong)
        more_k, more_v = self.fused(words, c // self.head, 2, wrong)
        k, v = torch.cat([more_k, k], 1), torch.cat([more_v, v], 1)
        weight = (torch.einsum("bthc,bshc->bhts", q, k) / math.sqrt(self.head)).softmax(-1)
        h = torch.einsum("bhts,bshc->bthc", weight, v).reshape(b, -1, c).transpose(1, 2)
        return x + self.pointwise(f"{name}.proj_out", h, c).reshape(x.shape)

    @staticmethod
    def fused(x, heads, parts, wrong):
        """[B, N, heads * parts * C] → `parts` arrays [B, N, heads, C]: the parts of head 0, then those of head 1."""
        if wrong == "parts in thirds":
            return x.reshape(*x.shape[:2], parts, heads, -1).unbind(2)
        return x.reshape(*x.shape[:2], heads, parts, -1).unbind(3)

    def weight(self, name, *shape):
        if name not in self.state:
            if self.seed is None:
                self.state[name] = torch.empty(shape, device="meta")
            else:
                noise = self.rng.standard_normal(shape)
                if name.endswith("embedding.weight") or len(shape) == 1 and name.endswith("bias"):
                    noise = 0.3 * noise
                elif len(shape) == 1:
                    noise = 1 + 0.1 * noise
                elif name.endswith("weight"):
                    noise = noise / math.sqrt(math.prod(shape[1:]))
                self.state[name] = torch.from_numpy(noise.astype(np.float32))
        assert self.state[name].shape == shape
        return self.state[name].to(self.dtype)

    def linear(self, name, x, width):
        return F.linear(x, self.weight(f"{name}.weight", width, x.shape[-1]), self.weight(f"{name}.bias", width))

    def conv(self, name, x, width, side=3):
        kernel = self.weight(f"{name}.weight", width, x.shape[1], side, side)
        return F.conv2d(x, kernel, self.weight(f"{name}.bias", width), padding=side // 2)

    def pointwise(self, name, x, width):
        return F.conv1d(x, self.weight(f"{name}.weight", width, x.shape[1], 1), self.weight(f"{name}.bias", width))

    def norm(self, name, x):
        return F.group_norm(x, self.groups, *(self.weight(f"{name}.{n}", x.shape[1]) for n in ("weight", "bias")), 1e-5)

    def layer_norm(self, name, x):
        scale, bias = (self.weight(f"{name}.{n}", self.width) for n in ("weight", "bias"))
        return F.layer_norm(x, x.shape[-1:], scale, bias, 1e-5)


def levels(name: str, sections: list[int], lower_last: int = 0) -> tuple[np.ndarray, list[int]]:
    """(abar f64[n], times) of the steps drawn, from least to most noise.

    Times are found by adding up each section's stride, as GLIDE does, not by a product.
    """
    if name == "linear":
        betas = np.linspace(1e-4, 2e-2, 1000)
    else:
        f = [math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(1001)]
        betas = np.array([min(1 - b / a, 0.999) for a, b in zip(f, f[1:], strict=False)])
    size, times = 1000 // len(sections), []
    assert size * len(sections) == 1000
    for k, count in enumerate(sections):
        at = 0.0
        for _ in range(count):
            times.append(k * size + round(at))
            at += (size - 1) / (count - 1)
    times[-1] -= lower_last
    return np.cumprod(1 - betas)[times], times


def ancestral(predict, x, noises, abar, times):
    """x0 by steps with learned variance; predict(x, time) gives 6 channels, noises[i] is of step i."""
    before = np.append(1.0, abar[:-1])
    beta = 1 - abar / before
    least = beta * (1 - before) / (1 - abar)
    least[0] = least[1]
    for i in reversed(range(len(times))):
        eps, v = predict(x, times[i]).chunk(2, 1)
        x0 = ((x - math.sqrt(1 - abar[i]) * eps) / math.sqrt(abar[i])).clamp(-1, 1)
        mean = math.sqrt(before[i]) * beta[i] * x0 + math.sqrt(1 - beta[i]) * (1 - before[i]) * x
        spread = torch.exp(((v + 1) * math.log(beta[i]) + (1 - v) * math.log(least[i])) / 4)
        x = mean / (1 - abar[i]) + (spread * noises[i] if i else 0)
    return x


def deterministic(predict, x, abar, times):
    """x0 by DDIM's steps; the variance is not read."""
    before = np.append(1.0, abar[:-1])
    for i in reversed(range(len(times))):
        eps = predict(x, times[i])[:, :3]
        x0 = ((x - math.sqrt(1 - abar[i]) * eps) / math.sqrt(abar[i])).clamp(-1, 1)
        eps = (x - math.sqrt(abar[i]) * x0) / math.sqrt(1 - abar[i])
        x = math.sqrt(before[i]) * x0 + math.sqrt(1 - before[i]) * eps
    return x
