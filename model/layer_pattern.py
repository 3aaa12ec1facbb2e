"""Stacks whose layers differ by a repeated pattern: a loop over periods, then the rest."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from heedful.model.stack_cache import BlockCache, PatternCache

Layer = Callable[..., tuple[Float[Array, "B T D"], BlockCache | None, Any]]
"""One layer: (variables, x, cache, random keys) -> (x, cache, intermediates)."""


def apply_pattern(
    make_layer: Callable[[int, bool], Layer],
    period: int,
    variables: Any,
    x: Float[Array, "B T D"],
    cache: PatternCache | None,
    rngs: Mapping[str, jax.Array],
    unroll: int,
) -> tuple[Float[Array, "B T D"], PatternCache | None, Any]:
    """Apply L layers; layer i (from 0) is layer i % `period` of the pattern.

    `make_layer(i, is_looped)` returns layer i of the pattern; `is_looped` is True if the compiled
    program has the layer in a loop, which computes about `unroll` layers per iteration. Each array
    of variables and intermediates has a leading axis of layers [L, ...].
    """
    layers = len(jax.tree.leaves(variables)[0])
    periods, rest = divmod(layers, period)
    sizes = [(periods, period)] * (periods > 0) + [(1, rest)] * (rest > 0)
    parts = _split((variables, jnp.arange(layers)), [repeats * size for repeats, size in sizes])
    groups, intermediates = cache.groups if cache else (), []
    for (repeats, size), part in zip(sizes, parts, strict=True):
        per_iteration = min(max(unroll // size, 1), repeats)
        stack = [make_layer(i, per_iteration < repeats) for i in range(size)]
        part = jax.tree.map(lambda x, size=size: x.reshape(-1, size, *x.shape[1:]), part)
        given = part, groups[:size] if cache else (None,) * size
        x, (found, sown) = jax.lax.scan(_through(stack, rngs), x, given, unroll=per_iteration)
        groups = (*groups[size:], *found)
        intermediates.append(jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), sown))
    together = jax.tree.map(lambda *parts: jnp.concatenate(parts), *intermediates)
    return x, PatternCache(groups) if cache else None, together


def _through(stack: Sequence[Layer], rngs: Mapping[str, jax.Array]) -> Callable[..., Any]:
    """Return the step of a scan over periods, which applies the P layers of `stack` in turn.

    (x, ((variables, layer indices) [P, ...], caches)) -> (x, (caches, intermediates [P, ...])).
    """

    def step(x: jax.Array, given: tuple) -> tuple[jax.Array, tuple]:
        part, caches = given
        found = []
        singles = _split(part, [1] * len(stack))
        for layer, single, cache in zip(stack, singles, caches, strict=True):
            own, index = jax.tree.map(lambda x: x[0], single)
            keys = {name: jax.random.fold_in(key, index) for name, key in rngs.items()}
            x, *more = layer(own, x, cache, keys)
            found.append(more)
        caches, sown = zip(*found, strict=True)
        return x, (caches, jax.tree.map(lambda *layers: jnp.stack(layers), *sown))

    return step


def _split(tree: Any, sizes: Sequence[int]) -> list[Any]:
    """Split arrays along their first axis.

    The gradient of a split is a concatenation; the gradient of slices would be a sum.
    """
    leaves, structure = jax.tree.flatten(tree)
    parts = zip(*(jax.lax.split(leaf, sizes) for leaf in leaves), strict=True)
    return [jax.tree.unflatten(structure, part) for part in parts]
