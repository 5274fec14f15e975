"""What a program costs: FLOPs from its jaxpr, bytes moved from its compiled HLO, loops multiplied out in both.

XLA's own cost analysis counts the body of a loop once, so a scanned Transformer of 24 layers would seem to be one.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "bf16": 2, "f16": 2, "s16": 2,
         "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8, "c64": 8, "c128": 16}  # fmt: skip
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# What names, splits or moves nothing in memory.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
        "while", "conditional", "call", "copy-done", "iota", "opt-barrier"}  # fmt: skip
# Kernels of attention (nn.attention): matrix products of N x S x D in each but those that a gradient computes anew, and
# the axis of a key's length, N and S being that of the first two operands.
KERNELS = {
    "dot_product_attention_fwd_wrapper": (2, 1),
    "dot_product_attention_bwd_wrapper": (4, 1),
    "_flash_attention_kernel": (2, 2),
    "_flash_attention_dkv_kernel": (3, 2),
    "_flash_attention_dq_kernel": (1, 2),
}


def count_flops(function, *args) -> float:
    """Multiplications and additions of matrix products and convolutions in `function(*args)`; args may be shapes."""
    return jaxpr_flops(jax.make_jaxpr(function)(*args).jaxpr)


def count_gradient(loss, params, *args) -> tuple[float, float]:
    """Of the gradient of a scalar `loss(params, *args)` by its parameters; all may be shapes.

    Returns:
      (its FLOPs; bytes that the forward pass keeps for the backward pass, parameters not among them).
    """

    def gradient(params, *args):
        value, pull = jax.vjp(lambda params: loss(params, *args), params)
        return pull, pull(jnp.ones_like(value))

    closed, (pull, _) = jax.make_jaxpr(gradient, return_shape=True)(params, *args)
    own = closed.jaxpr.invars[: len(jax.tree.leaves(params))]
    kept = {v for v in closed.jaxpr.outvars[: len(jax.tree.leaves(pull))] if not hasattr(v, "val")} - set(own)
    return jaxpr_flops(closed.jaxpr), float(sum(v.aval.size * v.aval.dtype.itemsize for v in kept))


def jaxpr_flops(jaxpr) -> float:
    """`count_flops` of what is traced already."""
    total = 0.0
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name == "dot_general":
            (contract, _), _ = eqn.params["dimension_numbers"]
            inner = math.prod(eqn.invars[0].aval.shape[axis] for axis in contract)
            total += 2.0 * eqn.outvars[0].aval.size * inner
        elif name == "conv_general_dilated":
            kernel, numbers = eqn.invars[1].aval.shape, eqn.params["dimension_numbers"].rhs_spec
            total += 2.0 * eqn.outvars[0].aval.size * math.prod(kernel) / kernel[numbers[0]] / _zeros(eqn)
        elif _kernel(eqn) in KERNELS:
            products, axis = KERNELS[_kernel(eqn)]
            q, k = (operand.aval for operand in eqn.invars[:2])
            total += 2.0 * products * q.size * k.shape[axis]
        else:
            inner = [jaxpr_flops(sub) for sub in _subjaxprs(eqn)]
            if inner:
                total += max(inner) if name == "cond" else sum(inner) * _times(eqn)
    return total


def _kernel(eqn) -> str:
    return eqn.params["jaxpr"].debug_info.func_name if eqn.primitive.name == "pallas_call" else eqn.primitive.name


def _times(eqn) -> int:
    """How often what is inside runs: a scan's body in every step, a shard_map's on every device."""
    if eqn.primitive.name == "shard_map":
        return math.prod(eqn.params["mesh"].shape[axis] for axis in eqn.params["newly_manual_axes"])
    return eqn.params.get("length", 1)


def _zeros(eqn) -> int:
    """How many times more places a dilated convolution (the gradient of a strided one) has than products."""
    return math.prod(eqn.params["lhs_dilation"])


def _subjaxprs(eqn):
    for value in eqn.params.values():
        for one in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(one, "eqns"):
                yield one
            elif hasattr(one, "jaxpr") and hasattr(one.jaxpr, "eqns"):
                yield one.jaxpr


class Collective(NamedTuple):
    """All collectives of one kind over groups of one size: how many a step, the bytes of their results on a device."""

    kind: str
    group: int
    count: int
    bytes: float

    @property
    def wire_bytes(self) -> float:
        """What a device sends on a ring: (n-1)/n of the whole array; twice that for an all-reduce."""
        n = max(self.group, 1)
        whole = self.bytes * (n if self.kind == "reduce-scatter" else 1)
        if self.kind == "collective-permute":
            return self.bytes
        return whole * (n - 1) / n * (2 if self.kind == "all-reduce" else 1)


class Traffic(NamedTuple):
    """Bytes that a device's instructions read and write in memory, fusions as one; and its collectives."""

    bytes: float
    collectives: tuple[Collective, ...]


class _Instruction(NamedTuple):
    kind: str
    bytes: float
    operands: tuple[str, ...]
    line: str


def read_hlo(text: str) -> Traffic:
    """The traffic of a compiled module, from its text; bodies of loops count as often as they run.

    Of a condition the branch counts that moves the most bytes. A TPU's compiler hides collectives in fusions, one at
    their start, at their end and in what runs meanwhile: those of one channel are one.
    """
    computations, entry = _computations(text)
    total, collectives = _traffic(entry, computations)
    rows = [Collective(kind, group, int(n), size) for (kind, group), (n, size) in sorted(collectives.items())]
    return Traffic(total, tuple(rows))


