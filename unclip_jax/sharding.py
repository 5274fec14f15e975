"""Sharding as data: a mesh (data, fsdp, tensor) and ordered rules from array paths to partitions.

Models hold no axis names, but that `nn.rows` keeps activations split as batches. Batches are split over data x fsdp,
arrays over fsdp (and tensor where a rule says so); the same rules serve the optimizer's moments and the averaged
weights, whose paths end in that of their parameter.
"""

import functools
import math
import re
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from unclip_jax.errors import UserError, is_whole, suggest

AXES = ("data", "fsdp", "tensor")
FSDP_MIN_SIZE = 2**16  # elements; below this a gather costs more than the copy it saves


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence | int | None = None):
    """The Mesh of all devices, or of `devices`; one axis may be -1, which takes what the others leave.

    Of a number of devices: an AbstractMesh, which has shardings and shapes but runs nothing.

    Raises:
      UserError: the product of the axes is not the number of devices.
    """
    if not isinstance(devices, int):
        devices = jax.devices() if devices is None else devices
    count = devices if isinstance(devices, int) else len(devices)
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    spelled = ", ".join(f"{name}={size}" for name, size in sizes.items())
    if not all(is_whole(size, 1) or is_whole(size, -1, -1) for size in sizes.values()):
        raise UserError(f"mesh {spelled} must be whole numbers >= 1, or -1 for the rest")
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise UserError(f"mesh {spelled}: only one axis may be -1")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if free and count % fixed == 0:
        sizes[free[0]] = count // fixed
    if math.prod(sizes.values()) != count:
        divisors = ", ".join(str(n) for n in range(1, count + 1) if count % n == 0)
        raise UserError(
            f"mesh {spelled} must multiply to the {count} devices",
            f"leave mesh.data=-1 and choose fsdp and tensor so that their product is one of {divisors}",
        )
    # Explicit axes, jax's default, break gradients of Linen modules.
    kinds, shape = (AxisType.Auto,) * len(AXES), tuple(sizes.values())
    if isinstance(devices, int):
        return AbstractMesh(shape, AXES, axis_types=kinds)
    return Mesh(_arranged(shape, list(devices)), AXES, axis_types=kinds)


