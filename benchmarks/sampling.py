"""Rows of drawing: the prior, the decoder, the upsampler, a whole prompt."""

import numpy as np

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
