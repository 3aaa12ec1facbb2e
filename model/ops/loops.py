"""Loops over layers: how many layers an iteration computes, and how arrays carry the layers."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Int

from heedful.model.ops.platform import op

MIN_UNROLLED = 12  # layers up to which a CPU takes less time without a loop over them


@op
def layers_per_iteration(asked: int | None, *, remat: bool, decodes: bool) -> int:
    """Return how many layers an iteration of the loop over layers computes.

    `asked` is `model.unroll`; `remat` tells if the backward pass computes again what it needs.
    """
    return asked or 1


@layers_per_iteration.on("cpu")
def _unroll_all(asked: int | None, *, remat: bool, decodes: bool) -> int:
    """Return at least 12, which for most models means that there is no loop.

    With `remat` there is one: without it, a CPU computes early what it should compute again.
    """
    is_open = decodes or (asked is None and not remat)
    return max(MIN_UNROLLED if is_open else 1, asked or 1)


@struct.dataclass
class UnstackedLayers:
    """Parameters or a cache of a stack, as one tree for each layer."""

    layers: tuple[Any, ...]

    @classmethod
    def of(cls, stacked: Any) -> "UnstackedLayers":
        """Split arrays [L, ...]."""
        count = len(jax.tree.leaves(stacked)[0])
        return cls(tuple(jax.tree.map(lambda x: x[i], stacked) for i in range(count)))  # noqa: B023

    def stack(self) -> Any:
        """Return the arrays [L, ...]."""
        return jax.tree.map(lambda *layers: jnp.stack(layers), *self.layers)

    def repeat(self, times: int) -> "UnstackedLayers":
        """Repeat a cache for `times` hypotheses of each text."""
        return self._each(lambda cache: cache.repeat(times))

    def reorder(self, parents: Int[Array, "B W"]) -> "UnstackedLayers":
        """Reorder the hypotheses of a cache."""
        return self._each(lambda cache: cache.reorder(parents))

    def _each(self, change: Callable[[Any], Any]) -> "UnstackedLayers":
        """Change each layer as a stack of one."""
        stacks = (change(jax.tree.map(lambda x: x[None], layer)) for layer in self.layers)
        return UnstackedLayers(tuple(jax.tree.map(lambda x: x[0], stack) for stack in stacks))


@op
def unstack_layers(stacked: Any) -> Any:
    """Return parameters or a cache [L, ...] as a loop over tokens should carry them."""
    return stacked


@unstack_layers.on("cpu")
def _unstack(stacked: Any) -> Any:
    """Split the layers, which `restack_layers` puts together for each token.

    A CPU copies what a layer needs of a stacked array whenever it needs it. Where the layers of a
    token are in no loop, the compiler sees that a layer of the stack is what was apart, and copies
    nothing.
    """
    return UnstackedLayers.of(stacked) if jax.tree.leaves(stacked) else stacked


def restack_layers(tree: Any) -> Any:
    """Return a tree with what `unstack_layers` was given in place of what it returned."""
    is_unstacked = lambda x: isinstance(x, UnstackedLayers)  # noqa: E731
    return jax.tree.map(lambda x: x.stack() if is_unstacked(x) else x, tree, is_leaf=is_unstacked)
