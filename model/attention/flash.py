"""Exact attention by blocks, in memory linear in the length.

Attention scores exist for one tile at a time, a block of queries and a block of keys. In the
forward pass, each block of queries keeps the running maximum and sum of its softmax, and rescales
the sum when the maximum grows (arXiv:2205.14135 §3.1). The backward pass recomputes the weights
from the logarithm of this sum (arXiv:2307.08691 §3.1.2). Tiles without allowed pairs are never
visited.

Axes: B rows of the batch, T queries, S keys, K key/value heads, G query heads of each, H size of a
head; R = G * queries of a block.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from heedful.model.attention.core import AttentionCall, CoreSpec
from heedful.model.attention.online_softmax import OnlineSoftmax, bias_gradient, score_gradients
from heedful.model.axes import shards, target_platform
from heedful.model.masks import AttentionMask
from heedful.model.ops.dropout import dropout_words, keep_at
from heedful.model.ops.manual import vary
from heedful.model.positions import PositionBias

# Numbers of queries and keys of a tile, for sequences shorter than 8,192 and for longer ones. On a
# CPU, all cores share a product of at least 2**23 multiplications, as these tiles have with H = 64.
# Larger products are faster, but smaller tiles waste less at the edge of a causal mask.
SHORT, LONG = (512, 256), (1024, 512)
# Scores held at a time: 4 MiB on a CPU, for its caches; other devices have more cores to fill.
TILE = {"cpu": 2**20, "gpu": 2**26, "tpu": 2**26}


def flash(
    call: AttentionCall, q_block: int | None = None, kv_block: int | None = None
) -> Float[Array, "B T N H"]:
    """Compute `dense` tile by tile; dropout drops the same weights.

    Everything is computed in float32, whatever the type of the inputs. Memory: some copies of the
    inputs, and a few tiles [b, N, q_block, kv_block] of b rows at a time. `q_block` and `kv_block`
    are the largest sizes of a tile (None: chosen by the lengths), which change rounding only. The
    result can be differentiated once, in reverse mode. Raises ModelError if the mesh splits the
    sequence: each device would gather and compute all of it.
    """
    SPEC.require(call)
    q, k, v, mask, bias = call.q, call.k, call.v, call.mask, call.bias
    (B, T, N, H), (S, K) = q.shape, k.shape[1:3]
    sizes = SHORT if max(T, S) < 8192 else LONG
    tiles = Tiles(
        shape=(B, K, N // K, T, S),
        q_block=_equal(T, q_block or max(sizes[0], 2**23 // (sizes[1] * H))),
        kv_block=_equal(S, kv_block or sizes[1]),
        dropout_rate=call.dropout_rate,
    )
    held = TILE[target_platform()] // (N // K * tiles.q_block * tiles.kv_block)
    key = dropout_words(call.dropout_rate, call.dropout_key)
    by_row = lambda x: x.ndim > 0 and len(x) == B  # noqa: E731

    def some_heads(rows: jax.Array, heads, q, k, v) -> jax.Array:
        own = jax.tree.map(lambda x: x[rows] if by_row(x) else x, mask)
        return _of_part(tiles, Part(rows, heads[0, 0]), q, k, v, own, bias, key)

    def some_rows(rows: jax.Array, *qkv: jax.Array) -> jax.Array:
        heads = jnp.arange(K)[None, None]
        return _in_turn(partial(some_heads, rows), held, "act_kv_heads", 2, heads, *qkv)

    q = q.astype(jnp.float32) * call.factor
    by_group = q.reshape(B, T, K, N // K, H)
    out = _in_turn(some_rows, held // K, "act_batch", 0, jnp.arange(B), by_group, k, v)
    return out.reshape(q.shape).astype(v.dtype)


def _in_turn(f: Callable, held: int, name: str, axis: int, *arrays: jax.Array) -> jax.Array:
    """Compute f(*arrays) in parts along `axis`, which the mesh shards by its axis name.

    A part has at most `held` entries of each device, but at least one.
    """
    size, devices = arrays[0].shape[axis], shards(name)
    if size % devices:
        return f(*arrays)
    own = size // devices
    count = min(n for n in range(1, own + 1) if own % n == 0 and own // n <= max(held, 1))
    if count == 1:
        return f(*arrays)

    def split(x: jax.Array) -> jax.Array:
        before, after = x.shape[:axis], x.shape[axis + 1 :]
        x = jnp.moveaxis(x.reshape(*before, devices, count, -1, *after), axis + 1, 0)
        return x.reshape(count, *before, -1, *after)

    out = jax.lax.map(lambda part: f(*part), tuple(split(x) for x in arrays))
    before, after = out.shape[1 : axis + 1], out.shape[axis + 2 :]
    out = jnp.moveaxis(out.reshape(count, *before, devices, -1, *after), 0, axis + 1)
    return out.reshape(*before, size, *after)


class Part(NamedTuple):
    """Indices of the rows of the batch and of the key/value heads that are computed together."""

    rows: Int[Array, " b"]
    heads: Int[Array, " k"]


def _of_part(
    tiles: "Tiles", part: Part, q, k, v, mask: AttentionMask, bias: PositionBias | None, key
) -> Float[Array, "b T k G H"]:
    """Return the output of attention for a part, in float32."""
    q = _cut(q, tiles.q_block)
    out = _attend(
        tiles,
        q.reshape(*q.shape[:3], -1, q.shape[5]),
        _cut(k, tiles.kv_block),
        _cut(v, tiles.kv_block),
        None if bias is None else bias.values,
        part,
        mask,
        bias,
        key,
    )
    out = jnp.transpose(out.reshape(q.shape), (1, 0, 4, 2, 3, 5))
    return out.reshape(out.shape[0], -1, *out.shape[3:])[:, : tiles.shape[3]]


def _equal(length: int, most: int) -> int:
    """Return a block size of at most `most` that cuts `length` into nearly equal blocks."""
    return math.ceil(length / math.ceil(length / most))


def _cut(x: Float[Array, "B T *heads H"], size: int) -> Float[Array, "i B *heads C H"]:
    """Cut positions into i blocks of C = `size` positions; the last block is padded with zeros."""
    x = jnp.pad(x, [(0, -x.shape[1] % size if axis == 1 else 0) for axis in range(x.ndim)])
    x = x.reshape(x.shape[0], -1, size, *x.shape[2:])
    return jnp.moveaxis(x, (1, 2), (0, -2))


@dataclass(frozen=True)
class Tiles:
    """The tiles of the attention scores: their positions, masks, biases and dropout."""

    shape: tuple[int, int, int, int, int]
    """Shape (B, K, G, T, S) of all attention scores."""
    q_block: int
    kv_block: int
    dropout_rate: float

    def visits(self, mask: AttentionMask, by_key: bool = False) -> "Visits":
        """Return the blocks of keys to visit for each block of queries; by_key: the reverse."""
        T, S = self.shape[3:]
        some, every = mask.blocks(T, S, self.q_block, self.kv_block)
        some, every = some.any(0), every.all(0)
        if S % self.kv_block:
            every = every.at[:, -1].set(False)
        rank = jnp.where(every, 0, jnp.where(some, 1, 2))
        rank = rank.T if by_key else rank
        order = jnp.argsort(rank, axis=1, stable=True)
        return Visits(order, jnp.sum(rank == 0, axis=1), jnp.sum(rank < 2, axis=1))

    def indices(self, i, j) -> tuple[jax.Array, jax.Array]:
        """Return the positions of the queries [q_block] and the keys [kv_block] of tile (i, j).

        In the last tiles, they may exceed T - 1 and S - 1.
        """
        rows = i * self.q_block + jnp.arange(self.q_block)
        return rows, j * self.kv_block + jnp.arange(self.kv_block)

    def allowed(self, i, j, part: Part, mask: AttentionMask) -> jax.Array:
        """Return the allowed pairs of tile (i, j); `mask` has the rows of `part` only."""
        rows, columns = self.indices(i, j)
        return self._by_group(mask.tile(rows, columns) & (columns < self.shape[4]), part)

    def bias(self, i, j, part: Part, bias: PositionBias, values: jax.Array) -> jax.Array:
        """Return the bias of tile (i, j), with `values` in place of bias.values."""
        tile = bias.replace(values=values).tile(*self.indices(i, j))  # type: ignore[attr-defined]
        return self._by_group(tile if len(tile) == 1 else tile[part.rows], part)

    def kept(self, i, j, part: Part, key: jax.Array) -> jax.Array:
        """Return the factors by which dropout multiplies the weights of tile (i, j)."""
        B, K, G, T, S = self.shape
        rows, columns = self.indices(i, j)
        rows = (jnp.arange(G)[:, None] * T + rows).reshape(-1)
        index = jnp.ix_(part.rows, part.heads, rows, columns)
        stay = keep_at(key, index, (B, K, G * T, S), self.dropout_rate)
        return jnp.where(stay, 1 / (1 - self.dropout_rate), 0.0)

    def _by_group(self, tile: jax.Array, part: Part) -> jax.Array:
        """Reshape a tile [b, N or 1, C, D] to [b, k or 1, G * C, D], for the heads of `part`."""
        b, n, rows, columns = tile.shape
        G = self.shape[2]
        tile = tile.reshape(b, -1, G if n > 1 else 1, rows, columns)
        tile = tile[:, part.heads] if n > 1 else jnp.repeat(tile, G, axis=2)
        return tile.reshape(b, -1, G * rows, columns)


class Visits(NamedTuple):
    """The order in which each block i visits blocks j of the other kind.

    order[i] begins with whole[i] blocks that need no mask. Blocks that need the mask follow, up to
    count[i] blocks in all; the rest is not visited.
    """

    order: Int[Array, "i j"]
    whole: Int[Array, " i"]
    count: Int[Array, " i"]

    def loop(self, step: Callable, state: Any) -> Any:
        """Run state = step(j, state, is_whole) for each visited j; `self` is of one block."""
        for is_whole, first, last in ((True, 0, self.whole), (False, self.whole, self.count)):
            one = partial(lambda is_whole, n, state: step(self.order[n], state, is_whole), is_whole)
            state = jax.lax.fori_loop(first, last, one, state)
        return state


def _at(blocks: jax.Array, i: jax.Array) -> jax.Array:
    """Return block i in float32, the type of all computations."""
    return jax.lax.dynamic_index_in_dim(blocks, i, keepdims=False).astype(jnp.float32)


def _transpose(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, -2, -1)


def _forward(tiles: Tiles, q, k, v, values, part: Part, mask: AttentionMask, bias, key):
    """Return the output [i, B, K, R, H] and the log of the softmax denominator [i, B, K, R]."""

    def row(row):
        i, q, visits = row

        def step(j, softmax, is_whole):
            scores = jnp.einsum("BKRH,BKSH->BKRS", q, _at(k, j))
            if bias is not None:
                scores += tiles.bias(i, j, part, bias, values)
            if not is_whole:
                scores = jnp.where(tiles.allowed(i, j, part, mask), scores, -jnp.inf)

            def weigh(weights):
                if key is not None:
                    weights *= tiles.kept(i, j, part, key)
                return jnp.einsum("BKRS,BKSH->BKRH", weights, _at(v, j))

            return softmax.add(scores, weigh)

        return visits.loop(step, vary(OnlineSoftmax.start(q.shape), q)).finish()

    return jax.lax.map(row, (jnp.arange(len(q)), q, tiles.visits(mask)))


def _backward(tiles: Tiles, saved, g):
    """Compute gradients by tiles [keys, queries]: four of five products need no transposed copy."""
    q, k, v, out, lse, values, part, mask, bias, key = saved
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
                scores += _transpose(tiles.bias(i, j, part, bias, values))
            weights = jnp.exp(scores - _at(lse, i)[..., None, :])
            if not is_whole:
                weights = jnp.where(_transpose(tiles.allowed(i, j, part, mask)), weights, 0.0)
            dweights = jnp.einsum("BKSH,BKRH->BKSR", v, g)
            kept = None if key is None else _transpose(tiles.kept(i, j, part, key))
            used, dscores = score_gradients(weights, dweights, _at(delta, i)[..., None, :], kept)
            dv += jnp.einsum("BKSR,BKRH->BKSH", used, g)
            if bias is not None:
                tile = partial(tiles.bias, i, j, part, bias)
                dvalues += bias_gradient(tile, values, _transpose(dscores))
            dk += jnp.einsum("BKSR,BKRH->BKSH", dscores, q)
            added = _at(dqT, i) + jnp.einsum("BKHS,BKSR->BKHR", kT, dscores)
            dqT = jax.lax.dynamic_update_index_in_dim(dqT, added, i, axis=0)
            return dqT, dk, dv, dvalues

        dqT, dvalues = state
        zeros = vary(jnp.zeros(k.shape, jnp.float32), k)
        dqT, dk, dv, dvalues = visits.loop(step, (dqT, zeros, zeros, dvalues))
        return (dqT, dvalues), (dk.astype(k_block.dtype), dv.astype(v_block.dtype))

    start = jnp.zeros(_transpose(q).shape, jnp.float32), jax.tree.map(jnp.zeros_like, values)
    start = vary(start, q)
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


SPEC = CoreSpec(
    name="flash",
    make=lambda config, shared: flash,
    length="whole",
    faster_from={"cpu": 512},
    saves_memory_on=("cpu",),
)
