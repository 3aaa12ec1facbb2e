"""Loops over layers: the number of layers per iteration, and stacked or unstacked arrays."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Int

from heedful.model.ops.platform import op

MIN_UNROLLED = 12  # up to this number of layers, a CPU is faster without a loop over layers


@op
def layers_per_iteration(asked: int | None, *, remat: bool, decodes: bool) -> int:
    """Return the number of layers that an iteration of the loop over layers computes.

    `asked` is `model.unroll`; `remat` is True if the backward pass recomputes values; `decodes` is
    True in decoding.
    """
    return asked or 1


@layers_per_iteration.on("cpu")
def _unroll_all(asked: int | None, *, remat: bool, decodes: bool) -> int:
    """Return at least 12 in decoding, or if there is no `asked` and no `remat`.

    Most models then have no loop. `remat` needs the loop: without it, XLA on a CPU would recompute
    values too early, and store them.
    """
    is_open = decodes or (asked is None and not remat)
    return max(MIN_UNROLLED if is_open else 1, asked or 1)


@struct.dataclass
class UnstackedLayers:
    """Parameters or a cache of a stack, as one tree for each layer."""

    layers: tuple[Any, ...]

    @classmethod
    def of(cls, stacked: Any) -> "UnstackedLayers":
        """Split arrays [L, ...] into L layers."""
        count = len(jax.tree.leaves(stacked)[0])
        return cls(tuple(jax.tree.map(lambda x: x[i], stacked) for i in range(count)))  # noqa: B023

    def stack(self) -> Any:
        """Return the arrays [L, ...]."""
        return jax.tree.map(lambda *layers: jnp.stack(layers), *self.layers)

    def repeat(self, times: int) -> "UnstackedLayers":
        """Repeat a cache for `times` hypotheses of each text."""
        return self._each(lambda cache: cache.repeat(times))

    def reorder(self, parents: Int[Array, "B W"]) -> "UnstackedLayers":
        """Return the cache in which hypothesis w of text b continues hypothesis parents[b, w]."""
        return self._each(lambda cache: cache.reorder(parents))

    def _each(self, change: Callable[[Any], Any]) -> "UnstackedLayers":
        """Apply `change` to each layer as a stack of one layer."""
        stacks = (change(jax.tree.map(lambda x: x[None], layer)) for layer in self.layers)
        return UnstackedLayers(tuple(jax.tree.map(lambda x: x[0], stack) for stack in stacks))


@op
def unstack_layers(stacked: Any) -> Any:
    """Return parameters or a cache [L, ...] in the form that is fastest in a loop over tokens."""
    return stacked


@unstack_layers.on("cpu")
def _unstack(stacked: Any) -> Any:
    """Split the layers; `restack_layers` stacks the layers again for each token.

    A CPU copies each layer's slice of a stacked array for each token. If the layers are stacked
    inside the loop over tokens, and have no loop of their own, the compiler sees that the slice of
    a layer is the array before stacking, and copies nothing.
    """
    return UnstackedLayers.of(stacked) if jax.tree.leaves(stacked) else stacked


def restack_layers(tree: Any) -> Any:
    """Undo `unstack_layers`: stack each UnstackedLayers in the tree to arrays [L, ...]."""
    is_unstacked = lambda x: isinstance(x, UnstackedLayers)  # noqa: E731
    return jax.tree.map(lambda x: x.stack() if is_unstacked(x) else x, tree, is_leaf=is_unstacked)
