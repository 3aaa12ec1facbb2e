"""Exact attention by blocks: what `dense` computes, in memory linear in the length.

Scores exist for one block of queries and one of keys at a time. Forward, each block of queries
keeps the maximum and the sum of its softmax so far and rescales when the maximum grows
(arXiv:2205.14135 §3.1); backward, the weights are computed again from the logarithm of that sum
(arXiv:2307.08691 §3.1.2). Blocks in which the mask allows nothing are never visited.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from model.dropout import keep_at
from model.masks import AttentionMask
from model.positions import PositionBias

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
    """As `dense`, to rounding, the dropped weights included; forward-mode derivatives are not given.

    Memory: a few times that of the arguments, and a tile [B, N, q_block, kv_block] of scores. The
    blocks, None: chosen by the lengths, change time and memory only.
    """
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    if k.shape != (B, S, K, H) or k.shape != v.shape or N % K:
        raise ValueError(f"shapes do not fit: q {q.shape}, k {k.shape}, v {v.shape}")
    if dropout_rate and dropout_key is None:
        raise ValueError(f"dropout at rate {dropout_rate} needs a key")
    mask.require_lengths(T, S)
    tiles = Tiles(
        q_length=T,
        kv_length=S,
        q_block=q_block or _block(T),
        kv_block=kv_block or _block(S),
        scale=H**-0.5 if scale is None else scale,
        dropout_rate=dropout_rate,
    )
    key = jax.random.key_data(dropout_key) if dropout_rate else None
    values = None if bias is None else bias.values
    heads_first = jnp.transpose(q.reshape(B, T, K, N // K, H), (0, 2, 3, 1, 4))
    k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    out = _attend(tiles, heads_first, k, v, values, mask, bias, key)
    return jnp.transpose(out, (0, 3, 1, 2, 4)).reshape(q.shape)


def _block(length: int) -> int:
    """Blocks of nearly equal size, so that little is padded."""
    count = -(-length // 256)
    return -(-length // count)


@dataclass(frozen=True)
class Tiles:
    """How scores are cut into tiles, and what is done with them."""

    q_length: int
    kv_length: int
    q_block: int
    kv_block: int
    scale: float
    dropout_rate: float

    def cut(self, x: jax.Array, block: int, axis: int = -2) -> jax.Array:
        """Blocks of x, the last one filled up with zeros, along a new first axis."""
        axis %= x.ndim
        fill = -x.shape[axis] % block
        x = jnp.pad(x, [(0, fill if i == axis else 0) for i in range(x.ndim)])
        shape = (*x.shape[:axis], -1, block, *x.shape[axis + 1 :])
        return jnp.moveaxis(x.reshape(shape), axis, 0)

    def join(self, blocks: jax.Array, length: int, axis: int = -2) -> jax.Array:
        """The inverse of `cut`."""
        axis %= blocks.ndim - 1
        x = jnp.moveaxis(blocks, 0, axis)
        x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
        return jax.lax.slice_in_dim(x, 0, length, axis=axis)

    def scores(self, i, j, q, kT, values, mask: AttentionMask, bias) -> jax.Array:
        """Scores [B, K, G, q_block, kv_block] of a tile; -inf where nothing may be seen."""
        B, K, G = q.shape[:3]
        rows, columns = self.indices(i, j)
        scores = jnp.einsum("BKGTH,BKHS->BKGTS", q, kT, preferred_element_type=jnp.float32)
        scores *= self.scale
        if bias is not None:
            scores += self.bias(i, j, values, bias, K)
        if not mask.is_full:
            allowed = mask.tile(rows, columns)
            heads = (1, 1) if allowed.shape[1] == 1 else (K, G)
            allowed = allowed.reshape(allowed.shape[0], *heads, *allowed.shape[2:])
            scores = jnp.where(allowed, scores, -jnp.inf)
        if self.kv_length % self.kv_block:
            scores = jnp.where(columns < self.kv_length, scores, -jnp.inf)
        return scores

    def indices(self, i, j) -> tuple[jax.Array, jax.Array]:
        """Query rows and keys of a tile; those beyond the end repeat the last one."""
        rows = i * self.q_block + jnp.arange(self.q_block)
        columns = j * self.kv_block + jnp.arange(self.kv_block)
        return rows, columns

    def bias(self, i, j, values, bias: PositionBias, K: int) -> jax.Array:
        tile = bias.replace(values=values).tile(*self.indices(i, j))  # type: ignore[attr-defined]
        return tile.reshape(tile.shape[0], K, -1, *tile.shape[2:])

    def kept(self, i, j, shape: tuple[int, ...], key) -> jax.Array:
        """What dropout multiplies the weights of a tile with."""
        whole = (*shape[:3], self.q_length, self.kv_length)
        index = jnp.ix_(*map(jnp.arange, shape[:3]), *self.indices(i, j))
        stay = keep_at(key, index, whole, self.dropout_rate)
        return jnp.where(stay, 1 / (1 - self.dropout_rate), 0.0)

    def active(self, mask: AttentionMask) -> jax.Array:
        """Which tiles [i, j] hold an allowed pair in any row of the batch."""
        sizes = (self.q_length, self.kv_length, self.q_block, self.kv_block)
        return mask.blocks(*sizes).any(0)


def _visits(active: jax.Array) -> tuple[jax.Array, jax.Array]:
    """For each row of `active` the columns to visit come first, in order; and their number."""
    return jnp.argsort(~active, axis=1, stable=True), jnp.sum(active, axis=1)


def _forward(tiles: Tiles, q, k, v, values, mask: AttentionMask, bias, key):
    """Output [B, K, G, T, H] and the logarithm of the softmax' sum [B, K, G, T]."""
    order, counts = _visits(tiles.active(mask))
    q_blocks = tiles.cut(q, tiles.q_block)
    kT_blocks = jnp.swapaxes(tiles.cut(k, tiles.kv_block), -2, -1)
    v_blocks = tiles.cut(v, tiles.kv_block)

    def row(row):
        i, q_i, order, count = row

        def step(n, state):
            out, highest, total = state
            j = order[n]
            scores = tiles.scores(i, j, q_i, kT_blocks[j], values, mask, bias)
            new_highest = jnp.maximum(highest, jnp.max(scores, axis=-1))
            weights = jnp.exp(scores - new_highest[..., None])
            shrink = jnp.exp(highest - new_highest)
            total = total * shrink + jnp.sum(weights, axis=-1)
            if tiles.dropout_rate:
                weights *= tiles.kept(i, j, weights.shape, key)
            weights = weights.astype(v.dtype)
            added = jnp.einsum(
                "BKGTS,BKSH->BKGTH", weights, v_blocks[j], preferred_element_type=jnp.float32
            )
            return out * shrink[..., None] + added, new_highest, total

        zeros = jnp.zeros(q_i.shape, jnp.float32)
        start = zeros, jnp.full(q_i.shape[:-1], LOWEST), zeros[..., 0]
        out, highest, total = jax.lax.fori_loop(0, count, step, start)
        # Rows that see nothing: 0 / 1, and backward weights of exp(-inf).
        out = out / jnp.where(total > 0, total, 1.0)[..., None]
        lse = jnp.where(total > 0, highest + jnp.log(total), jnp.inf)
        return out.astype(q.dtype), lse

    steps = jnp.arange(len(q_blocks))
    out, lse = jax.lax.map(row, (steps, q_blocks, order, counts))
    return tiles.join(out, tiles.q_length), tiles.join(lse, tiles.q_length, axis=-1)


