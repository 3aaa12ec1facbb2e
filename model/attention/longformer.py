"""Attention in a sliding window, with dilation and global tokens, in O(T w) (arXiv:2004.05150).

Each block of queries attends to the band of keys around it and to the global keys. A head with
dilation d sees the sequence as d interleaved sequences, in which its window has no gaps.

Axes in this file: r interleaved sequences (r = d); k key heads and g query heads of each key head,
all of one dilation; t queries; s the keys that the queries attend to. B, T, S, N, K, H are those of
AttentionCall, and G = N / K.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from heedful.model.attention.core import AttentionCall, CoreSpec
from heedful.model.attention.dense import dense, masked_softmax
from heedful.model.attention.flash import flash
from heedful.model.attention.rows import is_repeated, put_rows, repeat_batch, take_rows
from heedful.model.masks import AttentionMask, Window
from heedful.model.ops.dropout import dropout_words, keep_at
from heedful.model.ops.manual import vary
from heedful.model.positions import PositionBias

BLOCK = 128  # queries of a block; affects memory and time, not the result


def longformer(call: AttentionCall) -> Float[Array, "B T N H"]:
    """Compute `dense` for masks with a window, in time and memory linear in T, both ways.

    With w positions on each side and g global tokens: time O(T (w + g)), memory O(T + g S). If a
    cache holds no more keys than a window, dense or flash computes all pairs. The bias must depend
    on distances only. Raises MaskNotSupported for a mask without a window, and ModelError if the
    mesh splits the sequence.
    """
    SPEC.require(call)
    q, k, v, mask, bias = call.q, call.k, call.v, call.mask, call.bias
    (B, T, N, _), (S, K) = q.shape, k.shape[1:3]
    left, right = _sides(mask)
    assert left is not None and right is not None
    if mask.q_offset is not None and left + 1 + right >= S:
        # Positions are not known while tracing; a band around them would be wider than all keys.
        core = dense if T <= BLOCK else flash
        if bias is not None:
            bias = bias.replace(q_offset=mask.q_offset)  # type: ignore[attr-defined]
        return core(call.replace(bias=bias))
    if bias is not None:  # an offset of queries and keys changes no distance
        bias = bias.replace(q_offset=None)  # type: ignore[attr-defined]
    rule = Rule(
        mask=mask.replace(dilation=None),  # type: ignore[attr-defined]
        key=dropout_words(call.dropout_rate, call.dropout_key),
        scale=call.factor,
        rate=call.dropout_rate,
        shape=(B, K, N // K, T, S),
    )
    parts, order = [], []
    for step, heads in _groups(mask.dilation or (1,) * N, K):
        # Windows end with the sequence; with an offset, queries may be beyond all keys.
        reach = -(-max(T, S) // step) if mask.q_offset is None else max(left, right)
        band = Band(step, min(left, reach), min(right, reach), heads)
        parts.append(_in_windows(band, q, k, v, rule, bias))
        order.extend(np.ravel(heads))
    y = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=2)[:, :, np.argsort(order)]
    return y if mask.global_index is None else _with_global_rows(y, q, k, v, rule, bias)


def _sides(mask: AttentionMask) -> Window:
    """Return the window (left, right); with causality and no prefix, right is 0."""
    left, right = mask.window or (None, None)
    return left, 0 if mask.causal and mask.prefix_len is None else right


def _refusal(call: AttentionCall) -> str | None:
    if None not in _sides(call.mask):
        return None
    return (
        "it needs a window with a limit on both sides: set model.attention.window or, for "
        "cross-attention, which never has a window, set model.attention.cross_core to another core"
    )


Heads = tuple[tuple[int, ...], ...]


def _groups(steps: tuple[int, ...], kv_heads: int) -> list[tuple[int, Heads]]:
    """Return (step, query heads [k, g]) for each step; the g heads of a row share a key head."""
    found: dict[tuple[int, int], list[tuple[int, ...]]] = {}
    for row in np.arange(len(steps)).reshape(kv_heads, -1).tolist():
        for step in sorted({steps[n] for n in row}):
            members = tuple(n for n in row if steps[n] == step)
            found.setdefault((step, len(members)), []).append(members)
    return [(step, tuple(rows)) for (step, _), rows in found.items()]


# The band ---------------------------------------------------------------------------------------


class Band(NamedTuple):
    """The window of the query heads `heads` [k, g].

    It has `left` positions before and `right` positions after the query, `step` apart.
    """

    step: int
    left: int
    right: int
    heads: Heads


def _in_windows(
    band: Band,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    rule: "Rule",
    bias: PositionBias | None,
) -> Float[Array, "B T n H"]:
    """Attend from the queries of the n heads of `band` to their windows and to the global keys."""
    (B, T, N, H), (S, K) = q.shape, k.shape[1:3]
    mask, step, heads = rule.mask, band.step, np.array(band.heads)
    if step > 1:
        rule = rule.replace(mask=mask.replace(dilation=(step,)))  # type: ignore[attr-defined]
    size = min(BLOCK, -(-T // step))
    blocks = -(-T // (size * step))
    serving = heads[:, 0] * K // N  # key head of each row of `heads`
    before, rows = band.left * step, (band.left + blocks * size + band.right) * step

    def around(x: jax.Array) -> jax.Array:
        """Return keys or values [B, r, k, s, H], from the first position of the first window on."""
        x = x if len(serving) == K else x[:, :, serving]
        if mask.q_offset is None:
            pads = [(0, 0, 0), (before, rows - before - S, 0), (0, 0, 0), (0, 0, 0)]
            x = jax.lax.pad(x, jnp.zeros((), x.dtype), pads)
        else:
            x = take_rows(x, rule.offset - before + jnp.arange(rows))
        return x.reshape(B, -1, step, len(heads), H).transpose(0, 2, 3, 1, 4)

    q = q if heads.size == N else q[:, :, heads.ravel()]
    q = jnp.pad(q, [(0, 0), (0, blocks * size * step - T), (0, 0), (0, 0)])
    q = jnp.reshape(q, (B, blocks, size, step, *heads.shape, H)).transpose(1, 0, 3, 4, 5, 2, 6)
    far = None
    if mask.global_index is not None:
        far = [take_rows(x, mask.global_index)[:, :, serving] for x in (k, v)]
        far = [x.swapaxes(1, 2)[:, None] for x in far]
    y: Any = _slide(band, q, around(k), around(v), far, bias, rule)
    return y.transpose(1, 0, 5, 2, 3, 4, 6).reshape(B, -1, heads.size, H)[:, :T]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _slide(band, q, k, v, far, bias, rule):
    """Attend block by block from queries [i, B, r, k, g, t, H] to keys [B, r, k, s, H].

    JAX's own derivative would pad the gradients that each block gives to keys to the whole length
    before adding them; here they are added at the positions of these keys only.
    """

    def one(block):
        i, q = block
        k_near, v_near = _near(band, i, q, k, v)
        return _block(band, rule, i, q, k_near, v_near, far, bias)

    return jax.lax.map(one, (jnp.arange(q.shape[0]), q))


def _slide_forward(band, *arrays):
    return _slide(band, *arrays), arrays


def _slide_backward(band, saved, g):
    q, k, v, far, bias, rule = saved

    def one(sums, block):
        i, q, g = block
        near = _near(band, i, q, k, v)
        _, pull = jax.vjp(partial(_block, band, rule, i), q, *near, far, bias)
        dq, dk, dv, *rest = pull(g)
        start = (0, 0, 0, i * q.shape[-2], 0)
        for j, x in enumerate((dk, dv)):
            x += jax.lax.dynamic_slice(sums[j], start, x.shape)
            sums[j] = jax.lax.dynamic_update_slice(sums[j], x, start)
        sums[2:] = jax.tree.map(jnp.add, sums[2:], rest)
        return sums, dq

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), [k, v, far, bias])
    sums, dq = jax.lax.scan(one, vary(zeros, q), (jnp.arange(q.shape[0]), q, g))
    sums = jax.tree.map(lambda x, like: x.astype(like.dtype), sums, [k, v, far, bias])
    return dq, *sums, None


_slide.defvjp(_slide_forward, _slide_backward)


def _near(band: Band, i: jax.Array, q: jax.Array, *keys: jax.Array) -> list[jax.Array]:
    """Return the part of each array of `keys` that the windows of block i cover."""
    size = q.shape[-2]
    length = band.left + size + band.right
    return [jax.lax.dynamic_slice_in_dim(x, i * size, length, axis=3) for x in keys]


def _block(band, rule, i, q, k, v, far, bias):
    """Attend from the queries of block i to the keys near it (k, v) and to the global keys.

    `far` has global keys and values, or is None. A key that is near and global is used once.
    """
    (size, _), step = q.shape[-2:], band.step
    sequence = jnp.arange(step)[None, :, None]
    rows = (i * size + jnp.arange(size)) * step + sequence
    columns = (i * size - band.left + jnp.arange(k.shape[-2])) * step + sequence
    positions = columns + rule.offset[..., None]
    counted = (positions >= 0) & (positions < rule.shape[-1])
    if far is not None:
        places = rule.mask.global_index
        counted &= ~(positions[..., None] == places[:, None, None]).any(-1)
        real = (places >= 0) & (places < rule.shape[-1]) & ~is_repeated(places)
        columns = _join(columns, (places - rule.offset)[:, None], axis=2)
        counted = _join(counted, real[:, None], axis=2)
        k, v = (_join(x, y, axis=3) for x, y in zip((k, v), far, strict=True))
    return _attend(q, k, v, bias, rule, band.heads, rows, columns, counted)


def _join(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    """Concatenate along `axis`; along other axes, sizes of 1 are broadcast."""
    shape = np.maximum(np.delete(a.shape, axis), np.delete(b.shape, axis)).tolist()
    fit = lambda x: jnp.broadcast_to(x, (*shape[:axis], x.shape[axis], *shape[axis:]))  # noqa: E731
    return jnp.concatenate([fit(a), fit(b)], axis)


# Global rows ------------------------------------------------------------------------------------


def _with_global_rows(y, q, k, v, rule, bias):
    """Replace the outputs of global queries, which see all keys, but for causality and segments."""
    (B, _, N, H), (S, K) = q.shape, k.shape[1:3]
    rows = rule.mask.global_index - rule.offset
    keys = (x.swapaxes(1, 2)[:, None] for x in (k, v))
    queries = take_rows(q, rows).reshape(B, 1, -1, K, N // K, H).transpose(0, 1, 3, 4, 2, 5)
    attend = jax.checkpoint(_attend, static_argnums=(5,))
    columns = (jnp.arange(S) - rule.offset)[:, None]
    heads = tuple(map(tuple, np.arange(N).reshape(K, -1).tolist()))
    new = attend(
        queries, *keys, bias, rule, heads, rows[:, None], columns, jnp.ones((1, 1, S), bool)
    )
    new = new[:, 0].transpose(0, 3, 1, 2, 4).reshape(B, -1, N, H)
    return put_rows(y, rows, new)


# Pairs ------------------------------------------------------------------------------------------


@struct.dataclass
class Rule:
    """Mask, dropout and scale of the attention scores."""

    mask: AttentionMask
    key: jax.Array | None
    scale: float = struct.field(pytree_node=False)
    rate: float = struct.field(pytree_node=False)
    shape: tuple[int, int, int, int, int] = struct.field(pytree_node=False)
    """Shape (B, K, G, T, S) of all attention scores."""

    @property
    def offset(self) -> Int[Array, "b 1"]:
        """Position of the first query."""
        return jnp.reshape(0 if self.mask.q_offset is None else self.mask.q_offset, (-1, 1))


def _attend(
    q: Float[Array, "B r k g t H"],
    k: Float[Array, "B r k s H"],
    v: Float[Array, "B r k s H"],
    bias: PositionBias | None,
    rule: Rule,
    heads: Heads,
    rows: Int[Array, "#b r t"],
    columns: Int[Array, "#b r s"],
    counted: Bool[Array, "#b r s"],
) -> Float[Array, "B r k g t H"]:
    """Attend from the queries `rows` to the keys `columns`, both counted from the first query.

    `counted` is True for the columns that are keys to attend to.
    """
    numbers = np.array(heads)
    scores = jnp.einsum("BrkgtH,BrksH->Brkgts", q, k, preferred_element_type=jnp.float32)
    scores *= rule.scale
    if bias is not None:
        scores += _tiles(None, lambda _, *index: bias.tile(*index), rows, columns)[:, :, numbers]
    positions = columns + rule.offset[..., None]
    allowed = _tiles(rule.mask, AttentionMask.tile, rows, positions) & counted[:, :, None, None]
    weights = masked_softmax(scores, allowed[:, :, None])
    if rule.key is not None:
        (B, _, G, *_), n = rule.shape, numbers[:, :, None, None]
        b = np.arange(B).reshape(-1, 1, 1, 1, 1, 1)
        t, s = rows[:, :, None, None, :, None], positions[:, :, None, None, None, :]
        kept = keep_at(rule.key, (b, n // G, n % G, t, s), rule.shape, rule.rate)
        weights = jnp.where(kept, weights / (1 - rule.rate), 0)
    return jnp.einsum("Brkgts,BrksH->BrkgtH", weights.astype(v.dtype), v)


def _tiles(
    of: AttentionMask | None, tile: Callable, rows: jax.Array, columns: jax.Array
) -> jax.Array:
    """Return tile(of, rows, columns) [b, r, n, t, s] for each row of the batch and sequence r."""
    arrays = jax.tree.map(jnp.atleast_1d, (of, rows, columns))
    batch = max(map(len, jax.tree.leaves(arrays)))
    of, rows, columns = jax.tree.map(partial(repeat_batch, batch=batch), arrays)
    one_row = jax.vmap(lambda of, t, s: tile(of, t, s)[0], in_axes=(None, 0, 0))
    return jax.vmap(one_row)(jax.tree.map(lambda x: x[:, None], of), rows, columns)


SPEC = CoreSpec(
    name="longformer", make=lambda config, shared: longformer, refusal=_refusal, length="whole"
)
