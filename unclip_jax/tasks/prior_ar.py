"""The autoregressive prior's training and sampling (unCLIP, section 2.2): z_img as codes, drawn one after another."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental.multihost_utils import process_allgather

from unclip_jax import pca
from unclip_jax.diffusion.guide import is_one, mix
from unclip_jax.errors import UserError, is_whole
from unclip_jax.models.clip import CLIP
from unclip_jax.models.prior_ar import PriorAR
from unclip_jax.nn.drawing import for_loops
from unclip_jax.tasks.embeddings import best, candidate_keys, cosines, matrix_picture, unit
from unclip_jax.tasks.teacher import ask, caption_of, vocabulary

PREPARE_BATCHES = 64


@dataclasses.dataclass(frozen=True)
class PriorARTask:
    """Cross-entropy of the codes of z_img: its principal components (`pca.PCA`) in buckets, largest variance first.

    Parameters are {"net": …, "mean": f32[D], "components": f32[D, K], "std": f32[K], "dots": f32[N - 1]}; all but
    the net are measured by `prepare` and get no gradient. `dots` parts the dot products z_txt · z_img of the data
    into N buckets that hold as many each.

    Attributes:
      clip: the frozen CLIP whose embeddings are modelled.
      text_drop: share of examples trained without caption, text embedding and dot product (the paper: 0.1).
      sampler: defaults of `sample`: temperature, top_p, guidance, candidates.
    """

    model: PriorAR
    clip: CLIP
    sampler: dict[str, Any]
    text_drop: float = 0.1

    @classmethod
    def from_config(cls, config, clip: CLIP):
        """`config.model.caption` says how the caption enters: "tokens" (the paper) or CLIP's "states"."""
        model = config.model.to_dict()
        for name, least, most in (("dims", 1, clip.embed_dim), ("buckets", 2, math.inf), ("dot_buckets", 2, math.inf)):
            value = model.get(name, least)
            if not is_whole(value, least, most):
                above = f" and at most {most}, the CLIP's width" if math.isfinite(most) else ""
                raise UserError(f"model.{name}={value!r} must be a whole number of at least {least}{above}")
        vocab_size = vocabulary(model.pop("caption"), clip)
        if model.get("text") is not None and not vocab_size:
            raise UserError("model.text encodes tokens, and model.caption is not 'tokens'", "set one of the two")
        net = PriorAR(clip.embed_dim, clip.text["max_len"], vocab_size=vocab_size, **model)
        return cls(net, clip, config.sampler.to_dict(), **config.objective)

    def init(self, rng):
        d, k, length = self.clip.embed_dim, self.model.dims, self.clip.text["max_len"]
        one = jnp.zeros((1,), jnp.int32)
        caption = jnp.zeros((1, length), jnp.int32)
        if not self.model.vocab_size:
            caption = jnp.zeros((1, length, self.clip.text["width"]))
        args = (jnp.zeros((1, k), jnp.int32), one, caption, jnp.ones((1, length), bool), jnp.zeros((1, d)), one == 0)
        net = self.model.init(rng, *args)["params"]
        edges = jnp.zeros((self.model.dot_buckets - 1,))
        return {"net": net, "mean": jnp.zeros((d,)), "components": jnp.eye(d, k), "std": jnp.ones((k,)), "dots": edges}

    def prepare(self, frozen, params, batches):
        """Principal components of z_img, and the quantiles of z_txt · z_img, over the first batches of the data."""

        @jax.jit
        def told(frozen, batch):
            batch = self.encode(frozen, batch)
            return *pca.batch_moments(batch["z_img"]), jnp.sum(batch["z_txt"] * batch["z_img"], -1)

        seen, dots = None, []
        for _ in range(PREPARE_BATCHES):
            mean, scatter, dot = process_allgather(told(frozen, next(batches)), tiled=True)
            seen = pca.merge(seen, len(dot), mean, scatter)
            dots.append(dot)
        n = self.model.dot_buckets
        edges = np.quantile(np.concatenate(dots).astype(np.float64), np.arange(1, n) / n)
        measured = {**pca.fit(seen).keep(self.model.dims)._asdict(), "dots": edges}
        return {**params, **{name: jnp.asarray(value, jnp.float32) for name, value in measured.items()}}

    def pca(self, params) -> pca.PCA:
        """The principal components that are kept with the weights."""
        return pca.PCA(*(params[name] for name in pca.PCA._fields))

    def encode(self, frozen, batch):
        return ask(self.clip, frozen["clip"], batch)

    def codes(self, params, z_img: jax.Array) -> jax.Array:
        """z_img f32[B, D] → i32[B, K]."""
        return pca.to_codes(self.pca(params).project(z_img), params["std"], self.model.buckets)

    def embedding(self, params, codes: jax.Array) -> jax.Array:
        """i32[B, K] → z_img f32[B, D]; of the codes of an embedding, that embedding but for what codes cannot hold."""
        return self.pca(params).back(pca.from_codes(codes, params["std"], self.model.buckets))

    def loss(self, params, batch, rng):
        codes = self.codes(params, batch["z_img"])
        dot = jnp.searchsorted(params["dots"], jnp.sum(batch["z_txt"] * batch["z_img"], -1))
        keep = jax.random.uniform(rng, dot.shape) >= self.text_drop
        args = (codes, dot, caption_of(self.model, batch), batch["mask"], batch["z_txt"], keep)
        logits = self.model.apply({"params": params["net"]}, *args)
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, codes)
        right = (logits.argmax(-1) == codes).mean(0)
        metrics = {"bits": nats.mean() / math.log(2), "accuracy": right.mean(), "accuracy_of_first": right[0]}
        return nats.mean(), metrics

    def sample(self, params, cond, keys, **over):
        """cond {tokens, mask, z_txt, states} of B captions → z_img f32[B, D].

        `candidates` embeddings are drawn for each caption, each with a dot product from the top half of the data's
        (the paper), and the one with the largest dot product with z_txt kept. The prefix of every caption is run once
        and shared by its candidates, and all share that of the dropped caption; every code is one token more against
        the keys and values of those before it.
        """
        settings = {**self.sampler, **over}
        candidates, guidance = settings["candidates"], settings["guidance"]
        b = cond["z_txt"].shape[0]
        keys = candidate_keys(keys, candidates)
        variables = {"params": for_loops(params["net"])}
        # With guidance one caption more, dropped: it is the same for all.
        halves = 1 if is_one(guidance) else 2
        args = (caption_of(self.model, cond), cond["mask"], cond["z_txt"])
        args = [jnp.concatenate([a, a[: halves - 1]]) for a in args]
        keep = jnp.arange(b + halves - 1) < b
        prefixes = self.model.apply(variables, *args, keep, (b, 1)[:halves], method="prefix")

        n = self.model.dot_buckets
        dot = jax.vmap(lambda key: jax.random.randint(jax.random.fold_in(key, 0), (), n // 2, n))(keys)
        first = [self.model.first(dot), self.model.first(None, len(dot))][:halves]

        def one_more(carry, place):
            token, own = carry
            logits, own = self.model.apply(variables, token, place, prefixes, own, method="step")
            if halves == 2:
                logits = mix(*jnp.split(logits, 2), guidance)
            chance = jax.vmap(lambda key: jax.random.fold_in(key, 1 + place))(keys)
            code = draw_code(logits, chance, settings["temperature"], settings["top_p"])
            return (jnp.concatenate([code] * halves), own), code

        start = jnp.concatenate(first), self.model.room(halves * len(keys))
        _, codes = jax.lax.scan(one_more, start, jnp.arange(self.model.dims))
        return best(self.embedding(params, codes.T), cond.get("near", cond["z_txt"]))

    def evaluate(self, params, batch, rng):
        """As of the diffusion prior; and the cosine of the true embedding with what its own codes hold of it."""
        b = batch["z_img"].shape[0]
        loss, metrics = self.loss(params, batch, rng)
        held = self.embedding(params, self.codes(params, batch["z_img"]))
        return {
            **cosines(self.sample(params, batch, jax.random.split(rng, b)), batch, params["mean"]),
            "cosine_of_codes": (jnp.sum(unit(held) * unit(batch["z_img"])), b),
            "bits": (metrics["bits"] * b, b),
            "accuracy": (metrics["accuracy"] * b, b),
            "loss": (loss * b, b),
        }

    def preview(self, params, batch, rng):
        """Cosines of drawn (rows) with true embeddings (columns), whitened; a bright diagonal is what is wanted."""
        z = self.sample(params, batch, jax.random.split(rng, batch["z_img"].shape[0]))
        drawn, true = (self.pca(params).project(a) / params["std"][None] for a in (z, batch["z_img"]))
        return matrix_picture(unit(drawn) @ unit(true).T)


def draw_code(logits: jax.Array, keys: jax.Array, temperature: float = 1.0, top_p: float = 1.0) -> jax.Array:
    """A code for each row of logits f32[B, V], by its own key → i32[B].

    Args:
      keys: key[B].
      temperature: divides the logits; 0 takes the likeliest code.
      top_p: in (0, 1]; only the likeliest codes that hold this much of the probability together may be drawn, the one
        that crosses it included (Holtzman et al. 2020).
    """
    if temperature == 0:
        return logits.argmax(-1).astype(jnp.int32)
    logits = logits / temperature
    if top_p < 1:
        order = jnp.argsort(-logits, axis=-1)  # of equal ones the first come first
        falling = jnp.take_along_axis(jax.nn.softmax(logits), order, axis=-1)
        kept = jnp.cumsum(falling, axis=-1) - falling < top_p
        kept = jnp.take_along_axis(kept, jnp.argsort(order, axis=-1), axis=-1)
        logits = jnp.where(kept, logits, -jnp.inf)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
