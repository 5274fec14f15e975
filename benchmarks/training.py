"""Rows of training: forward, backward, AdamW, averaged weights."""

from collections.abc import Callable

import numpy as np

from benchmarks.sides import Row, diffusers_stage, our_task, with_empty
from benchmarks.sizes import LENGTH


def our_training(task, batch: dict):
    """`train.make_train_step` as the loop runs it, on a batch that is encoded already."""
    from types import SimpleNamespace

    import jax

    from unclip_jax import optim
    from unclip_jax.train import init_state, make_train_step

    task = SimpleNamespace(init=task.init, loss=task.loss, encode=lambda frozen, batch: batch)
    tx = optim.make(1000, lr=1e-4, weight_decay=0.01)
    state = jax.jit(lambda: init_state(task, tx, jax.random.key(0)))()
    step = jax.jit(make_train_step(task, tx, 0.999, 0), donate_argnums=0)
    held, batch = [state, 0], jax.tree.map(jax.numpy.asarray, batch)

    def run():
        held[0], metrics = step(held[0], {"clip": {}}, batch, held[1])
        held[1] += 1
        return float(metrics["loss"])

    return run


def their_training(model, loss: Callable, average: bool = True):
    """The same by torch: loss().backward(), clipping, AdamW (fused), and diffusers' EMAModel."""
    import torch

    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01, fused=True)
    if average:
        from diffusers.training_utils import EMAModel

        ema = EMAModel(model.parameters(), decay=0.999)

    def run():
        optimizer.zero_grad(set_to_none=True)
        value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if average:
            ema.step(model.parameters())
        return float(value.detach())

    return run


def prior_training(s: dict, batch: int = 8) -> Row:
    """Mean squared error of z_img."""
    data = with_empty(s, batch)

    def theirs(models):
        import torch
        from diffusers import UnCLIPScheduler

        given = {name: torch.from_numpy(data[name]) for name in ("z_img", "z_txt", "states", "mask")}
        noiser = UnCLIPScheduler()

        def loss():
            t = torch.randint(0, 1000, (batch,))
            xt = noiser.add_noise(given["z_img"], torch.randn_like(given["z_img"]), t)
            fixed = dict(encoder_hidden_states=given["states"], attention_mask=given["mask"])
            out = models[0](xt, timestep=t, proj_embedding=given["z_txt"], **fixed).predicted_image_embedding
            return torch.nn.functional.mse_loss(out, given["z_img"])

        return their_training(models[0], loss)

    return Row(
        "prior-train-step", "diffusers", f"batch {batch}", lambda: diffusers_stage(s, "prior"), theirs,
        lambda _: our_training(our_task(s, "prior"), data),
    )  # fmt: skip


def prior_training_of_dalle2_pytorch(s: dict, batch: int = 8) -> Row:
    """The same against DALLE2-pytorch, at its own form of that width, depth and heads."""
    sizes = {**s["prior"], "embed_dim": s["prior"]["width"]}  # the peer's embeddings are as wide as its tokens
    s = {**s, "prior": sizes}
    data = with_empty(s, batch)

    def peer():
        from dalle2_pytorch import DiffusionPrior, DiffusionPriorNetwork

        width, heads = sizes["width"], sizes["heads"]
        form = dict(dim=width, depth=sizes["layers"], heads=heads, dim_head=width // heads, max_text_len=LENGTH)
        net = DiffusionPriorNetwork(num_timesteps=1000, **form)
        return (DiffusionPrior(net=net, image_embed_dim=width, timesteps=1000, cond_drop_prob=0.1),)

    def theirs(models):
        import torch

        given = {name: torch.from_numpy(data[name]) for name in ("z_img", "z_txt", "states")}

        def loss():
            return models[0](
                text_embed=given["z_txt"], text_encodings=given["states"], image_embed=given["z_img"].clone()
            )

        return their_training(models[0], loss)

    return Row(
        "prior-train-step-dalle2-pytorch", "DALLE2-pytorch", f"batch {batch}", peer, theirs,
        lambda _: our_training(our_task(s, "prior"), data),
    )  # fmt: skip


def decoder_training(s: dict, batch: int = 4) -> Row:
    """Mean squared error of eps; the variance's channels are there and not trained."""
    data, side = with_empty(s, batch), s["side"]
    image = np.random.default_rng(0).uniform(-1, 1, (batch, side, side, 3)).astype(np.float32)

    def theirs(models):
        import torch
        from diffusers import UnCLIPScheduler

        text_proj, unet = models
        given = {name: torch.from_numpy(data[name]) for name in ("z_img", "z_txt", "states", "mask")}
        x0, noiser = torch.from_numpy(image).permute(0, 3, 1, 2).contiguous(), UnCLIPScheduler()
        both = torch.nn.ModuleList(models)

        def loss():
            context, emb = text_proj(
                image_embeddings=given["z_img"], prompt_embeds=given["z_txt"],
                text_encoder_hidden_states=given["states"], do_classifier_free_guidance=False,
            )  # fmt: skip
            seen = torch.nn.functional.pad(given["mask"], (4, 0), value=True)
            t, noise = torch.randint(0, 1000, (batch,)), torch.randn_like(x0)
            xt = noiser.add_noise(x0, noise, t)
            out = unet(xt, t, context, class_labels=emb, attention_mask=seen).sample
            return torch.nn.functional.mse_loss(out[:, :3], noise)

        return their_training(both, loss)

    def ours(_):
        import dataclasses

        task = dataclasses.replace(our_task(s, "decoder"), vlb_weight=0.0)
        return our_training(task, {**data, "image": image})

    what = f"{side} px, batch {batch}"
    return Row("decoder-train-step", "diffusers", what, lambda: diffusers_stage(s, "decoder"), theirs, ours)


def clip_training(s: dict, batch: int = 16) -> Row:
    """The contrastive loss; open_clip keeps no averaged weights, we do."""
    sizes = s["clip"]
    vision, text = sizes["vision"], sizes["text"]
    rng = np.random.default_rng(0)
    image = rng.uniform(-1, 1, (batch, vision["image_size"], vision["image_size"], 3)).astype(np.float32)
    tokens = rng.integers(1, text["vocab_size"] - 1, (batch, LENGTH)).astype(np.int32)
    tokens[:, -1] = text["vocab_size"] - 1

    def peer():
        from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

        head = vision["width"] // vision["heads"]
        sees = dict(layers=vision["layers"], width=vision["width"], head_width=head, patch_size=vision["patch"])
        reads = dict(context_length=LENGTH, vocab_size=text["vocab_size"], width=text["width"])
        reads |= dict(heads=text["heads"], layers=text["layers"])
        sees["image_size"] = vision["image_size"]
        return (CLIP(sizes["embed_dim"], CLIPVisionCfg(**sees), CLIPTextCfg(**reads)),)

    def theirs(models):
        import torch
        from open_clip.loss import ClipLoss

        of = ClipLoss()
        seen, read = torch.from_numpy(image).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(tokens).long()
        return their_training(models[0], lambda: of(*models[0](seen, read)), average=False)

    def ours(_):
        from unclip_jax.models.clip import CLIP
        from unclip_jax.tasks.clip import ClipTask

        return our_training(ClipTask(CLIP(**sizes)), {"image": image, "tokens": tokens, "mask": tokens > 0})

    return Row("clip-train-step", "open_clip", f"{vision['image_size']} px, batch {batch}", peer, theirs, ours)
