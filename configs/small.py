"""What the laptop-sized systems shapes, icons and folder share: the settings of each stage, and networks for 64 px.

Icons and folder take CLIP, prior and decoder at 64 px and an upsampler to 128; shapes has its own, 32 and 64 px.
A variant `v` holds a network's sizes, `batch_size`, `num_steps` and, where the stage samples, `steps`; `data` is the
block of that name.
"""

from configs import common

CLIP = {
    "laptop": dict(
        embed_dim=256,
        vision=dict(image_size=64, patch=8, width=128, layers=4, heads=4),
        text=dict(width=128, layers=3, heads=4),
        batch_size=256,
        num_steps=4000,
    ),
    "tiny": dict(
        embed_dim=32,
        vision=dict(image_size=64, patch=16, width=48, layers=2, heads=2),
        text=dict(width=48, layers=2, heads=2),
        batch_size=32,
        num_steps=100,
    ),
}
PRIOR = {
    "laptop": dict(width=192, layers=4, heads=6, batch_size=128, num_steps=8000, steps=25),
    "tiny": dict(width=48, layers=2, heads=2, batch_size=32, num_steps=100, steps=8),
}
PRIOR_AR = {
    "laptop": dict(dims=64, buckets=128, width=192, layers=4, heads=6, batch_size=128, num_steps=8000),
    "tiny": dict(dims=8, buckets=32, width=48, layers=2, heads=2, batch_size=32, num_steps=100),
}
DECODER = {
    "laptop": dict(
        unet=dict(channels=32, multipliers=(1, 2, 4), blocks=1, attention=(16, 8), head_channels=32, groups=8, patch=2),
        context_width=128,
        text=dict(layers=2, heads=4),
        batch_size=32,
        num_steps=16_000,
        steps=30,
    ),
    "tiny": dict(
        unet=dict(channels=16, multipliers=(1, 2), blocks=1, attention=(8,), head_channels=16, groups=4, patch=4),
        context_width=32,
        text=dict(layers=1, heads=2),
        batch_size=16,
        num_steps=50,
        steps=8,
    ),
}
UPSAMPLER = {
    "laptop": dict(channels=32, multipliers=(1, 2), blocks=1, groups=8, batch_size=32, num_steps=8000, steps=12),
    "tiny": dict(channels=16, multipliers=(1, 2), blocks=1, groups=4, batch_size=16, num_steps=50, steps=4),
}

PLAIN = dict(dtype="float32", remat="none")


def folder(size: int, captions: bool = True) -> dict:
    """The data block of one's own pictures; the path is given with --config.data.path=DIR."""
    return dict(source="folder", path="", size=size, captions=captions, max_bad=0.1)


