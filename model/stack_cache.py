"""The caches of a whole stack of blocks."""

from collections.abc import Callable
from itertools import cycle
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Int

from heedful.model.cache import Cache, KVCache, new_cache, reorder, repeat
from heedful.model.config import ModelConfig


@struct.dataclass
class BlockCache:
    """The cache of a block while decoding; in a stack each array leads with the layers."""

    self_attention: Cache
    cross_attention: KVCache | None = None

    def repeat(self, times: int) -> "BlockCache":
        """Return the cache for `times` hypotheses of each text, which share their source."""
        return self._each(lambda cache: repeat(cache, times))

    def reorder(self, parents: Int[Array, "B W"]) -> "BlockCache":
        """Let each hypothesis continue the one of the same text that `parents` names."""
        return self._each(lambda cache: reorder(cache, parents))

    def _each(self, change: Callable[[Cache], Cache]) -> "BlockCache":
        changed = jax.vmap(change)(self.self_attention)
        return self.replace(self_attention=changed)  # type: ignore[attr-defined]


@struct.dataclass
class PatternCache:
    """The caches of a stack whose layers differ, and so do the shapes of their caches.

    A stack of L layers has L // P periods of P layers and a remainder. One BlockCache for each
    layer of the period leads with the periods [L // P, ...], and one for each layer of the
    remainder leads with [1, ...]. A loop over tokens may hold UnstackedLayers in their place.
    """

    groups: tuple[Any, ...]

    def repeat(self, times: int) -> "PatternCache":
        """Return the cache for `times` hypotheses of each text, which share their source."""
        return PatternCache(tuple(group.repeat(times) for group in self.groups))

    def reorder(self, parents: Int[Array, "B W"]) -> "PatternCache":
        """Let each hypothesis continue the one of the same text that `parents` names."""
        return PatternCache(tuple(group.reorder(parents) for group in self.groups))


StackCache = BlockCache | PatternCache


def new_stack_cache(config: ModelConfig, batch: int, length: int) -> StackCache:
    """Return the empty cache of a decoder for `length` positions."""

    def stacked(layer: ModelConfig, count: int) -> BlockCache:
        lead = lambda x: jnp.broadcast_to(x, (count, *x.shape))  # noqa: E731
        return BlockCache(self_attention=jax.tree.map(lead, new_cache(layer, batch, length)))

    size = len(config.period)
    if size == 1:
        return stacked(config.period[0], config.layers)
    periods, rest = divmod(config.layers, size)
    counts = [periods] * size * (periods > 0) + [1] * rest
    return PatternCache(tuple(map(stacked, cycle(config.period), counts)))
