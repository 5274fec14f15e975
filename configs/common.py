"""What all configs share. A block holds exactly the keywords of one constructor; None stands where a stage has none."""

from ml_collections import ConfigDict

SCHEDULE_STEPS = 1000
GUIDED = dict(rescale=0.0, interval=None, threshold=None)  # of `sampler` where diffusion is guided: guidance as it is
TOKENIZER_OF_CLIP = dict(path="", vocab_size=0, max_len=0)  # none of its own: the stage learns against a CLIP


def base(task: str, **blocks) -> ConfigDict:
    """The defaults of a run of `task`, with `blocks` over them; a dict is merged into the dict it meets.

    Blocks: model (the network), diffusion (make_schedule), objective and sampler (the Task), data (data.make), loader
    (loader.batches), tokenizer, optim (optim.make), mesh (make_mesh), every (in steps; 0 = no preview, no eval), eval.
    """
    config = {
        "task": task,
        "seed": 0,
        "batch_size": 64,
        "num_steps": 1000,
        "clip": "",  # workdir of a CLIP run, or a stack: what the prior and the decoder learn against
        "clip_identity": "",  # filled in by training, as is data_identity
        "data_identity": "",  # how many records there are, and what tells them from others; "" where `data` says it all
        "init": "",  # workdir of a run of this stage, or a stack: weights to start from instead of random ones
        "init_partly": False,  # arrays missing in `init` start random, and further ones are left out
        "ema_decay": 0.999,
        "keep": 2,
        "track": "",  # project of Weights & Biases that metrics and previews are sent to as well
        "data": {"source": "shapes", "split": "train", "size": 64, "seed": 0},
        "loader": {"num_workers": 0, "num_threads": 2, "crop": None},
        "tokenizer": None,
        "optim": {
            "name": "adamw",
            "lr": 1e-3,
            "warmup": 100,
            "schedule": "cosine",
            "final": 0.0,
            "weight_decay": 0.01,
            "b1": 0.9,
            "b2": 0.99,
            "eps": 1e-8,
            "clip_norm": 1.0,
            "accumulate": 1,
            "sam_rho": 0.0,
        },
        "mesh": {"data": -1, "fsdp": 1, "tensor": 1},
        "rules": ((".*", "fsdp"),),
        "every": {"log": 50, "save": 500, "preview": 500, "eval": 500},
        "eval": {"split": "test", "batches": 2, "preview": 8},
    }
    for name, block in blocks.items():
        both = isinstance(block, dict) and isinstance(config.get(name), dict)
        config[name] = {**config[name], **block} if both else block
    return ConfigDict(config)


def choose(variant: str, variants: dict[str, dict]) -> dict:
    """The named variant's settings; "" is the first. ValueError lists the names."""
    if variant and variant not in variants:
        raise ValueError(f"unknown variant '{variant}'; use one of {', '.join(variants)}")
    return variants[variant or next(iter(variants))]
