"""Exact attention by blocks: what `dense` computes, in memory linear in the length.

Scores exist for one block of queries and one of keys at a time. Forward, each block of queries
keeps the maximum and the sum of its softmax so far and rescales when the maximum grows
(arXiv:2205.14135 §3.1); backward, the weights are computed again from the logarithm of that sum
(arXiv:2307.08691 §3.1.2). Blocks in which the mask allows nothing are never visited.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from model.attention.dense import require_shapes
from model.axes import mesh_axes, target_platform
from model.dropout import dropout_words, keep_at
from model.masks import AttentionMask
from model.positions import PositionBias

Heads = tuple[int, int]  # K, G

LOWEST = jnp.finfo(jnp.float32).min

# On a CPU, products of this many multiplications are shared among its cores, smaller ones are not.
SHARED_PRODUCT = 2**23
KV_BLOCK = 256
# Scores of a tile, over rows and heads: 4 MiB stay near a CPU's cores; others have more to fill.
TILE = {"cpu": 2**20, "gpu": 2**26, "tpu": 2**26}


def flash(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: AttentionMask,
    *,
    bias: PositionBias | None = None,
    scale: float | None = None,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    q_block: int | None = None,
    kv_block: int | None = None,
) -> Float[Array, "B T N H"]:
    """The result of `dense`, by tiles; dropout takes the same weights away.

    Inputs of any type are computed with in float32. Memory: some copies of the arguments and a few
    tiles [b, N, q_block, kv_block] of b rows at a time. The sizes, of which no more is used than
    the lengths need, change rounding only. Can be differentiated once, in reverse.
    """
    B, T, N, H = q.shape
    S = k.shape[1]
    require_shapes(q, k, v)
    tiles = Tiles(
        batch=B,
        q_length=T,
        kv_length=S,
        q_block=_equal(T, q_block or max(512, SHARED_PRODUCT // (KV_BLOCK * H))),
        kv_block=_equal(S, kv_block or KV_BLOCK),
        dropout_rate=dropout_rate,
    )
    attend = partial(_of_rows, tiles, bias, dropout_words(dropout_rate, dropout_key))
    q = q.astype(jnp.float32) * (H**-0.5 if scale is None else scale)
    rows = jnp.arange(B)
    parts = _parts(B, N * tiles.q_block * tiles.kv_block)
    if parts is None:
        return attend(rows, q, k, v, mask).astype(v.dtype)
    shards, count = parts

    def split(x: jax.Array) -> jax.Array:
        """Each part has rows of all shards."""
        x = jnp.moveaxis(x.reshape(shards, count, -1, *x.shape[1:]), 1, 0)
        return x.reshape(count, -1, *x.shape[3:])

    facts, structure = jax.tree.flatten(mask)
    by_row = [split(x) if x.ndim and len(x) == B else None for x in facts]

    def part(given: tuple[Any, ...]) -> jax.Array:
        *arrays, own = given
        own = [x if y is None else y for x, y in zip(facts, own, strict=True)]
        return attend(*arrays, structure.unflatten(own))

    out = jax.lax.map(part, (split(rows), split(q), split(k), split(v), by_row))
    out = jnp.moveaxis(out.reshape(count, shards, -1, T, N, H), 0, 1)
    return out.reshape(q.shape).astype(v.dtype)


def _parts(batch: int, scores: int) -> tuple[int, int] | None:
    """Shards of the batch, and parts of each, one after the other, that a cache holds tiles of.

    `scores` are those of a row's tile. None: all rows at once.
    """
    sizes = jax.sharding.get_abstract_mesh().shape
    (axes,) = mesh_axes("act_batch") or ((),)
    shards = math.prod(sizes[axis] for axis in axes)
    held = max(1, TILE[target_platform()] // scores)
    count = min(n for n in range(1, batch + 1) if batch % n == 0 and batch // n <= held * shards)
    return None if count == 1 or batch % (shards * count) else (shards, count)


def _of_rows(
    tiles: "Tiles", bias: PositionBias | None, key: jax.Array | None, rows, q, k, v, mask
) -> Float[Array, "b T N H"]:
    """Attention of some rows of the batch, in float32."""
    b, _, N, H = q.shape
    K = k.shape[2]
    q = _cut(q.reshape(b, -1, K, N // K, H), tiles.q_block)
    out = _attend(
        tiles,
        q.reshape(*q.shape[:3], -1, H),
        _cut(k, tiles.kv_block),
        _cut(v, tiles.kv_block),
        None if bias is None else bias.values,
        rows,
        mask,
        bias,
        key,
    )
    out = jnp.transpose(out.reshape(q.shape), (1, 0, 4, 2, 3, 5))
    return out.reshape(b, -1, N, H)[:, : tiles.q_length]


def _equal(length: int, most: int) -> int:
    """Blocks of at most that size, nearly equal: little is padded."""
    return math.ceil(length / math.ceil(length / most))


def _cut(x: Float[Array, "B T *heads H"], size: int) -> Float[Array, "i B *heads C H"]:
    """Blocks of positions, the last one filled up with zeros."""
    x = jnp.pad(x, [(0, -x.shape[1] % size if axis == 1 else 0) for axis in range(x.ndim)])
    x = x.reshape(x.shape[0], -1, size, *x.shape[2:])
    return jnp.moveaxis(x, (1, 2), (0, -2))


@dataclass(frozen=True)
class Tiles:
    """How the scores are cut, and what is added to, taken from and multiplied with a tile."""

    batch: int
    q_length: int
    kv_length: int
    q_block: int
    kv_block: int
    dropout_rate: float

    def visits(self, mask: AttentionMask, by_key: bool = False) -> "Visits":
        """For each block of queries (or keys) which of the others to visit."""
        some, every = mask.blocks(self.q_length, self.kv_length, self.q_block, self.kv_block)
        some, every = some.any(0), every.all(0)
        if self.kv_length % self.kv_block:
            every = every.at[:, -1].set(False)
        rank = jnp.where(every, 0, jnp.where(some, 1, 2))
        rank = rank.T if by_key else rank
        order = jnp.argsort(rank, axis=1, stable=True)
        return Visits(order, jnp.sum(rank == 0, axis=1), jnp.sum(rank < 2, axis=1))

    def indices(self, i, j) -> tuple[jax.Array, jax.Array]:
        """Query rows and keys of a tile, which may lie beyond the end."""
        rows = i * self.q_block + jnp.arange(self.q_block)
        return rows, j * self.kv_block + jnp.arange(self.kv_block)

    def allowed(self, i, j, mask: AttentionMask, heads: Heads) -> jax.Array:
        """Which pairs count."""
        rows, columns = self.indices(i, j)
        return _by_group(mask.tile(rows, columns) & (columns < self.kv_length), heads)

    def bias(self, i, j, batch, bias: PositionBias, values: jax.Array, heads: Heads) -> jax.Array:
        tile = bias.replace(values=values).tile(*self.indices(i, j))  # type: ignore[attr-defined]
        return _by_group(tile if len(tile) == 1 else tile[batch], heads)

    def kept(self, i, j, batch, heads: Heads, key: jax.Array) -> jax.Array:
        """What dropout multiplies the weights of a tile with."""
        rows, columns = self.indices(i, j)
        rows = (jnp.arange(heads[1])[:, None] * self.q_length + rows).reshape(-1)
        shape = (self.batch, heads[0], heads[1] * self.q_length, self.kv_length)
        index = jnp.ix_(batch, jnp.arange(heads[0]), rows, columns)
        stay = keep_at(key, index, shape, self.dropout_rate)
        return jnp.where(stay, 1 / (1 - self.dropout_rate), 0.0)


class Visits(NamedTuple):
    """The blocks to visit for each block: whole ones, then those that need the mask; the others."""

    order: Int[Array, "i j"]
    whole: Int[Array, " i"]
    count: Int[Array, " i"]

    def loop(self, step: Callable, state: Any) -> Any:
        """step(other, state, is_whole) for each, where these are the visits of one block."""
        for is_whole, first, last in ((True, 0, self.whole), (False, self.whole, self.count)):
            one = partial(lambda is_whole, n, state: step(self.order[n], state, is_whole), is_whole)
            state = jax.lax.fori_loop(first, last, one, state)
        return state


def _by_group(tile: jax.Array, heads: Heads) -> jax.Array:
    """[b, N or 1, C, C] as [b, K or 1, G C, C]."""
    b, n, rows, columns = tile.shape
    K, G = heads if n > 1 else (1, heads[1])
    tile = tile.reshape(b, K, -1, rows, columns)
    return jnp.broadcast_to(tile, (b, K, G, rows, columns)).reshape(b, K, G * rows, columns)


def _at(blocks: jax.Array, i: jax.Array) -> jax.Array:
    """Block i in float32, in which all that is done with a tile is done."""
    return jax.lax.dynamic_index_in_dim(blocks, i, keepdims=False).astype(jnp.float32)


def _transpose(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, -2, -1)


def _forward(tiles: Tiles, q, k, v, values, batch, mask: AttentionMask, bias, key):
    """Output [i, B, K, R, H] and the logarithm of the softmax' sum [i, B, K, R]."""
    heads = k.shape[2], q.shape[3] // tiles.q_block

    def row(row):
        i, q, visits = row

        def step(j, state, is_whole):
            out, highest, total = state
            scores = jnp.einsum("BKRH,BKSH->BKRS", q, _at(k, j))
            if bias is not None:
                scores += tiles.bias(i, j, batch, bias, values, heads)
            if not is_whole:
                scores = jnp.where(tiles.allowed(i, j, mask, heads), scores, -jnp.inf)
            new_highest = jnp.maximum(highest, jnp.max(scores, axis=-1))
            weights = jnp.exp(scores - new_highest[..., None])
            shrink = jnp.exp(highest - new_highest)
            total = total * shrink + jnp.sum(weights, axis=-1)
            if key is not None:
                weights *= tiles.kept(i, j, batch, heads, key)
            added = jnp.einsum("BKRS,BKSH->BKRH", weights, _at(v, j))
            return out * shrink[..., None] + added, new_highest, total

        zeros = jnp.zeros(q.shape, jnp.float32)
        # The lowest number and not -inf, whose difference from itself is no number.
        start = zeros, jnp.full(q.shape[:-1], LOWEST), zeros[..., 0]
        out, highest, total = visits.loop(step, start)
        # Rows that see nothing: 0 here, and exp(-inf) as weights backward.
        out = out / jnp.where(total > 0, total, 1.0)[..., None]
        return out, jnp.where(total > 0, highest + jnp.log(total), jnp.inf)

    return jax.lax.map(row, (jnp.arange(len(q)), q, tiles.visits(mask)))


