"""What `benchmarks.run` compares: networks, as keywords of our modules, tiny (for tests), small, karlo; and batches."""

LENGTH = 77


def unet(channels, multipliers, attention, blocks, groups=32, **more) -> dict:
    """Keywords of `UNet`; `attention` are heights in pixels."""
    levels = {"channels": channels, "multipliers": multipliers, "attention": attention, "blocks": blocks}
    return {**levels, "groups": groups, **more}


def prior(embed_dim, width, layers, heads) -> dict:
    """Keywords of `Prior` in Karlo's form."""
    sizes = {"embed_dim": embed_dim, "width": width, "layers": layers, "heads": heads}
    return {**sizes, "max_len": LENGTH, "learned_null": False}


def decoder(embed_dim, context_width, net) -> dict:
    """Keywords of `Decoder` in Karlo's form."""
    form = {"text": None, "image_tokens": 4, "add_text_embedding": True}
    return {"embed_dim": embed_dim, "context_width": context_width, "unet": {**net, "out_channels": 6}, **form}


def clip(width, layers, heads, vocab_size, image_size, patch) -> dict:
    """Keywords of `CLIP`, both towers alike."""
    tower = {"width": width, "layers": layers, "heads": heads}
    vision = {**tower, "image_size": image_size, "patch": patch}
    return {"embed_dim": width, "vision": vision, "text": {**tower, "vocab_size": vocab_size, "max_len": LENGTH}}


# side: of the decoder's pictures; large: of the upsampler's.
SIZES = {
    "tiny": {
        "prior": prior(24, 32, 2, 4),
        "decoder": decoder(24, 40, unet(16, (1, 2), (4,), 1, 8, head_channels=16)),
        "upsampler": unet(16, (1, 2), (), 1, 8, out_channels=3),
        "clip": clip(32, 2, 2, 99, 16, 8),
        "side": 8,
        "large": 16,
    },
    "small": {
        "prior": prior(768, 768, 14, 12),
        "decoder": decoder(768, 768, unet(128, (1, 2, 3), (16, 8), 2, head_channels=64)),
        "upsampler": unet(32, (1, 2, 3, 4), (), 2, out_channels=3),
        "clip": clip(384, 6, 6, 8192, 64, 8),
        "side": 32,
        "large": 256,
    },
    "karlo": {
        "prior": prior(768, 2048, 20, 32),
        "decoder": decoder(768, 1536, unet(320, (1, 2, 3, 4), (32, 16, 8), 3, head_channels=64)),
        "upsampler": unet(320, (1, 2, 3, 4), (), 3, out_channels=3, scale_shift=False),
        "clip": clip(768, 12, 12, 49408, 224, 32),
        "side": 64,
        "large": 256,
    },
}

# By device, and for the tests.
BATCHES = {
    "cpu": {
        "prior": (1, 4, 32),
        "decoder": 1,
        "upsampler": 1,
        "prior-train": 8,
        "decoder-train": 4,
        "clip-train": 16,
    },
    "gpu": {
        "prior": (1, 4, 32),
        "decoder": 4,
        "upsampler": 4,
        "prior-train": 64,
        "decoder-train": 8,  # both sides on one card of 80 GB
        "clip-train": 256,
    },
    "tiny": {
        "prior": (1, 2),
        "decoder": 1,
        "upsampler": 1,
        "prior-train": 4,
        "decoder-train": 2,
        "clip-train": 4,
    },
}


def doubled(s: dict) -> dict:
    """A size whose decoder, the same network, draws pictures of twice the side."""
    net = s["decoder"]["unet"]
    net = {**net, "attention": tuple(2 * height for height in net["attention"])}
    return {**s, "decoder": {**s["decoder"], "unet": net}, "side": 2 * s["side"]}