def clip(v: dict, data: dict, vocab_size: int, max_len: int = 32):
    """CLIP, whose embeddings leave with norm sqrt(D); captions of at most `max_len` tokens."""
    return common.base(
        "clip",
        batch_size=v["batch_size"],
        num_steps=v["num_steps"],
        model=dict(
            embed_dim=v["embed_dim"],
            vision={"remat": "none", **v["vision"]},
            text={"remat": "none", **v["text"]},
            norm=v["embed_dim"] ** 0.5,
            dtype="float32",
        ),
        objective=dict(loss="softmax", chunk=0),
        tokenizer=dict(path="", vocab_size=vocab_size, max_len=max_len),
        data=data,
        optim=dict(lr=v.get("lr", 1e-3), warmup=min(100, v["num_steps"] // 4), weight_decay=0.1, b2=0.98),
        ema_decay=0.99,
        eval=dict(batches=4, preview=32),
    )


def prior(v: dict, data: dict):
    """The diffusion prior, unguided but where the variant says; captions and vocabulary are the CLIP's."""
    return common.base(
        "prior_diffusion",
        batch_size=v["batch_size"],
        num_steps=v["num_steps"],
        model=dict(caption="tokens", width=v["width"], layers=v["layers"], heads=v["heads"], **PLAIN),
        diffusion=dict(name="cosine", num_steps=common.SCHEDULE_STEPS),
        objective=dict(text_drop=0.1, clip_x0=5.0),
        sampler=dict(
            name="ddpm",
            steps=v["steps"],
            guidance=v.get("guidance", 1.0),
            candidates=v.get("candidates", 2),
            **common.GUIDED,
        ),
        tokenizer=common.TOKENIZER_OF_CLIP,
        data=data,
        optim=dict(lr=1e-3, warmup=min(200, v["num_steps"] // 4), weight_decay=0.06, b2=0.96, eps=1e-6),
        eval=dict(batches=2, preview=32),
    )


def prior_ar(v: dict, data: dict):
    """The autoregressive prior, unguided; captions and vocabulary are the CLIP's."""
    return common.base(
        "prior_ar",
        batch_size=v["batch_size"],
        num_steps=v["num_steps"],
        model=dict(caption="tokens", **{k: v[k] for k in ("dims", "buckets", "width", "layers", "heads")}, **PLAIN),
        objective=dict(text_drop=0.1),
        sampler=dict(temperature=1.0, top_p=1.0, guidance=1.0, candidates=v.get("candidates", 2)),
        tokenizer=common.TOKENIZER_OF_CLIP,
        data=data,
        optim=dict(lr=1e-3, warmup=min(200, v["num_steps"] // 4), weight_decay=0.04, b2=0.98),
        eval=dict(batches=2, preview=32),
    )


def decoder(v: dict, data: dict):
    """The decoder; captions and vocabulary are the CLIP's.

    It predicts x0, not eps as in the paper: flat drawings lie in few dimensions and noise in all, which a network with
    folded pixels and few channels has no room to carry through (Li & He 2025, arXiv 2511.13720). The variance is not
    learned, for small errors of x0 are vast at the last steps, where the bound divides them by the smallest variances.
    """
    if v["text"] is None:
        caption = {"text": None, "add_text_embedding": True}
    else:
        caption = {"text": {"remat": "none", **v["text"]}}
    return common.base(
        "decoder",
        batch_size=v["batch_size"],
        num_steps=v["num_steps"],
        model=dict(
            unet={"remat": "none", **v["unet"]}, context_width=v["context_width"], dtype="float32", **caption
        ),
        diffusion=dict(name="cosine", num_steps=common.SCHEDULE_STEPS, shift=v.get("shift", 1.0)),
        objective=dict(
            target="x0",
            weighting=v.get("weighting", "none"),
            clip_drop=v.get("clip_drop", 0.1),
            text_drop=v.get("text_drop", 0.5),
            vlb_weight=0.0,
            **({"inpaint": True} if v.get("inpaint") else {}),
        ),
        sampler=dict(name="ddpm", steps=v["steps"], guidance=2.0, **common.GUIDED),
        tokenizer=common.TOKENIZER_OF_CLIP,
        data=data,
        optim={"lr": 1e-3, "warmup": min(200, v["num_steps"] // 4), "weight_decay": 0.01, **v.get("optim", {})},
        every=dict(preview=1000, eval=1000),
    )


def upsampler(v: dict, data: dict, crop: int):
    """The upsampler by a factor of 2, trained on crops of `crop` pixels; it predicts x0, as the decoder does.

    Small pictures are blurred a little; or, with `degrade` in the variant, degraded so by the loader.
    """
    degrade = v.get("degrade")
    return common.base(
        "upsampler",
        batch_size=v["batch_size"],
        num_steps=v["num_steps"],
        model=dict({k: v[k] for k in ("channels", "multipliers", "blocks", "groups")}, patch=2, **PLAIN),
        diffusion=dict(name="cosine", num_steps=common.SCHEDULE_STEPS),
        objective=dict(
            factor=2,
            target="x0",
            weighting=v.get("weighting", "none"),
            vlb_weight=0.0,
            blur_share=0.0 if degrade else 0.5,
            **({"inpaint": True} if v.get("inpaint") else {}),
        ),
        sampler=dict(name="ddim", steps=v["steps"], threshold=None),
        data=data,
        loader=dict(crop=crop, degrade=degrade, factor=2),
        optim={"lr": 1e-3, "warmup": min(200, v["num_steps"] // 4), "weight_decay": 0.01, **v.get("optim", {})},
        every=dict(preview=1000, eval=1000),
    )
