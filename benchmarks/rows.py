"""What `benchmarks.run` compares: each row is a piece of work done by us and by a peer.

Where both have the same network (diffusers; open_clip) they have the same weights, random ones, drawn by the peer and
converted. Inputs are random and of the same shapes. A row's sides are made apart, so that one can be measured alone.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from benchmarks.sizes import LENGTH, SIZES

GUIDANCE = {"prior": 4.0, "decoder": 8.0}
STEPS = {"decoder": 25, "upsampler": 7}


class Row(NamedTuple):
    """One comparison. `peer()` makes the peer's networks, `theirs(networks)` and `ours(networks | None)` what is timed.

    Without networks our weights are zeros, which take the same time and memory.
    """

    name: str
    package: str  # whose
    what: str  # shapes and counts, for the table
    peer: Callable[[], tuple]
    theirs: Callable[[tuple], Callable[[], Any]]
    ours: Callable[[tuple | None], Callable[[], Any]]


def rows(size: str) -> list[Row]:
    """All rows at a size of `sizes.SIZES`."""
    s = SIZES[size]
    batches = [1, 2] if size == "tiny" else [1, 4, 32]
    counts = [2] if size == "tiny" else [25, 64]
    made = [prior_sampling(s, steps, batch) for steps in counts for batch in batches]
    made += [decoder_step(s), decoder_sampling(s), upsampling(s), whole_prompt(s)]
    made += [prior_training(s), prior_training_of_dalle2_pytorch(s), decoder_training(s), clip_training(s)]
    return made


# Inputs.


def texts(s: dict, batch: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Captions as CLIP tells of them: states, mask, z_txt, z_img, tokens (not read)."""
    rng, d = np.random.default_rng(seed), s["prior"]["embed_dim"]
    normal = lambda *shape: rng.standard_normal(shape, np.float32)  # noqa: E731
    mask = np.arange(LENGTH)[None] < rng.integers(8, LENGTH, batch)[:, None]
    tokens = np.zeros((batch, LENGTH), np.int32)
    made = {"states": normal(batch, LENGTH, d), "mask": mask, "z_txt": normal(batch, d), "z_img": normal(batch, d)}
    return {**made, "tokens": tokens}


def with_empty(s: dict, batch: int) -> dict:
    """`texts`, and those of the empty caption, as guided sampling takes them."""
    return {**texts(s, batch), "empty": {k: v for k, v in texts(s, batch, 1).items() if k != "z_img"}}


def halves(cond: dict, *names: str) -> list:
    """torch tensors of the empty captions and, behind them, the given ones."""
    import torch

    return [torch.from_numpy(np.concatenate([cond["empty"][n], cond[n]])) for n in names]


# Both sides' networks.


def tensors(models: tuple) -> Callable[[str], tuple]:
    """Parameters of ours from diffusers' networks, by the stage's name."""
    from flax.traverse_util import unflatten_dict

    from unclip_jax.interop.karlo_tables import TABLES, decoder_shapes, prior_shapes, upsampler_shapes
    from unclip_jax.interop.layout import read

    def convert(stage, *of):
        shapes = {"prior": prior_shapes, "decoder": decoder_shapes, "upsampler": upsampler_shapes}[stage](*of)
        out = {}
        for (_, table), model in zip(TABLES[stage](shapes).items(), models, strict=True):
            arrays = {name: p.detach().numpy() for name, p in model.state_dict().items()}
            out |= read(table, {e.path: shapes[e.path] for e in table}, arrays, arrays.__getitem__)
        return unflatten_dict(out, sep="/")

    return convert


def on_device(task, converted=None):
    """A task's parameters: these, or zeros."""
    import jax
    import jax.numpy as jnp

    if converted is not None:
        return jax.tree.map(jnp.asarray, converted)
    return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(task.init, jax.random.key(0)))


def diffusers_model(cls: str, config: dict):
    """A network of diffusers with random weights, for sampling."""
    import diffusers
    from diffusers.pipelines.deprecated.unclip import UnCLIPTextProjModel

    made = UnCLIPTextProjModel if cls == "UnCLIPTextProjModel" else getattr(diffusers, cls)
    return made.from_config(config).eval()


def diffusers_stage(s: dict, stage: str) -> tuple:
    """diffusers' networks of one stage, in the order that the converter wants them in."""
    from unclip_jax.interop import karlo_json

    if stage == "prior":
        return (diffusers_model("PriorTransformer", karlo_json.prior_json(s["prior"])),)
    if stage == "decoder":
        unet, text_proj = karlo_json.decoder_json(s["decoder"], s["side"])
        models = {"UnCLIPTextProjModel": text_proj, "UNet2DConditionModel": unet}
        return tuple(diffusers_model(cls, config) for cls, config in models.items())
    config = karlo_json.upsampler_json(s["upsampler"], s["large"])
    return tuple(diffusers_model("UNet2DModel", config) for _ in range(2))


