"""Configs that training refuses, with what it says: what each changes in a stage's tiny config."""

import math

from tests import tiny_runs, toy


def changed(stage, changes):
    """The stage's config with values put past the checks of the command line."""
    config = toy.config() if stage == "toy" else tiny_runs.config(stage)
    with config.unlocked(), config.ignore_type():
        for key, value in changes.items():
            *blocks, name = key.split(".")
            block = config
            for part in blocks:
                block = block[part]
            block[name] = value
    return config


BAD = {
    "batch": ("toy", {"batch_size": 12}, "batch_size=12 must be a multiple of 8"),
    "no batch": ("toy", {"batch_size": 0}, "batch_size=0"),
    "no steps": ("toy", {"num_steps": 0}, "num_steps=0"),
    "many steps": ("toy", {"num_steps": 2**31}, "num_steps=2147483648 must be a whole number in 1 … 2147483647"),
    "part of a step": ("toy", {"num_steps": 8.5}, "num_steps=8.5 must be a whole number"),
    "steps below 0": ("toy", {"num_steps": -5}, "num_steps=-5"),
    "warmup": ("toy", {"optim.warmup": 99}, "optim.warmup=99 must not exceed the 8 updates"),
    "rate": ("toy", {"optim.lr": 0.0}, "optim.lr=0.0"),
    "rate nan": ("toy", {"optim.lr": math.nan}, "optim.lr=nan"),
    "rate type": ("toy", {"optim.lr": "abc"}, "optim.lr='abc'"),
    "schedule": ("toy", {"optim.schedule": "cosin"}, "did you mean 'cosine'"),
    "optim key": ("toy", {"optim.warm_up": 3}, "no key 'optim.warm_up'.* did you mean 'warmup'"),
    "loader key": ("toy", {"loader.threads": 3}, "no key 'loader.threads'"),
    "mesh key": ("toy", {"mesh.model": 3}, "no key 'mesh.model'"),
    "mesh": ("toy", {"mesh.fsdp": 3}, "mesh data=-1, fsdp=3, tensor=1 must multiply to the 8 devices"),
    "decay": ("toy", {"ema_decay": 1.0}, "ema_decay=1.0"),
    "log": ("toy", {"every.log": 0}, "every.log=0"),
    "eval": ("toy", {"every.eval": -1}, "every.eval=-1"),
    "keep": ("toy", {"keep": 0}, "keep=0"),
    "seed": ("toy", {"seed": -1}, "seed=-1"),
    "rule": ("toy", {"rules": (("nothing", "fsdp"), (".*", "fsdp"))}, "'nothing' decides for no array"),
    "crop": ("toy", {"loader.crop": 17}, "crop=17 must be in 1 … 16"),
    "workers": ("toy", {"loader.num_threads": -1}, "num_threads=-1"),
    "source": ("toy", {"data.source": "shape"}, "did you mean 'shapes'"),
    "split": ("toy", {"data.split": "trian"}, "did you mean 'train'"),
    "eval split": ("toy", {"eval.split": "tset", "every.eval": 4}, "did you mean 'test'"),
    "task": ("upsampler", {"task": "upsampeler"}, "unknown task 'upsampeler'.* did you mean 'upsampler'"),
    "noise": ("upsampler", {"diffusion.name": "cosin"}, "did you mean 'cosine'"),
    "noise steps": ("upsampler", {"diffusion.num_steps": 0}, "num_steps=0"),
    "sampler": ("upsampler", {"sampler.name": "ddmi"}, "sampler.name='ddmi' is unknown.* did you mean 'dd"),
    "sampler steps": ("upsampler", {"sampler.steps": 2000}, "steps=2000 must be within 1 … 1000"),
    "guidance": ("decoder", {"sampler.guidance": math.nan}, "sampler.guidance=nan"),
    "candidates": ("prior_diffusion", {"sampler.candidates": 0}, "sampler.candidates=0"),
    "dims": ("prior_ar", {"model.dims": 9}, "model.dims=9 must be a whole number of at least 1 and at most 8"),
    "buckets": ("prior_ar", {"model.buckets": 1}, "model.buckets=1 must be a whole number of at least 2"),
    "guided upsampler": ("upsampler", {"sampler.guidance": 2.0}, "sampler.guidance=2.0: an upsampler is not guided"),
    "weights of eps": (
        "decoder", {"objective.weighting": "clipped_snr", "objective.target": "eps"}, "'clipped_snr' of a network that"
    ),
    "temperature": ("prior_ar", {"sampler.temperature": -1.0}, "sampler.temperature=-1.0"),
    "top_p": ("prior_ar", {"sampler.top_p": 0.0}, "sampler.top_p=0.0 must be a number in 1e-06 … 1"),
    "share": ("prior_diffusion", {"objective.text_drop": 1.5}, "objective.text_drop=1.5 must be within 0 … 1"),
    "target": ("upsampler", {"objective.target": "z"}, "unknown prediction target 'z'"),
    "model key": ("upsampler", {"model.chanels": 8}, "does not fit its network: .*chanels"),
    "objective key": ("upsampler", {"objective.tagret": "v"}, "does not fit its network: .*tagret"),
    "groups": ("upsampler", {"model.groups": 3}, "cannot be built: groups=3 must divide channels=8, outer=0"),
    "outer groups": ("upsampler", {"model.outer": 6}, "groups=4 must divide channels=8, outer=6"),
    "attention": (
        "decoder",
        {"model.unet.attention": (7,), "model.unet.multipliers": (1, 2)},
        r"model.unet.attention=\(7,\) must be of the heights .*: \[16, 8\]. Fix: take of these",
    ),
    "no levels": ("decoder", {"model.unet.multipliers": ()}, r"model.unet.multipliers=\(\) must be of whole numbers"),
    "too large": ("clip", {"model.embed_dim": 10**9}, r"gradient take \d{3}\.\d\d GiB of each device, which has"),
    "no length": ("clip", {"model.norm": 0.0}, "model.norm=0.0 must be a number above 0"),
    "length nan": ("clip", {"model.norm": math.nan}, "model.norm=nan must be a number above 0"),
    "caption": ("prior_diffusion", {"model.caption": "state"}, "caption='state' is unknown.* did you mean 'states'"),
    "ar caption": ("prior_ar", {"model.caption": "foo"}, "model.caption='foo' is unknown.* use one of states, tokens"),
    "image size": ("upsampler", {"data.size": 18, "model.multipliers": (1,) * 3}, "image 18x18 must be divisible by 4"),
    "crop of odd size": ("upsampler", {"loader.crop": 15}, "15 pixels must be divisible by factor=2"),
    "heads": ("prior_diffusion", {"model.heads": 3}, "width=16 must be a multiple of heads=3"),
    "no heads": ("clip", {"model.text.heads": 0}, "model.text.heads=0 must be of whole numbers of at least 1"),
    "no embedding": ("clip", {"model.embed_dim": 0}, "model.embed_dim=0 must be of whole numbers"),
    "no layers": ("clip", {"model.vision.layers": 0}, "model.vision.layers=0 must be of whole numbers"),
    "negative workers": ("toy", {"loader.num_workers": -1}, "loader.num_workers=-1 must be a whole number in 0 … 512"),
    "many threads": ("toy", {"loader.num_threads": 999_999}, "loader.num_threads=999999 must be"),
    "clip's heads": ("clip", {"model.vision.heads": 3}, "width=16 must be a multiple of heads=3"),
    "patch": ("clip", {"model.vision.patch": 5}, "image_size=16 must be a multiple of model.vision.patch=5"),
    "clip's image": ("clip", {"data.size": 32}, "CLIP takes 16x16 images, got 32x32"),
    "no tokenizer": ("clip", {"tokenizer.path": "none.json"}, "no tokenizer at none.json"),
    "no clip": ("prior_diffusion", {"clip": ""}, "prior_diffusion needs a trained CLIP. Fix: set --config.clip"),
    "clip missing": ("decoder", {"clip": "no/such/run"}, "no/such/run does not exist"),
    "clip not wanted": ("upsampler", {"clip": "runs/clip"}, "clip='runs/clip' is of no use to the task 'upsampler'"),
}
