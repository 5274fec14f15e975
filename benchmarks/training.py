"""Rows of training: forward, backward, AdamW, averaged weights."""

from collections.abc import Callable

import numpy as np

from benchmarks.device import CPU, Device, Program, Work
from benchmarks.sides import Row, diffusers_stage, our_task, random_params, shapes, with_empty
from benchmarks.sizes import LENGTH


def our_training(task, batch: dict, device: Device, average: bool = True) -> Work:
    """`train_step.make_train_step` as the loop runs it, on a batch that is encoded already."""
    from types import SimpleNamespace

    import jax

    from unclip_jax import optim
    from unclip_jax.compiling import compiled, trim
    from unclip_jax.train_step import init_state, make_train_step

    tx, decay = optim.make(1000, lr=1e-4, weight_decay=0.01), 0.999 * average
    given = random_params(shapes(task, np.float32)) if device.half else None

    def start(given):
        made = SimpleNamespace(init=lambda key: task.init(key) if given is None else given)
        return init_state(made, tx, jax.random.key(0), decay)

    stepped = SimpleNamespace(loss=task.loss, encode=lambda frozen, batch: batch)
    program, batch = Program(make_train_step(stepped, tx, decay, 0), donate_argnums=0), jax.device_put(batch)
    program.compile(jax.eval_shape(start, given), {}, batch, np.int32(0))
    first = compiled(jax.jit(start).lower(given))
    held = [jax.block_until_ready(first(given)), np.int32(0)]
    del start, first, given
    trim()

    def run():
        for _ in range(device.train_steps):
            held[0], metrics = program(held[0], {}, batch, held[1])
            held[1] += np.int32(1)
        return float(jax.block_until_ready((held[0], metrics["loss"]))[1])

    return Work(run, program, times=device.train_steps)


def their_training(models: tuple, loss: Callable, device: Device, average: bool = True):
    """The same by torch: loss().backward(), clipping, AdamW (fused), and diffusers' EMAModel."""
    import torch

    params = [p for model in models for p in model.train().parameters()]
    optimizer = torch.optim.AdamW(params, lr=1e-4, weight_decay=0.01, fused=True)
    if average:
        from diffusers.training_utils import EMAModel

        ema = EMAModel(params, decay=0.999, foreach=device.half)

    def step():
        optimizer.zero_grad(set_to_none=True)
        with device.autocast():
            value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        if average:
            ema.step(params)
        return value.detach()

    def run():
        for _ in range(device.train_steps):
            value = step()
        device.wait()
        return float(value)

    return run


def remat(device: Device) -> str:
    """Of our Transformers: a CPU is as fast or faster to compute norms and activations again as to fetch them."""
    return "dots" if device is CPU else "none"


def described(batch: int, device: Device, px: int | None = None) -> str:
    """Shapes and counts, for the table."""
    parts = [f"{px} px"] * (px is not None) + [f"batch {batch}"]
    return ", ".join(parts + [f"{device.train_steps} steps"] * (device.train_steps > 1))


def prior_training(s: dict, device: Device, batch: int) -> Row:
    """Mean squared error of z_img."""
    data = with_empty(s, batch)

    def theirs(models):
        import torch
        from diffusers import UnCLIPScheduler

        given = {name: device.tensor(data[name], training=True) for name in ("z_img", "z_txt", "states", "mask")}
        noiser = UnCLIPScheduler()

        def loss():
            t = torch.randint(0, 1000, (batch,), device=device.torch)
            xt = noiser.add_noise(given["z_img"], torch.randn_like(given["z_img"]), t)
            fixed = dict(encoder_hidden_states=given["states"], attention_mask=given["mask"])
            out = models[0](xt, timestep=t, proj_embedding=given["z_txt"], **fixed).predicted_image_embedding
            return torch.nn.functional.mse_loss(out, given["z_img"])

        return their_training(models, loss, device)

    def peer():
        return diffusers_stage(s, "prior", device, training=True)

    return Row(
        "prior-train-step", "diffusers", described(batch, device), peer, theirs,
        lambda _: our_training(our_task(s, "prior", device, remat=remat(device)), data, device),
    )  # fmt: skip