def _backward(tiles: Tiles, saved, g):
    """Tiles lie here with keys first, in which four of five products need no transposed copy."""
    q, k, v, out, lse, values, batch, mask, bias, key = saved
    heads = k.shape[2], q.shape[3] // tiles.q_block
    delta = jnp.sum(g * out, axis=-1)
    q_blocks, g_blocks = q, g

    def column(state, column):
        j, k_block, v_block, visits = column
        k, v = k_block.astype(jnp.float32), v_block.astype(jnp.float32)
        kT = _transpose(k)

        def step(i, state, is_whole):
            dqT, dk, dv, dvalues = state
            q, g = _at(q_blocks, i), _at(g_blocks, i)
            scores = jnp.einsum("BKSH,BKRH->BKSR", k, q)
            if bias is not None:
                scores += _transpose(tiles.bias(i, j, batch, bias, values, heads))
            weights = jnp.exp(scores - _at(lse, i)[..., None, :])
            if not is_whole:
                weights = jnp.where(_transpose(tiles.allowed(i, j, mask, heads)), weights, 0.0)
            dweights = jnp.einsum("BKSH,BKRH->BKSR", v, g)
            used = weights
            if key is not None:
                kept = _transpose(tiles.kept(i, j, batch, heads, key))
                used, dweights = weights * kept, dweights * kept
            dv += jnp.einsum("BKSR,BKRH->BKSH", used, g)
            dscores = weights * (dweights - _at(delta, i)[..., None, :])
            if bias is not None:
                tile, pull = jax.vjp(lambda x: tiles.bias(i, j, batch, bias, x, heads), values)
                given = _transpose(dscores)
                if tile.shape[0] == 1:
                    given = jnp.sum(given, axis=0, keepdims=True)
                dvalues += pull(given.astype(tile.dtype))[0]
            dk += jnp.einsum("BKSR,BKRH->BKSH", dscores, q)
            added = _at(dqT, i) + jnp.einsum("BKHS,BKSR->BKHR", kT, dscores)
            dqT = jax.lax.dynamic_update_index_in_dim(dqT, added, i, axis=0)
            return dqT, dk, dv, dvalues

        dqT, dvalues = state
        zeros = jnp.zeros(k.shape, jnp.float32)
        dqT, dk, dv, dvalues = visits.loop(step, (dqT, zeros, zeros, dvalues))
        return (dqT, dvalues), (dk.astype(k_block.dtype), dv.astype(v_block.dtype))

    start = jnp.zeros(_transpose(q).shape, jnp.float32), jax.tree.map(jnp.zeros_like, values)
    visits = tiles.visits(mask, by_key=True)
    (dqT, dvalues), (dk, dv) = jax.lax.scan(column, start, (jnp.arange(len(k)), k, v, visits))
    return _transpose(dqT), dk, dv, dvalues, None, None, None, None


def _attend_primal(tiles: Tiles, *given):
    return _forward(tiles, *given)[0]


def _attend_forward(tiles: Tiles, *given):
    q, k, v, *others = given
    out, lse = _forward(tiles, *given)
    return out, (q, k, v, out, lse, *others)


_attend = jax.custom_vjp(_attend_primal, nondiff_argnums=(0,))
_attend.defvjp(_attend_forward, _backward)
