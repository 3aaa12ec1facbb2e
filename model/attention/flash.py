"""Exact attention by blocks: what `dense` computes, in memory linear in the length.

Scores exist for one block of queries and one of keys at a time. Forward, each block of queries
keeps the maximum and the sum of its softmax so far and rescales when the maximum grows
(arXiv:2205.14135 §3.1); backward, the weights are computed again from the logarithm of that sum
(arXiv:2307.08691 §3.1.2). Blocks in which the mask allows nothing are never visited.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from model.attention.dense import require_shapes
from model.dropout import dropout_words, keep_at
from model.masks import AttentionMask
from model.positions import PositionBias

Heads = tuple[int, int]  # K, G

LOWEST = jnp.finfo(jnp.float32).min


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
    tiles [B, N, q_block, kv_block]; the sizes, by default chosen by the lengths, change nothing
    else. Can be differentiated once, in reverse.
    """
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    require_shapes(q, k, v)
    key = dropout_words(dropout_rate, dropout_key)
    q = q.astype(jnp.float32) * (H**-0.5 if scale is None else scale)
    tiles = Tiles(
        q_length=T,
        kv_length=S,
        q_block=q_block or _block(T),
        kv_block=kv_block or _block(S),
        dropout_rate=dropout_rate,
    )
    G = N // K
    q = _cut(q.reshape(B, T, K, G, H), tiles.q_block)
    out = _attend(
        tiles,
        q.reshape(*q.shape[:3], -1, H),
        _cut(k, tiles.kv_block),
        _cut(v, tiles.kv_block),
        None if bias is None else bias.values,
        mask,
        bias,
        key,
    )
    out = jnp.transpose(out.reshape(q.shape), (1, 0, 4, 2, 3, 5))
    return out.reshape(B, -1, N, H)[:, :T].astype(v.dtype)


def _block(length: int) -> int:
    """At most 128 (on a CPU tiles of 8 heads stay in its cache), nearly equal: little is padded."""
    return math.ceil(length / math.ceil(length / 128))


def _cut(x: Float[Array, "B T *heads H"], size: int) -> Float[Array, "i B *heads C H"]:
    """Blocks of positions, the last one filled up with zeros."""
    x = jnp.pad(x, [(0, -x.shape[1] % size if axis == 1 else 0) for axis in range(x.ndim)])
    x = x.reshape(x.shape[0], -1, size, *x.shape[2:])
    return jnp.moveaxis(x, (1, 2), (0, -2))


@dataclass(frozen=True)
class Tiles:
    """How the scores are cut, and what is added to, taken from and multiplied with a tile."""

    q_length: int
    kv_length: int
    q_block: int
    kv_block: int
    dropout_rate: float

    def visits(self, mask: AttentionMask, by_key: bool = False) -> tuple[jax.Array, jax.Array]:
        """For each block of queries (or keys) those of the others to visit, first; their number."""
        sizes = (self.q_length, self.kv_length, self.q_block, self.kv_block)
        active = mask.blocks(*sizes).any(0)
        active = active.T if by_key else active
        return jnp.argsort(~active, axis=1, stable=True), jnp.sum(active, axis=1)

    def indices(self, i, j) -> tuple[jax.Array, jax.Array]:
        """Query rows and keys of a tile, which may lie beyond the end."""
        rows = i * self.q_block + jnp.arange(self.q_block)
        return rows, j * self.kv_block + jnp.arange(self.kv_block)

    def allowed(self, i, j, mask: AttentionMask, heads: Heads) -> jax.Array | None:
        """Which pairs count; None: all."""
        rows, columns = self.indices(i, j)
        inside = columns[None] < self.kv_length if self.kv_length % self.kv_block else None
        if mask.is_full:
            return inside
        allowed = _by_group(mask.tile(rows, columns), heads)
        return allowed if inside is None else allowed & inside

    def bias(self, i, j, bias: PositionBias, values: jax.Array, heads: Heads) -> jax.Array:
        tile = bias.replace(values=values).tile(*self.indices(i, j))  # type: ignore[attr-defined]
        return _by_group(tile, heads)

    def kept(self, i, j, batch: int, heads: Heads, key: jax.Array) -> jax.Array:
        """What dropout multiplies the weights of a tile with."""
        rows, columns = self.indices(i, j)
        rows = (jnp.arange(heads[1])[:, None] * self.q_length + rows).reshape(-1)
        shape = (batch, heads[0], heads[1] * self.q_length, self.kv_length)
        index = jnp.ix_(jnp.arange(batch), jnp.arange(heads[0]), rows, columns)
        stay = keep_at(key, index, shape, self.dropout_rate)
        return jnp.where(stay, 1 / (1 - self.dropout_rate), 0.0)


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


