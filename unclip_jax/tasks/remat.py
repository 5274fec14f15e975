"""Remat policies (`nn.remat`) of a config's networks: every block of `model` that holds a Transformer's or a UNet's
keywords has its own `remat`.
"""

from collections.abc import Iterator, Mapping

from ml_collections import ConfigDict

from unclip_jax.nn.remat import POLICIES, named

__all__ = ["POLICIES", "policies", "with_policy"]


def _networks(block: Mapping, key: str) -> Iterator[tuple[str, Mapping]]:
    """(dotted key, block) of every network in it: Transformers have layers, UNets the multipliers of their levels."""
    if "layers" in block or "multipliers" in block:
        yield key, block
    for name, inner in block.items():
        if isinstance(inner, Mapping | ConfigDict):
            yield from _networks(inner, f"{key}.{name}")


def policies(config) -> tuple[str, ...]:
    """Those of a config's networks, each once, from the one that holds most to the one that computes most.

    Raises:
      UserError: there is none of such a name.
    """
    used = {named(block.get("remat", "none"), f"{key}.remat") for key, block in _networks(config.model, "model")}
    return tuple(policy for policy in POLICIES if policy in used)


def with_policy(config, policy: str):
    """A copy of the config, all of whose networks have that policy."""
    changed = config.copy_and_resolve_references()
    with changed.unlocked(), changed.ignore_type():
        for _, block in _networks(changed.model, "model"):
            block.remat = policy
    return changed
