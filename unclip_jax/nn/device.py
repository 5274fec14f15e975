"""The platform the traced program will run on (the mesh's devices, else jax's default), and what follows from it."""

import jax
from jax.experimental.layout import Layout, with_layout_constraint


def platform() -> str:
    """Where that which is being traced will run: on the mesh's devices, which need not be here, or by default."""
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.abstract_device is not None:
        return mesh.abstract_device.platform
    default = jax.config.jax_default_device
    return getattr(default, "platform", default) or jax.default_backend()


def alone() -> bool:
    """Whether that which is being traced runs on one device, as far as is known."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.device_count() == 1 if mesh.empty else mesh.size == 1


def in_order(x: jax.Array) -> jax.Array:
    """x as it is, on a GPU with its axes in memory in their order.

    XLA would lay tokens out as what reads the last of them likes it, and turn them in every layer.
    """
    return with_layout_constraint(x, Layout(tuple(range(x.ndim)))) if platform() == "gpu" else x
