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
    """The cache of a block in decoding; in a stack, each array has a leading axis of layers."""

    self_attention: Cache
    cross_attention: KVCache | None = None

    def repeat(self, times: int) -> "BlockCache":
        """Return the cache for `times` hypotheses of each text.

        Cross-attention is not repeated: the hypotheses of a text share its source.
        """
        return self._each(lambda cache: repeat(cache, times))

    def reorder(self, parents: Int[Array, "B W"]) -> "BlockCache":
        """Return the cache in which hypothesis w of text b continues hypothesis parents[b, w]."""
        return self._each(lambda cache: reorder(cache, parents))

    def _each(self, change: Callable[[Cache], Cache]) -> "BlockCache":
        changed = jax.vmap(change)(self.self_attention)
        return self.replace(self_attention=changed)  # type: ignore[attr-defined]


@struct.dataclass
class PatternCache:
    """Caches of a stack whose layers have caches of different shapes.

    L layers are L // P periods of P layers, and a remainder.
    """

    groups: tuple[Any, ...]
    """One BlockCache for each layer of the period, whose arrays have the leading axis L // P, then
    one for each layer of the remainder, with the leading axis 1. In a loop over tokens, an
    UnstackedLayers can replace each BlockCache."""

    def repeat(self, times: int) -> "PatternCache":
        """Return the cache for `times` hypotheses of each text; see `BlockCache.repeat`."""
        return PatternCache(tuple(group.repeat(times) for group in self.groups))

    def reorder(self, parents: Int[Array, "B W"]) -> "PatternCache":
        """Return the cache in which hypothesis w of text b continues hypothesis parents[b, w]."""
        return PatternCache(tuple(group.reorder(parents) for group in self.groups))


StackCache = BlockCache | PatternCache


def new_stack_cache(config: ModelConfig, batch: int, length: int) -> StackCache:
    """Return the empty cache of a decoder for `batch` rows of `length` positions."""

    def stacked(layer: ModelConfig, count: int) -> BlockCache:
        lead = lambda x: jnp.broadcast_to(x, (count, *x.shape))  # noqa: E731
        return BlockCache(self_attention=jax.tree.map(lead, new_cache(layer, batch, length)))

    size = len(config.period)
    if size == 1:
        return stacked(config.period[0], config.layers)
    periods, rest = divmod(config.layers, size)
    counts = [periods] * size * (periods > 0) + [1] * rest
    return PatternCache(tuple(map(stacked, cycle(config.period), counts)))