def prior_training_of_dalle2_pytorch(s: dict, device: Device, batch: int) -> Row:
    """The same against DALLE2-pytorch, at its own form of that width, depth and heads."""
    sizes = {**s["prior"], "embed_dim": s["prior"]["width"]}  # the peer's embeddings are as wide as its tokens
    s = {**s, "prior": sizes}
    data = with_empty(s, batch)

    def peer():
        from dalle2_pytorch import DiffusionPrior, DiffusionPriorNetwork

        width, heads = sizes["width"], sizes["heads"]
        form = dict(dim=width, depth=sizes["layers"], heads=heads, dim_head=width // heads, max_text_len=LENGTH)

        def make():
            net = DiffusionPriorNetwork(num_timesteps=1000, **form)
            return DiffusionPrior(net=net, image_embed_dim=width, timesteps=1000, cond_drop_prob=0.1)

        return (device.network(make, training=True),)

    def theirs(models):
        given = {name: device.tensor(data[name], training=True) for name in ("z_img", "z_txt", "states")}

        def loss():
            return models[0](
                text_embed=given["z_txt"], text_encodings=given["states"], image_embed=given["z_img"].clone()
            )

        return their_training(models, loss, device)

    return Row(
        "prior-train-step-dalle2-pytorch", "DALLE2-pytorch", described(batch, device), peer, theirs,
        lambda _: our_training(our_task(s, "prior", device, remat=remat(device)), data, device),
    )  # fmt: skip


def decoder_training(s: dict, device: Device, batch: int) -> Row:
    """Mean squared error of eps; the variance's channels are there and not trained."""
    data, side = with_empty(s, batch), s["side"]
    image = np.random.default_rng(0).uniform(-1, 1, (batch, side, side, 3)).astype(np.float32)

    def theirs(models):
        import torch
        from diffusers import UnCLIPScheduler

        text_proj, unet = models
        given = {name: device.tensor(data[name], training=True) for name in ("z_img", "z_txt", "states", "mask")}
        x0 = device.tensor(image, training=True).permute(0, 3, 1, 2).contiguous()
        noiser = UnCLIPScheduler()

        def loss():
            context, emb = text_proj(
                image_embeddings=given["z_img"], prompt_embeds=given["z_txt"],
                text_encoder_hidden_states=given["states"], do_classifier_free_guidance=False,
            )  # fmt: skip
            seen = torch.nn.functional.pad(given["mask"], (4, 0), value=True)
            t, noise = torch.randint(0, 1000, (batch,), device=device.torch), torch.randn_like(x0)
            xt = noiser.add_noise(x0, noise, t)
            out = unet(xt, t, context, class_labels=emb, attention_mask=seen).sample
            return torch.nn.functional.mse_loss(out[:, :3], noise)

        return their_training(models, loss, device)

    def ours(_):
        import dataclasses

        task = dataclasses.replace(our_task(s, "decoder", device), vlb_weight=0.0)
        return our_training(task, {**data, "image": image}, device)

    def peer():
        return diffusers_stage(s, "decoder", device, training=True)

    return Row("decoder-train-step", "diffusers", described(batch, device, side), peer, theirs, ours)


def clip_training(s: dict, device: Device, batch: int) -> Row:
    """The contrastive loss; no averaged weights, as open_clip and the paper's CLIP have none."""
    sizes = s["clip"]
    vision, text = sizes["vision"], sizes["text"]
    rng = np.random.default_rng(0)
    image = 2 * rng.random((batch, vision["image_size"], vision["image_size"], 3), np.float32) - 1
    tokens = rng.integers(1, text["vocab_size"] - 1, (batch, LENGTH)).astype(np.int32)
    tokens[:, -1] = text["vocab_size"] - 1

    def peer():
        from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

        head = vision["width"] // vision["heads"]
        sees = dict(layers=vision["layers"], width=vision["width"], head_width=head, patch_size=vision["patch"])
        reads = dict(context_length=LENGTH, vocab_size=text["vocab_size"], width=text["width"])
        reads |= dict(heads=text["heads"], layers=text["layers"])
        sees["image_size"] = vision["image_size"]
        make = lambda: CLIP(sizes["embed_dim"], CLIPVisionCfg(**sees), CLIPTextCfg(**reads))  # noqa: E731
        return (device.network(make, training=True),)

    def theirs(models):
        from open_clip.loss import ClipLoss

        of = ClipLoss()
        seen, read = device.tensor(image, training=True).permute(0, 3, 1, 2).contiguous(), device.tensor(tokens).long()
        return their_training(models, lambda: of(*models[0](seen, read)), device, average=False)

    def ours(_):
        from unclip_jax.models.clip import CLIP
        from unclip_jax.tasks.clip import ClipTask

        towers = {name: {**sizes[name], "remat": remat(device)} for name in ("vision", "text")}
        clip = CLIP(**{**sizes, **towers}, dtype=device.dtype)
        batch = {"image": image, "tokens": tokens, "mask": tokens > 0}
        return our_training(ClipTask(clip), batch, device, average=False)

    return Row("clip-train-step", "open_clip", described(batch, device, vision["image_size"]), peer, theirs, ours)
