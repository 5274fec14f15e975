"""Diffusion: schedules, losses, guidance and samplers over any denoiser `(xt, model_time) -> Out`."""