def _traffic(name: str, computations) -> tuple[float, dict[tuple[str, int], tuple[float, float]]]:
    """(bytes, {(kind, group): (how many, bytes)} of collectives) of a computation that runs once."""
    body, channels, inner = computations.get(name, {}), {}, []
    total = 0.0
    for label, one in body.items():
        if one.kind not in FREE and not one.kind.endswith("-done"):
            total += one.bytes + _read(body, one)
        if one.kind == "while":
            inner.append((_trips(one.line, computations), _traffic(_named(one.line, "body"), computations)))
        elif one.kind == "conditional":
            ways = [_traffic(branch, computations) for branch in _branches(one.line)]
            inner.append((1.0, max(ways, key=lambda way: way[0])))
        elif one.kind == "call":
            inner.append((1.0, _traffic(_named(one.line, "to_apply"), computations)))
        elif one.kind in ("fusion", "async-start"):
            _hidden(one, computations, channels)
        else:
            _own(label, one, body, channels)
    own = [(1.0, (0.0, {(kind, group): (1.0, size)})) for kind, group, size in channels.values()]
    sums: dict[tuple[str, int], tuple[float, float]] = {}
    for times, (moved, collectives) in own + inner:
        total += times * moved
        for key, (n, size) in collectives.items():
            before = sums.get(key, (0.0, 0.0))
            sums[key] = before[0] + times * n, before[1] + times * size
    return total, sums


def _own(label: str, one: _Instruction, body, channels: dict) -> None:
    """Notes an instruction in `channels` {channel: (kind, group, bytes of its result)} if it is a collective."""
    kind = one.kind.removesuffix("-start")
    if kind in COLLECTIVES:
        # a start gives its operand beside its result, but for an all-reduce, which has one shape
        size = one.bytes - (_read(body, one) if kind != one.kind and kind != "all-reduce" else 0)
        channel = re.search(r"channel_id=(\d+)", one.line)
        channels.setdefault(channel[1] if channel else label, (kind, _group_size(one.line), size))


def _hidden(one: _Instruction, computations, channels: dict) -> None:
    """Notes the collectives inside what a fusion calls."""
    callee = _named(one.line, "calls")
    inner: dict = {}
    for label, own in computations.get(callee, {}).items():
        if own.kind in ("fusion", "async-start"):
            _hidden(own, computations, inner)
        else:
            _own(f"{callee}/{label}", own, computations[callee], inner)
    for channel, (kind, group, size) in inner.items():
        if callee.startswith("all-reduce-scatter"):  # an all-reduce of which each device keeps its part
            kind, size = "reduce-scatter", one.bytes
        channels.setdefault(channel, (kind, group, size))


def _read(body, one: _Instruction) -> float:
    return sum(body[name].bytes for name in one.operands if name in body)


def _computations(text: str) -> tuple[dict[str, dict[str, _Instruction]], str]:
    """{computation: {instruction's name: _Instruction}}, and the name of the entry."""
    computations: dict[str, dict[str, _Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        head = re.match(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if head:
            current = computations.setdefault(head[2], {})
            entry = head[2] if head[1] else entry
            continue
        match = re.match(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$", line)
        if current is None or not match:
            continue
        shape, rest = _split_shape(match[2])
        call = re.match(r"([\w\-]+)\(([^)]*)\)", rest)
        if call:
            operands = tuple(re.findall(r"%([\w.\-]+)", call[2]))
            current[match[1]] = _Instruction(call[1], _size(shape), operands, rest)
    return computations, entry


def _split_shape(text: str) -> tuple[str, str]:
    """ "(f32[2]{0}, s32[]) while(…" → its shape and the rest."""
    if not text.startswith("("):
        shape, _, rest = text.partition(" ")
        return shape, rest
    depth = 0
    for at, c in enumerate(text):
        depth += (c == "(") - (c == ")")
        if depth == 0:
            return text[: at + 1], text[at + 2 :]
    return text, ""


def _sizes(shape: str) -> list[float]:
    arrays = re.findall(r"([a-z]\w*)\[([\d,<=]*)\]", shape)
    return [BYTES.get(kind, 0) * float(np.prod([int(n.strip("<=")) for n in dims.split(",") if n] or [1]))
            for kind, dims in arrays]  # fmt: skip


def _size(shape: str) -> float:
    return sum(_sizes(shape))


def _named(line: str, key: str) -> str:
    match = re.search(rf"{key}=%?([\w.\-]+)", line)
    return match[1] if match else ""


def _branches(line: str) -> list[str]:
    """The computations that a condition chooses from, as a list or by their two names."""
    listed = re.search(r"branch_computations=\{([^}]*)\}", line)
    two = ("true_computation", "false_computation")
    return re.findall(r"[\w.\-]+", listed[1]) if listed else [_named(line, key) for key in two]


def _trips(line: str, computations) -> float:
    """How often a loop runs: as the compiler says, or the bound that its condition compares with; else once."""
    match = re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', line)
    if match:
        return float(match[1])
    condition = computations.get(_named(line, "condition"), {})
    for one in condition.values():
        if one.kind == "compare" and "direction=LT" in one.line:
            bounds = [re.match(r"constant\((\d+)\)", condition[n].line) for n in one.operands if n in condition]
            return next((float(bound[1]) for bound in bounds if bound), 1.0)
    return 1.0


def _group_size(line: str) -> int:
    """Devices that take part in one group of a collective; 0 where the text does not tell."""
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    if listed:
        return len(listed[1].split(","))
    named = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", line)
    if named:  # mesh['a'=8,'b'=2], device_ids=(…) {'a','b':(1)2}: whole axes, or a part of one
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named[2])
        return math.prod(int(part or sizes[axis]) for axis, part in parts)
    tiled = re.search(r"replica_groups=\[(\d+),(\d+)\]", line)
    return int(tiled[2]) if tiled else 2 if "source_target_pairs" in line else 0
