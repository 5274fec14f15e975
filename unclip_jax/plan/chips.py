"""The devices that a plan is for: data sheets of chips, TPU slices and GPUs that are not here."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import jax

from unclip_jax.environment import meanwhile
from unclip_jax.errors import UserError, suggest
from unclip_jax.meter import FLOPS, GIB


class Chip(NamedTuple):
    """Data sheet of one device: bf16 FLOP/s, bytes of memory, bytes/s of memory and of its links to others."""

    flops: float
    memory: float
    bandwidth: float
    links: float


# TPUs: cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e (links: all of a chip's, one direction). GPUs: NVIDIA's data
# sheets of the SXM boards, dense bf16, NVLink in one direction.
CHIPS = {
    "v4": Chip(FLOPS["v4"], 32 * GIB, 1.228e12, 0.15e12),
    "v5e": Chip(FLOPS["v5e"], 16 * GIB, 0.819e12, 0.1e12),
    "v5p": Chip(FLOPS["v5p"], 95 * GIB, 2.765e12, 0.3e12),
    "v6e": Chip(FLOPS["v6e"], 32 * GIB, 1.640e12, 0.224e12),
    "a100": Chip(FLOPS["a100"], 80e9, 2.039e12, 0.3e12),
    "h100": Chip(FLOPS["h100"], 80e9, 3.35e12, 0.45e12),
    "h200": Chip(FLOPS["h200"], 141e9, 4.8e12, 0.45e12),
}
TPUS, GPUS = ("v4", "v5e", "v5p", "v6e"), ("a100", "h100", "h200")
CUBES = ("v4", "v5p")  # whose slices have three sides
# Without them libtpu asks after the TPU that it is on, and complains, when it is first asked for a slice; to compile it
# needs none of them. The lock guards a TPU, and none is used.
LIBTPU = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-4"}
LIBTPU |= {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}


def tpu_devices(topology: str, slices: int = 1):
    """The devices of a slice such as "v5p:4x8x8" that need not be here -> (chip's name, devices).

    Raises:
      UserError: libtpu is missing, or does not know the slice.
    """
    chip, colon, shape = topology.partition(":")
    if chip not in TPUS or not colon or not re.fullmatch(r"\d+(x\d+){1,2}", shape):
        raise UserError(f"topology={topology!r} must be CHIP:AxB or CHIP:AxBxC, CHIP one of {', '.join(TPUS)}",
                        "such as v5e:4x4 or v5p:4x8x8")  # fmt: skip
    _check_slice(chip, tuple(map(int, shape.split("x"))))
    from jax.experimental import topologies

    extra = {"num_slices": slices} if slices > 1 else {}
    if chip == "v4":  # whose two cores are one device
        extra["chip_config_name"] = "megacore"
    if math.prod(map(int, shape.split("x"))) == 1:
        extra["chips_per_host_bounds"] = (1, 1, 1)
    try:
        with meanwhile(**LIBTPU):
            return chip, topologies.get_topology_desc(platform="tpu", topology_name=topology, **extra).devices
    except Exception as error:  # jax raises several kinds; a missing libtpu is a RuntimeError
        why = (str(error).strip().splitlines() or [repr(error)])[0][:200]
        fix = f'pip install "jax[tpu]=={jax.__version__}" (libtpu, no TPU needed), and a slice that exists'
        raise UserError(f"topology={topology!r} cannot be compiled for ({why})", fix) from error


def _check_slice(chip: str, sides: tuple[int, ...]) -> None:
    """UserError for a slice that there is not; libtpu compiles for many of those as well."""
    dimensions, lengths = (3, (1, 2, *range(4, 97, 4))) if chip in CUBES else (2, (1, 2, 4, 8, 16))
    if len(sides) != dimensions or not {*sides} <= {*lengths}:
        spelled = ", ".join(map(str, lengths[:5])) + (", …" if len(lengths) > 5 else "")
        what = f"topology='{chip}:{'x'.join(map(str, sides))}' is no slice of {chip}, which have {dimensions} sides"
        raise UserError(f"{what} of {spelled} chips", f"such as {chip}:{'4x8x8' if dimensions == 3 else '4x4'}")


def gpu_devices(spec: str):
    """ "h100:8" → ("h100", 8)."""
    chip, colon, count = spec.partition(":")
    if chip not in GPUS or (colon and not (count.isdecimal() and 0 < int(count) <= 65536)):
        raise UserError(f"device={spec!r} must be GPU or GPU:COUNT, COUNT in 1 … 65536", suggest(chip, GPUS))
    return chip, int(count or 1)