def _forward(tiles: Tiles, q, k, v, values, mask: AttentionMask, bias, key):
    """Output [i, B, K, R, H] and the logarithm of the softmax' sum [i, B, K, R]."""
    B, heads = k.shape[1], (k.shape[2], q.shape[3] // tiles.q_block)
    order, counts = tiles.visits(mask)

    def row(row):
        i, q, order, count = row

        def step(n, state):
            out, highest, total = state
            j = order[n]
            scores = jnp.einsum("BKRH,BKSH->BKRS", q, _at(k, j))
            if bias is not None:
                scores += tiles.bias(i, j, bias, values, heads)
            allowed = tiles.allowed(i, j, mask, heads)
            if allowed is not None:
                scores = jnp.where(allowed, scores, -jnp.inf)
            new_highest = jnp.maximum(highest, jnp.max(scores, axis=-1))
            weights = jnp.exp(scores - new_highest[..., None])
            shrink = jnp.exp(highest - new_highest)
            total = total * shrink + jnp.sum(weights, axis=-1)
            if key is not None:
                weights *= tiles.kept(i, j, B, heads, key)
            added = jnp.einsum("BKRS,BKSH->BKRH", weights, _at(v, j))
            return out * shrink[..., None] + added, new_highest, total

        zeros = jnp.zeros(q.shape, jnp.float32)
        # The lowest number and not -inf, whose difference from itself is no number.
        start = zeros, jnp.full(q.shape[:-1], LOWEST), zeros[..., 0]
        out, highest, total = jax.lax.fori_loop(0, count, step, start)
        # Rows that see nothing: 0 here, and exp(-inf) as weights backward.
        out = out / jnp.where(total > 0, total, 1.0)[..., None]
        return out, jnp.where(total > 0, highest + jnp.log(total), jnp.inf)

    return jax.lax.map(row, (jnp.arange(len(q)), q, order, counts))


def _backward(tiles: Tiles, saved, g):
    """Tiles lie here with keys first, in which four of five products need no transposed copy."""
    q, k, v, out, lse, values, mask, bias, key = saved
    B, heads = k.shape[1], (k.shape[2], q.shape[3] // tiles.q_block)
    order, counts = tiles.visits(mask, by_key=True)
    delta = jnp.sum(g * out, axis=-1)
    q_blocks, g_blocks = q, g

    def column(state, column):
        j, k_block, v_block, order, count = column
        k, v = k_block.astype(jnp.float32), v_block.astype(jnp.float32)
        kT = _transpose(k)

        def step(n, state):
            dqT, dk, dv, dvalues = state
            i = order[n]
            q, g = _at(q_blocks, i), _at(g_blocks, i)
            scores = jnp.einsum("BKSH,BKRH->BKSR", k, q)
            if bias is not None:
                scores += _transpose(tiles.bias(i, j, bias, values, heads))
            weights = jnp.exp(scores - _at(lse, i)[..., None, :])
            allowed = tiles.allowed(i, j, mask, heads)
            if allowed is not None:
                weights = jnp.where(_transpose(allowed), weights, 0.0)
            dweights = jnp.einsum("BKSH,BKRH->BKSR", v, g)
            used = weights
            if key is not None:
                kept = _transpose(tiles.kept(i, j, B, heads, key))
                used, dweights = weights * kept, dweights * kept
            dv += jnp.einsum("BKSR,BKRH->BKSH", used, g)
            dscores = weights * (dweights - _at(delta, i)[..., None, :])
            if bias is not None:
                tile, pull = jax.vjp(lambda x: tiles.bias(i, j, bias, x, heads), values)
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
        dqT, dk, dv, dvalues = jax.lax.fori_loop(0, count, step, (dqT, zeros, zeros, dvalues))
        return (dqT, dvalues), (dk.astype(k_block.dtype), dv.astype(v_block.dtype))

    start = jnp.zeros(_transpose(q).shape, jnp.float32), jax.tree.map(jnp.zeros_like, values)
    (dqT, dvalues), (dk, dv) = jax.lax.scan(
        column, start, (jnp.arange(len(k)), k, v, order, counts)
    )
    return _transpose(dqT), dk, dv, dvalues, None, None, None


def _attend_primal(tiles: Tiles, q, k, v, values, mask, bias, key):
    return _forward(tiles, q, k, v, values, mask, bias, key)[0]


def _attend_forward(tiles: Tiles, q, k, v, values, mask, bias, key):
    out, lse = _forward(tiles, q, k, v, values, mask, bias, key)
    return out, (q, k, v, out, lse, values, mask, bias, key)


_attend = jax.custom_vjp(_attend_primal, nondiff_argnums=(0,))
_attend.defvjp(_attend_forward, _backward)
