"""Results brought from the device to the host while the device goes on."""

from collections.abc import Iterable, Iterator
from typing import Any

import jax


def fetched(results: Iterable[Any]) -> Iterator[Any]:
    """Each of `results`, trees of arrays, with numpy's arrays in their place.

    Asking `results` for the next should set the device to work and not wait for it, as calling a compiled program does:
    then the next is computed while one is copied and while the caller uses it. So two are on the device at once. On a
    CPU one follows the other: there is nothing to copy, and two at once would share the cores.
    """
    ahead, before = jax.default_backend() != "cpu", []
    for now in results:
        jax.copy_to_host_async(now)
        before.append(now)
        if len(before) > ahead:
            yield jax.device_get(before.pop(0))
    yield from map(jax.device_get, before)
