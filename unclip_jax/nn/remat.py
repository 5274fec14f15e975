"""What the backward pass computes again instead of keeping it, by name, of each block of a Transformer or a UNet:

    policy   kept of a block beside its input               computed again
    none     all that its gradient reads, but of norms      norms
             their input
    dots     what its weights give: matrix products and     norms, activations, resampling, attention between tokens
             convolutions
    full     nothing                                        all: a forward pass more

The gradient is the same. From top to bottom the policies hold less and compute more.
"""

from collections.abc import Callable

import flax.linen as nn
import jax

from unclip_jax.errors import UserError, suggest

POLICIES = ("none", "dots", "full")


def of_weights(primitive, *args, **params) -> bool:
    """Whether a primitive's output is kept by "dots": jax's own policy of that name, and convolutions."""
    dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return primitive is jax.lax.conv_general_dilated_p or dots(primitive, *args, **params)


def named(policy: str | bool, key: str = "remat") -> str:
    """The policy in POLICIES; True and False, as stored configs may have them, are "full" and "none".

    Raises:
      UserError: there is none of that name; `key` is what the error calls it.
    """
    if isinstance(policy, bool):
        return "full" if policy else "none"
    if policy not in POLICIES:
        raise UserError(f"{key}={policy!r} is no remat policy", suggest(policy, POLICIES))
    return policy


def remat(block: type[nn.Module] | Callable, policy: str | bool, **how) -> type[nn.Module] | Callable:
    """A block, a module or a function, whose backward pass follows a policy; `how` as for `jax.checkpoint`."""
    policy, wrap = named(policy), nn.remat if isinstance(block, type) else jax.checkpoint
    return block if policy == "none" else wrap(block, policy=of_weights if policy == "dots" else None, **how)