def _arranged(shape: tuple[int, int, int], devices: list) -> np.ndarray:
    """The devices as an array of this shape: neighbours by the fast links, TPU slices apart along `data` alone."""
    slices = {getattr(device, "slice_index", 0) for device in devices}
    split = dict(allow_split_physical_axes=True)  # else 8 would have to fill axes of a slice, which may have 4 or 16
    if len(slices) == 1 or devices[0].platform != "tpu":
        return mesh_utils.create_device_mesh(shape, devices, **split)
    data, *inner = shape
    if data % len(slices):
        raise UserError(
            f"mesh data={data} must be a multiple of the {len(slices)} slices, which data alone may span",
            "leave mesh.data=-1, and choose fsdp and tensor so that their product divides a slice",
        )
    return mesh_utils.create_hybrid_device_mesh((data // len(slices), *inner), (len(slices), 1, 1), devices, **split)


def infer(shapes, rules: Sequence[tuple[str, object]], mesh: Mesh, *, min_size: int = FSDP_MIN_SIZE):
    """The sharding of every array of a tree, by the first rule whose pattern is found in its path.

    Args:
      shapes: tree of arrays or ShapeDtypeStructs; a path reads "params/block/kernel", "opt/…/block/kernel".
      rules: ordered (regex, spec). The spec is "replicate"; or "fsdp": split the largest axis that divides by
        the fsdp axis of the mesh, replicate where none does or the array has fewer than `min_size` elements;
        or a tuple with a mesh axis, a tuple of them, or None for each dimension, such as (None, "tensor").
      mesh: from `make_mesh`.
      min_size: elements.

    Returns:
      A tree of NamedSharding like `shapes`. Scalars are replicated and need no rule.

    Raises:
      UserError: an array no rule matches, a rule that decides for no array, or a spec that does not fit one.
    """
    compiled = [_compile(rule) for rule in rules]
    used = set()

    def choose(path, array):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        rule = next((i for i, (pattern, _) in enumerate(compiled) if pattern.search(name)), None)
        used.add(rule)
        if array.ndim == 0:
            return NamedSharding(mesh, PartitionSpec())
        if rule is None:
            raise UserError(
                f"array {name} {array.shape} matches no sharding rule", "end the rules with ('.*', 'fsdp')"
            )
        return NamedSharding(mesh, _partition(name, array.shape, compiled[rule][1], mesh, min_size))

    shardings = jax.tree_util.tree_map_with_path(choose, shapes)
    for index, (pattern, _) in enumerate(compiled):
        if index not in used:
            raise UserError(
                f"sharding rule {pattern.pattern!r} decides for no array "
                "(nothing has such a path, or earlier rules take all of it)",
                "correct the pattern, put it before the wider ones, or remove it",
            )
    return shardings


def infer_frozen(shapes, mesh: Mesh, *, min_size: int = FSDP_MIN_SIZE):
    """`infer` for what is not trained, such as a stage's CLIP: a config has no rules for it. The tree may be empty."""
    return infer(shapes, [(".*", "fsdp")], mesh, min_size=min_size) if jax.tree.leaves(shapes) else shapes


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Batches: the first axis split over data x fsdp."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def split_rows(function: Callable, mesh: Mesh | AbstractMesh) -> Callable:
    """`function`, traced for jax.jit so that activations stay split as batches are; see `nn.rows`."""

    @functools.wraps(function)
    def traced(*args):
        with jax.sharding.use_abstract_mesh(mesh if isinstance(mesh, AbstractMesh) else mesh.abstract_mesh):
            return function(*args)

    return traced


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def abstract(shapes, shardings):
    """ShapeDtypeStructs that carry shardings: what a checkpoint is restored into."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def parts_of_batch(mesh: Mesh) -> int:
    """Over how many devices, data x fsdp, the rows of a batch are split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_batch(batch_size: int, mesh: Mesh) -> None:
    """Raises UserError unless `batch_size` (over all hosts) is a positive multiple of data x fsdp."""
    parts = parts_of_batch(mesh)
    if not is_whole(batch_size, 1):
        raise UserError(f"batch_size={batch_size!r} must be a whole number >= 1", f"use {parts}")
    if batch_size % parts:
        below, above = batch_size // parts * parts, (batch_size // parts + 1) * parts
        nearest = f"{below} or {above}" if below else f"{above}"
        what = f"batch_size={batch_size} must be a multiple of {parts} (data x fsdp devices)"
        raise UserError(what, f"use {nearest}")


def own_rows(sharding: NamedSharding, size: int) -> np.ndarray:
    """Which rows of a batch of `size` this process's devices hold, ascending.

    On a slice they need not lie side by side, and where a mesh axis other than the batch's spans hosts, several hosts
    hold the same ones.
    """
    places = sharding.addressable_devices_indices_map((size,)).values()
    return np.unique(np.concatenate([np.arange(size)[place] for place in places]))


def put_batch(batch, sharding: NamedSharding, size: int):
    """This process's rows of a batch of `size` (numpy, those of `own_rows`) -> global arrays under `sharding`."""
    rows = own_rows(sharding, size)

    def put(x):
        def part(place):
            start, stop, _ = place[0].indices(size)
            first = np.searchsorted(rows, start)
            return x[first : first + stop - start]

        return jax.make_array_from_callback((size, *x.shape[1:]), sharding, part)

    return jax.tree.map(put, batch)


def _compile(rule) -> tuple[re.Pattern, object]:
    if not isinstance(rule, (tuple, list)) or len(rule) != 2 or not isinstance(rule[0], str):
        raise UserError(f"sharding rule {rule!r} must be a pair (regex, spec)", "such as ('.*', 'fsdp')")
    spec = rule[1]
    try:
        pattern = re.compile(rule[0])
    except re.error as error:
        raise UserError(f"sharding rule {rule!r} must start with a regular expression ({error})") from None
    if isinstance(spec, str) and spec not in ("fsdp", "replicate"):
        raise UserError(
            f"sharding rule {pattern.pattern!r} has the unknown spec {spec!r}",
            suggest(spec, ("fsdp", "replicate")) + ", or a tuple such as (None, 'tensor')",
        )
    if not isinstance(spec, (str, tuple, list)):
        raise UserError(
            f"sharding rule {pattern.pattern!r}: spec {spec!r} must be 'fsdp', 'replicate' or a tuple"
        )
    return pattern, spec


def _partition(name: str, shape: tuple[int, ...], spec, mesh: Mesh, min_size: int) -> PartitionSpec:
    if spec == "replicate":
        return PartitionSpec()
    if spec == "fsdp":
        parts = mesh.shape["fsdp"]
        fitting = [(size, axis) for axis, size in enumerate(shape) if size % parts == 0]
        if parts == 1 or not fitting or math.prod(shape) < min_size:
            return PartitionSpec()
        axis = max(fitting)[1]
        return PartitionSpec(*(None,) * axis, "fsdp")
    return _explicit(name, shape, spec, mesh)


def _explicit(name: str, shape: tuple[int, ...], spec: Sequence, mesh: Mesh) -> PartitionSpec:
    if len(spec) > len(shape):
        raise UserError(f"sharding spec {spec!r} has more entries than array {name} {shape} has dimensions")
    entries, taken = [], []
    for size, entry in zip(shape, spec, strict=False):
        axes = () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
        for axis in axes:
            if axis not in mesh.shape:
                raise UserError(
                    f"sharding spec {spec!r} names no mesh axis: {axis!r}", suggest(axis, mesh.shape)
                )
        parts = math.prod(mesh.shape[axis] for axis in axes)
        if size % parts:
            raise UserError(
                f"array {name} {shape}: {size} must be a multiple of {parts} (mesh axes {entry!r})"
            )
        taken += axes
        entries.append(axes if len(axes) > 1 else axes[0] if axes else None)
    if len(taken) != len(set(taken)):
        raise UserError(f"sharding spec {spec!r} uses a mesh axis twice")
    return PartitionSpec(*entries)
