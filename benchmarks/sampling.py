"""Rows of drawing: the prior, the decoder, the upsampler, a whole prompt."""

import numpy as np

from benchmarks.device import Device, Program, Work
from benchmarks.sides import (
    GUIDANCE,
    STEPS,
    Row,
    diffusers_stage,
    halves,
    our_params,
    our_sampling,
    our_task,
    scheduler,
    their_loop,
    with_empty,
)


def prior_sampling(s: dict, device: Device, steps: int, batch: int) -> Row:
    """Guided sampling of z_img."""
    cond, d = with_empty(s, batch), s["prior"]["embed_dim"]

    def theirs(models):
        import torch

        states, mask, z_txt = halves(device, cond, "states", "mask", "z_txt")
        fixed = dict(proj_embedding=z_txt, encoder_hidden_states=states, attention_mask=mask)

        def predict(x, t, last):
            u, c = models[0](torch.cat([x, x]), timestep=t, **fixed).predicted_image_embedding.chunk(2)
            return u + GUIDANCE["prior"] * (c - u)

        return their_loop("prior", steps, (batch, d), predict, device)

    return Row(
        f"prior-{steps}-steps-batch-{batch}", "diffusers", f"{steps} steps, guided, batch {batch}",
        lambda: diffusers_stage(s, "prior", device), theirs,
        lambda models: our_sampling(s, "prior", models, steps, cond, batch, device),
    )  # fmt: skip


def their_decoder(models, cond, device: Device):
    """predict of `their_loop`; what does not change is computed once, as UnCLIPPipeline does."""
    import torch

    text_proj, unet = models
    with torch.inference_mode():
        states, mask, z_txt = halves(device, cond, "states", "mask", "z_txt")
        context, emb = text_proj(
            image_embeddings=device.tensor(cond["z_img"]), prompt_embeds=z_txt, text_encoder_hidden_states=states,
            do_classifier_free_guidance=True,
        )  # fmt: skip
        seen = torch.nn.functional.pad(mask, (4, 0), value=True)

    def predict(x, t, last=False):
        out = unet(torch.cat([x, x]), t, context, class_labels=emb, attention_mask=seen).sample
        (u, _), (c, var) = (half.split(3, dim=1) for half in out.chunk(2))
        return torch.cat([u + GUIDANCE["decoder"] * (c - u), var], dim=1)

    return predict


def decoder_step(s: dict, device: Device, batch: int, suffix: str = "") -> Row:
    """One guided evaluation of the decoder's network."""
    cond, side = with_empty(s, batch), s["side"]

    def theirs(models):
        import torch

        predict, x = their_decoder(models, cond, device), device.noise((batch, 3, side, side))
        time = torch.tensor(500, device=device.torch)

        def run():
            with torch.inference_mode():
                out = predict(x, time)
            device.wait()
            return out

        return run

    def ours(models):
        import jax

        from unclip_jax.diffusion.guide import guide

        task = our_task(s, "decoder", device)
        params = our_params("decoder", models, task, device)
        keep = np.arange(2 * batch) < batch
        shared = jax.jit(lambda params, cond: task.condition(params, cond, keep, keep))
        known = shared(params, jax.tree.map(lambda a: np.concatenate([a, a]), cond))

        def step(params, known, x, time):
            return guide(task._denoise(params, known, None), GUIDANCE["decoder"])(x, time)

        x = np.random.default_rng(0).standard_normal((batch, side, side, 3), np.float32)
        x, time = jax.device_put((x, np.full((batch,), 500, np.int32)))
        program = Program(step)
        return Work(lambda: program(params, known, x, time).pred, program)

    name, what = f"decoder-step{suffix}", f"{side} px, guided, batch {batch}"
    return Row(name, "diffusers", what, lambda: diffusers_stage(s, "decoder", device), theirs, ours)


def decoder_sampling(s: dict, device: Device, batch: int, steps: int = STEPS["decoder"]) -> Row:
    """Guided sampling of pictures from z_img and caption."""
    cond, shape = with_empty(s, batch), (batch, 3, s["side"], s["side"])
    return Row(
        f"decoder-{steps}-steps", "diffusers", f"{s['side']} px, guided, batch {batch}",
        lambda: diffusers_stage(s, "decoder", device),
        lambda models: their_loop("decoder", steps, shape, their_decoder(models, cond, device), device),
        lambda models: our_sampling(s, "decoder", models, steps, cond, batch, device),
    )  # fmt: skip


def upsampling(s: dict, device: Device, batch: int, steps: int = STEPS["upsampler"]) -> Row:
    """Super-resolution, the last step by a second network."""
    rng = np.random.default_rng(0)
    low = rng.uniform(-1, 1, (batch, s["side"], s["side"], 3)).astype(np.float32)

    def theirs(models):
        import torch

        small = torch.from_numpy(low).permute(0, 3, 1, 2)
        large = torch.nn.functional.interpolate(small, size=[s["large"]] * 2, mode="bicubic", antialias=True)
        large = device.tensor(large.numpy())
        predict = lambda x, t, last: models[int(last)](torch.cat([x, large], 1), t).sample  # noqa: E731
        return their_loop("upsampler", steps, large.shape, predict, device)

    return Row(
        f"upsampler-{steps}-steps", "diffusers", f"{s['side']} to {s['large']} px, batch {batch}",
        lambda: diffusers_stage(s, "upsampler", device), theirs,
        lambda models: our_sampling(s, "upsampler", models, steps, {"low": low}, batch, device),
    )  # fmt: skip


def whole_prompt(s: dict, device: Device) -> Row:
    """UnCLIPPipeline from what CLIP says of one caption to the large picture."""
    cond, steps = with_empty(s, 1), {"prior": 25, **STEPS}
    stages = ("prior", "decoder", "upsampler")

    def peer():
        return tuple(diffusers_stage(s, stage, device) for stage in stages)

    def theirs(models):
        from diffusers.pipelines.deprecated.unclip import UnCLIPPipeline

        (prior,), (text_proj, decoder), (first, last) = models
        schedulers = {stage: scheduler(stage, steps[stage], device) for stage in stages}
        pipeline = UnCLIPPipeline(
            prior=prior, decoder=decoder, text_encoder=None, tokenizer=None, text_proj=text_proj,
            super_res_first=first, super_res_last=last, prior_scheduler=schedulers["prior"],
            decoder_scheduler=schedulers["decoder"], super_res_scheduler=schedulers["upsampler"],
        )  # fmt: skip
        pipeline.set_progress_bar_config(disable=True)
        z_txt, states, mask = halves(device, cond, "z_txt", "states", "mask")
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
        tasks = {stage: our_task(s, stage, device, steps[stage]) for stage in stages}
        params = {stage: our_params(stage, given[stage], tasks[stage], device) for stage in stages}
        program = {stage: Program(tasks[stage].sample) for stage in stages}
        keys, known = jax.random.split(jax.random.key(0), 1), jax.device_put(cond)

        def run():
            z_img = program["prior"](params["prior"], known, keys)
            low = program["decoder"](params["decoder"], {**known, "z_img": z_img}, keys)
            return np.asarray(program["upsampler"](params["upsampler"], {"low": low}, keys))

        return Work(run, *program.values())

    what = f"25 + 25 + 7 steps to {s['large']} px, from CLIP's words on"
    return Row("prompt", "diffusers' UnCLIPPipeline", what, peer, theirs, ours)