def our_task(s: dict, stage: str, steps: int = 1):
    """Our task of one stage, in Karlo's form; without a CLIP, as what CLIP says is given."""
    from types import SimpleNamespace

    from unclip_jax.diffusion.schedule import make_schedule
    from unclip_jax.models.decoder import Decoder
    from unclip_jax.models.prior import Prior
    from unclip_jax.models.unet import UNet
    from unclip_jax.tasks.decoder import DecoderTask
    from unclip_jax.tasks.prior_diffusion import PriorTask
    from unclip_jax.tasks.upsampler import UpsamplerTask

    schedule, width = make_schedule("cosine"), s["prior"]["embed_dim"]
    clip = SimpleNamespace(embed_dim=width, text={"max_len": LENGTH, "width": width}, vision=None)
    sampler = {"name": "ddpm", "steps": steps}
    if stage == "prior":
        sampler |= {"guidance": GUIDANCE["prior"], "candidates": 1}
        return PriorTask(Prior(**s["prior"]), schedule, clip, sampler, empty_caption=True)
    if stage == "decoder":
        sampler |= {"guidance": GUIDANCE["decoder"]}
        return DecoderTask(Decoder(**s["decoder"]), schedule, clip, s["side"], sampler, empty_caption=True)
    factor = s["large"] // s["side"]
    return UpsamplerTask(UNet(**s["upsampler"]), schedule, s["large"], sampler, factor=factor, last_steps=1)


def our_params(s: dict, stage: str, models: tuple | None, task):
    """Our parameters of one stage, those of diffusers' networks if given."""
    if models is None:
        return on_device(task)
    sizes = {"prior": (s["prior"],), "decoder": (s["decoder"], s["side"]), "upsampler": (s["upsampler"],)}
    return on_device(task, tensors(models)(stage, *sizes[stage]))


def our_sampling(s: dict, stage: str, models: tuple | None, steps: int, cond: dict, batch: int):
    """One compiled program, all steps in it; the result is waited for."""
    import jax

    task = our_task(s, stage, steps)
    params, keys = our_params(s, stage, models, task), jax.random.split(jax.random.key(0), batch)
    program = jax.jit(task.sample)
    return lambda: np.asarray(program(params, cond, keys))


# diffusers' loops, those of UnCLIPPipeline.


def scheduler(stage: str, steps: int):
    """UnCLIPScheduler as Karlo's pipelines set it."""
    from diffusers import UnCLIPScheduler

    kinds = {
        "prior": dict(variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=5.0),
        "decoder": dict(variance_type="learned_range", prediction_type="epsilon"),
        "upsampler": dict(variance_type="fixed_small_log", prediction_type="epsilon"),
    }
    made = UnCLIPScheduler(**kinds[stage])
    made.set_timesteps(steps)
    return made


def their_loop(stage: str, steps: int, shape: tuple, predict: Callable):
    """predict(x, t, last) → what the scheduler takes, at each step."""
    import torch

    def run():
        made = scheduler(stage, steps)
        times = made.timesteps
        x = torch.randn(shape)
        with torch.inference_mode():
            for i, t in enumerate(times):
                before = times[i + 1] if i + 1 < len(times) else None
                x = made.step(predict(x, t, before is None), t, x, prev_timestep=before).prev_sample
        return x.numpy()

    return run


# Rows.


def prior_sampling(s: dict, steps: int, batch: int) -> Row:
    """Guided sampling of z_img."""
    cond, d = with_empty(s, batch), s["prior"]["embed_dim"]

    def theirs(models):
        import torch

        states, mask, z_txt = halves(cond, "states", "mask", "z_txt")
        fixed = dict(proj_embedding=z_txt, encoder_hidden_states=states, attention_mask=mask)

        def predict(x, t, last):
            u, c = models[0](torch.cat([x, x]), timestep=t, **fixed).predicted_image_embedding.chunk(2)
            return u + GUIDANCE["prior"] * (c - u)

        return their_loop("prior", steps, (batch, d), predict)

    return Row(
        f"prior-{steps}-steps-batch-{batch}", "diffusers", f"{steps} steps, guided, batch {batch}",
        lambda: diffusers_stage(s, "prior"), theirs,
        lambda models: our_sampling(s, "prior", models, steps, cond, batch),
    )  # fmt: skip


def their_decoder(models, cond):
    """predict of `their_loop`; what does not change is computed once, as UnCLIPPipeline does."""
    import torch

    text_proj, unet = models
    with torch.inference_mode():
        states, mask, z_txt = halves(cond, "states", "mask", "z_txt")
        context, emb = text_proj(
            image_embeddings=torch.from_numpy(cond["z_img"]), prompt_embeds=z_txt, text_encoder_hidden_states=states,
            do_classifier_free_guidance=True,
        )  # fmt: skip
        seen = torch.nn.functional.pad(mask, (4, 0), value=True)

    def predict(x, t, last=False):
        out = unet(torch.cat([x, x]), t, context, class_labels=emb, attention_mask=seen).sample
        (u, _), (c, var) = (half.split(3, dim=1) for half in out.chunk(2))
        return torch.cat([u + GUIDANCE["decoder"] * (c - u), var], dim=1)

    return predict