def _backward(tiles: Tiles, saved, g):
    q, k, v, out, lse, values, mask, bias, key = saved
    B, K, G = q.shape[:3]
    order, counts = _visits(tiles.active(mask).T)
    delta = jnp.sum(g.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    q_blocks, g_blocks = (tiles.cut(x, tiles.q_block) for x in (q, g))
    qT_blocks, gT_blocks = (jnp.swapaxes(x, -2, -1) for x in (q_blocks, g_blocks))
    lse_blocks = tiles.cut(lse, tiles.q_block, -1)
    delta_blocks = tiles.cut(delta, tiles.q_block, -1)
    k_blocks, v_blocks = (tiles.cut(x, tiles.kv_block) for x in (k, v))
    kT_blocks, vT_blocks = (jnp.swapaxes(x, -2, -1) for x in (k_blocks, v_blocks))
    dot = lambda spec, a, b: jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)  # noqa: E731

    def column(state, column):
        j, k_j, kT_j, vT_j, order, count = column

        def step(n, state):
            dq, dkT, dvT, dvalues = state
            i = order[n]
            scores = tiles.scores(i, j, q_blocks[i], kT_j, values, mask, bias)
            weights = jnp.exp(scores - lse_blocks[i][..., None])
            dweights = dot("BKGTH,BKHS->BKGTS", g_blocks[i], vT_j)
            used = weights
            if tiles.dropout_rate:
                kept = tiles.kept(i, j, weights.shape, key)
                used, dweights = weights * kept, dweights * kept
            dvT += dot("BKGHT,BKGTS->BKHS", gT_blocks[i], used.astype(g.dtype))
            dscores = weights * (dweights - delta_blocks[i][..., None])
            if values is not None:
                tile, pull = jax.vjp(lambda x: tiles.bias(i, j, x, bias, K), values)
                total = dscores if tile.shape[0] > 1 else jnp.sum(dscores, 0, keepdims=True)
                dvalues += pull(total.astype(tile.dtype))[0]
            dscores = (dscores * tiles.scale).astype(q.dtype)
            dkT += dot("BKGHT,BKGTS->BKHS", qT_blocks[i], dscores)
            dq = dq.at[i].add(dot("BKGTS,BKSH->BKGTH", dscores, k_j))
            return dq, dkT, dvT, dvalues

        zeros = jnp.zeros(kT_j.shape, jnp.float32)
        dq, dvalues = state
        dq, dkT, dvT, dvalues = jax.lax.fori_loop(0, count, step, (dq, zeros, zeros, dvalues))
        return (dq, dvalues), (dkT.astype(k.dtype), dvT.astype(v.dtype))

    start = jnp.zeros(q_blocks.shape, jnp.float32), jax.tree.map(jnp.zeros_like, values)
    steps = jnp.arange(len(k_blocks))
    columns = steps, k_blocks, kT_blocks, vT_blocks, order, counts
    (dq, dvalues), (dk, dv) = jax.lax.scan(column, start, columns)
    dq = tiles.join(dq, tiles.q_length).astype(q.dtype)
    dk, dv = (tiles.join(jnp.swapaxes(x, -2, -1), tiles.kv_length) for x in (dk, dv))
    return dq, dk, dv, dvalues, None, None, None


def _attend_forward(tiles: Tiles, q, k, v, values, mask, bias, key):
    out, lse = _forward(tiles, q, k, v, values, mask, bias, key)
    return out, (q, k, v, out, lse, values, mask, bias, key)


def _attend_primal(tiles: Tiles, *arguments: Any):
    return _forward(tiles, *arguments)[0]


_attend = jax.custom_vjp(_attend_primal, nondiff_argnums=(0,))
_attend.defvjp(_attend_forward, _backward)