def decoder_step(s: dict) -> Row:
    """One guided evaluation of the decoder's network."""
    cond, shape = with_empty(s, 1), (1, 3, s["side"], s["side"])

    def theirs(models):
        import torch

        predict, x = their_decoder(models, cond), torch.randn(shape)

        def run():
            with torch.inference_mode():
                return predict(x, torch.tensor(500)).numpy()

        return run

    def ours(models):
        import jax

        from unclip_jax.diffusion.guide import guide_batched

        task = our_task(s, "decoder")
        params = our_params(s, "decoder", models, task)
        shared = jax.jit(lambda params, cond: task.condition(params, cond, *[np.arange(2) < 1] * 2))
        twice = jax.tree.map(lambda a: np.concatenate([a, a]), cond)
        known = shared(params, twice)

        @jax.jit
        def step(params, known, x, time):
            return guide_batched(task._denoise(params, known, None), GUIDANCE["decoder"])(x, time)

        x, time = np.zeros((1, s["side"], s["side"], 3), np.float32), np.full((1,), 500, np.int32)
        return lambda: np.asarray(step(params, known, x, time).pred)

    name, what = "decoder-step", f"{s['side']} px, guided, batch 1"
    return Row(name, "diffusers", what, lambda: diffusers_stage(s, "decoder"), theirs, ours)


def decoder_sampling(s: dict, steps: int = STEPS["decoder"]) -> Row:
    """Guided sampling of a picture from z_img and caption."""
    cond, shape = with_empty(s, 1), (1, 3, s["side"], s["side"])
    return Row(
        f"decoder-{steps}-steps", "diffusers", f"{s['side']} px, guided, batch 1",
        lambda: diffusers_stage(s, "decoder"),
        lambda models: their_loop("decoder", steps, shape, their_decoder(models, cond)),
        lambda models: our_sampling(s, "decoder", models, steps, cond, 1),
    )  # fmt: skip


def upsampling(s: dict, steps: int = STEPS["upsampler"]) -> Row:
    """Super-resolution, the last step by a second network."""
    rng = np.random.default_rng(0)
    low = rng.uniform(-1, 1, (1, s["side"], s["side"], 3)).astype(np.float32)

    def theirs(models):
        import torch

        large = torch.nn.functional.interpolate(
            torch.from_numpy(low).permute(0, 3, 1, 2), size=[s["large"]] * 2, mode="bicubic", antialias=True
        )
        predict = lambda x, t, last: models[int(last)](torch.cat([x, large], 1), t).sample  # noqa: E731
        return their_loop("upsampler", steps, large.shape, predict)

    return Row(
        f"upsampler-{steps}-steps", "diffusers", f"{s['side']} to {s['large']} px, batch 1",
        lambda: diffusers_stage(s, "upsampler"), theirs,
        lambda models: our_sampling(s, "upsampler", models, steps, {"low": low}, 1),
    )  # fmt: skip


def whole_prompt(s: dict) -> Row:
    """UnCLIPPipeline from what CLIP says of one caption to the large picture."""
    cond, steps = with_empty(s, 1), {"prior": 25, **STEPS}
    stages = ("prior", "decoder", "upsampler")

    def peer():
        return tuple(diffusers_stage(s, stage) for stage in stages)

    def theirs(models):
        from diffusers.pipelines.deprecated.unclip import UnCLIPPipeline

        (prior,), (text_proj, decoder), (first, last) = models
        pipeline = UnCLIPPipeline(
            prior=prior, decoder=decoder, text_encoder=None, tokenizer=None, text_proj=text_proj,
            super_res_first=first, super_res_last=last, prior_scheduler=scheduler("prior", steps["prior"]),
            decoder_scheduler=scheduler("decoder", steps["decoder"]),
            super_res_scheduler=scheduler("upsampler", steps["upsampler"]),
        )  # fmt: skip
        pipeline.set_progress_bar_config(disable=True)
        z_txt, states, mask = halves(cond, "z_txt", "states", "mask")
        pipeline._encode_prompt = lambda *_: (z_txt, states, mask)
        counts = {
            "prior_num_inference_steps": steps["prior"],
            "decoder_num_inference_steps": steps["decoder"],
            "super_res_num_inference_steps": steps["upsampler"],
        }
        return lambda: pipeline(prompt=["caption"], output_type="np", **counts).images

    def ours(models):
        import jax

        given = dict(zip(stages, models or [None] * 3, strict=True))
        tasks = {stage: our_task(s, stage, steps[stage]) for stage in stages}
        params = {stage: our_params(s, stage, given[stage], tasks[stage]) for stage in stages}
        program = {stage: jax.jit(tasks[stage].sample) for stage in stages}
        keys = jax.random.split(jax.random.key(0), 1)

        def run():
            z_img = program["prior"](params["prior"], cond, keys)
            low = program["decoder"](params["decoder"], {**cond, "z_img": z_img}, keys)
            return np.asarray(program["upsampler"](params["upsampler"], {"low": low}, keys))

        return run

    what = f"25 + 25 + 7 steps to {s['large']} px, from CLIP's words on"
    return Row("prompt", "diffusers' UnCLIPPipeline", what, peer, theirs, ours)


# Training: forward, backward, AdamW, averaged weights.


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
