"""Exact attention of a sequence that is split over devices: keys and values travel in a ring.

arXiv:2310.01889. Each device keeps its queries, and sees the keys and values of all devices in
turn, by blocks with a running softmax. In the backward pass, keys and values travel again, together
with their gradients. A device holds O(T / devices) of every array, except those of the mask, which
are whole on each device.

Under a causal mask, the device with the first part of the sequence would have almost nothing to do.
Therefore n devices cut the sequence into 2n chunks, and device i works on chunks i and 2n - 1 - i.
The rest of the model keeps tokens in order: q, k, v and the output are exchanged here, half of each
array at a time, which sends as much as two steps of the ring.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from heedful.model.attention.core import AttentionCall, CoreSpec
from heedful.model.attention.online_softmax import OnlineSoftmax, bias_gradient, score_gradients
from heedful.model.axes import mesh_axes, shards
from heedful.model.config import require
from heedful.model.masks import AttentionMask
from heedful.model.ops.dropout import dropout_words, keep_at
from heedful.model.positions import PositionBias


def ring(call: AttentionCall) -> Float[Array, "B T N H"]:
    """Compute `dense`, with the same weights dropped, on a mesh that splits the sequence.

    All masks are supported except those with the offset of a cache. Raises ModelError if the mesh
    does not split the sequence, or if the number of parts does not divide a size.
    """
    SPEC.require(call)
    q, k, v, mask, bias = call.q, call.k, call.v, call.mask, call.bias
    (B, T, N, _), (S, K) = q.shape, k.shape[1:3]
    key = dropout_words(call.dropout_rate, call.dropout_key)
    batch, length, heads = mesh_axes("act_batch", "act_length", "act_heads")
    is_balanced = mask.causal and T == S
    parts = shards("act_length") * (2 if is_balanced else 1)
    for name, size, into in (
        ("batch", B, shards("act_batch")),
        ("queries", T, parts),
        ("keys", S, parts),
        ("heads", K, shards("act_heads")),
    ):
        require(
            size % into == 0,
            f"core ring cuts {name} into {into} parts, but {size} is no multiple of {into}: "
            "change train.mesh, or this size",
        )

    layout = Ring(
        batch=batch,
        length=length,
        heads=heads,
        devices=shards("act_length"),
        shape=(B, K, N // K, T, S),
        scale=call.factor,
        dropout_rate=call.dropout_rate,
        is_balanced=is_balanced,
    )
    by_token = PartitionSpec(batch, length, heads)
    by_row = lambda x: PartitionSpec(batch if x.ndim and len(x) == B else None)  # noqa: E731
    return jax.shard_map(
        partial(_on_device, layout),
        in_specs=(
            by_token,
            by_token,
            by_token,
            jax.tree.map(by_row, mask),
            PartitionSpec(),
            PartitionSpec(),
        ),
        out_specs=by_token,
        check_vma=False,
    )(q, k, v, mask, bias, key)


@dataclass(frozen=True)
class Ring:
    """The layout of the sequence, the same on all devices and in all steps."""

    batch: tuple[str, ...]
    length: tuple[str, ...]
    heads: tuple[str, ...]
    devices: int
    """Number of devices in the ring."""
    shape: tuple[int, ...]
    """Shape (B, K, G, T, S) of the attention weights over all devices."""
    scale: float
    dropout_rate: float
    is_balanced: bool

    def index(self, device: jax.Array, length: int) -> jax.Array:
        """Return the positions of the `length` tokens on which a device works."""
        if not self.is_balanced:
            return device * length + jnp.arange(length)
        mirror = 2 * self.devices - 1 - device
        even = jnp.where(device % 2 == 0, device, mirror)
        odd = device + mirror - even
        within = jnp.arange(length // 2)
        return jnp.concatenate([chunk * (length // 2) + within for chunk in (even, odd)])

    def exchange(self, x: Float[Array, "b t *rest"], back: bool = False) -> jax.Array:
        """Exchange tokens from the order of the model to the order of `index`, or back.

        In the order of the model, device i has the chunks 2i and 2i + 1. Chunk c goes to device c
        or, in the second half, to device 2n - 1 - c of n. Even chunks go to different devices, and
        so do odd chunks.
        """
        if not self.is_balanced:
            return x
        home = lambda chunk: min(chunk, 2 * self.devices - 1 - chunk)  # noqa: E731
        halves = []
        for i, half in enumerate(jnp.split(x, 2, axis=1)):
            moves = [(device, home(2 * device + i)) for device in range(self.devices)]
            moves = [move[::-1] for move in moves] if back else moves
            halves.append(jax.lax.ppermute(half, self.length, moves))
        return jnp.concatenate(halves, axis=1)

    def rotate(self, tree: Any) -> Any:
        """Send all arrays of `tree` to the next device of the ring."""
        moves = [(i, (i + 1) % self.devices) for i in range(self.devices)]
        return jax.tree.map(lambda x: jax.lax.ppermute(x, self.length, moves), tree)

    def scores(self, q, k, rows, columns, values, mask: AttentionMask, bias) -> jax.Array:
        """Return the attention scores [b, k, G, t, s] of a tile, -inf for pairs not allowed."""
        scores = jnp.einsum("BKGTH,BKSH->BKGTS", q, k, preferred_element_type=jnp.float32)
        scores *= self.scale
        if bias is not None:
            scores += self.bias(rows, columns, k.shape[1], bias, values)
        if mask.is_full:
            return scores
        allowed = self.own_heads(mask.tile(rows, columns), k.shape[1])
        return jnp.where(allowed, scores, -jnp.inf)

    def bias(self, rows, columns, kv_heads: int, bias: PositionBias, values) -> jax.Array:
        """Return the bias of a tile for this device's heads, with `values` for bias.values."""
        return self.own_heads(bias.replace(values=values).tile(rows, columns), kv_heads)  # type: ignore[attr-defined]

    def own_heads(self, tile: jax.Array, kv_heads: int) -> jax.Array:
        """Return the heads of this device in a tile [b, N or 1, t, s].

        The result is [b, k, G, t, s], or [b, 1, 1, t, s] for a tile that all heads share.
        """
        if tile.shape[1] == 1:
            return tile[:, None]
        tile = tile.reshape(tile.shape[0], *self.shape[1:3], *tile.shape[2:])
        first = jax.lax.axis_index(self.heads) * kv_heads if self.heads else 0
        return jax.lax.dynamic_slice_in_dim(tile, first, kv_heads, axis=1)

    def kept(self, shape: tuple[int, ...], rows, columns, key: jax.Array) -> jax.Array:
        """Return the factors by which dropout multiplies the weights of a tile."""
        own = []
        for axes, size in ((self.batch, shape[0]), (self.heads, shape[1])):
            own.append((jax.lax.axis_index(axes) * size if axes else 0) + jnp.arange(size))
        index = jnp.ix_(*own, jnp.arange(shape[2]), rows, columns)
        stay = keep_at(key, index, self.shape, self.dropout_rate)
        return jnp.where(stay, 1 / (1 - self.dropout_rate), 0.0)


def _on_device(layout: Ring, q, k, v, mask: AttentionMask, bias: PositionBias | None, key) -> Any:
    """Return the outputs for the queries of this device; tokens are in the order of the model."""
    b, t, n, H = q.shape
    q, k, v = (layout.exchange(x) for x in (q, k, v))
    q = q.reshape(b, t, k.shape[2], -1, H)
    values = None if bias is None else bias.values
    out: Any = _attend(layout, q, k, v, values, mask, bias, key)
    return layout.exchange(out.reshape(b, t, n, H), back=True)


def _blocks(layout: Ring, x: jax.Array) -> jax.Array:
    """Cut [b, t, k, ...] into blocks [blocks, b, k, ..., t, H], and [t] into [blocks, t]."""
    axis = 0 if x.ndim == 1 else 1
    chunk = x.shape[axis] // (2 if layout.is_balanced else 1)
    size = _block(chunk)
    x = x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])
    return x if axis == 0 else jnp.moveaxis(x, (1, 2), (0, -2))


def _block(chunk: int) -> int:
    """Return the largest divisor of `chunk` from 64 to 512, or `chunk` without such a divisor."""
    return next((size for size in range(512, 63, -1) if chunk % size == 0), chunk)


def _unblocked(x: jax.Array) -> jax.Array:
    """Join [blocks, b, k, ..., t, H] to [b, t, k, ...]."""
    x = jnp.moveaxis(x, (0, -2), (1, 2))
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _forward(layout: Ring, q, k, v, values, mask: AttentionMask, bias, key):
    """Return the output, and the log of the softmax denominator [blocks, b, k, G, t]."""
    # The barrier hides that these are the same in all layers: otherwise XLA computes masks before
    # the loop over layers, and stores T * S numbers for each head.
    q, mask, me = jax.lax.optimization_barrier((q, mask, jax.lax.axis_index(layout.length)))
    q_rows, q_blocks = _blocks(layout, layout.index(me, q.shape[1])), _blocks(layout, q)

    def tile(softmax, q, rows, k, v, columns):
        def weigh(weights):
            if layout.dropout_rate:
                weights *= layout.kept(weights.shape, rows, columns, key)
            weights = weights.astype(v.dtype)
            return jnp.einsum("BKGTS,BKSH->BKGTH", weights, v, preferred_element_type=jnp.float32)

        return softmax.add(layout.scores(q, k, rows, columns, values, mask, bias), weigh)

    def visit(state, k, v, step):
        """Attend from all queries of this device to the keys that arrived in `step`."""
        columns = _blocks(layout, layout.index((me - step) % layout.devices, k.shape[1]))
        arrived = _blocks(layout, k), _blocks(layout, v), columns

        def row(block):
            state, q, rows = block

            def one(state, keys):
                k, v, columns = keys
                return jax.lax.cond(
                    jnp.any(mask.tile(rows, columns)), tile, lambda state, *_: state,
                    state, q, rows, k, v, columns,
                ), None  # fmt: skip

            return jax.lax.scan(one, state, arrived)[0]

        return jax.lax.map(row, (state, q_blocks, q_rows))

    def step(carry, number):
        k, v, state = carry
        following = layout.rotate((k, v))  # the next keys travel during `visit`
        return (*following, visit(state, k, v, number)), None

    state = OnlineSoftmax.start(q_blocks.shape)
    (k, v, state), _ = jax.lax.scan(step, (k, v, state), jnp.arange(layout.devices - 1))
    out, lse = visit(state, k, v, layout.devices - 1).finish()
    return _unblocked(out).astype(q.dtype), lse


def _backward(layout: Ring, saved, g):
    q, k, v, out, lse, values, mask, bias, key = saved
    me = jax.lax.axis_index(layout.length)
    delta = jnp.sum(g.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)
    queries = (
        *(_blocks(layout, x) for x in (q, g, delta)),
        lse[..., None],
        _blocks(layout, layout.index(me, q.shape[1])),
    )
    dot = partial(jnp.einsum, preferred_element_type=jnp.float32)

    def tile(grads, query, k, v, columns):
        dk, dv, dvalues = grads
        q, g, delta, lse, rows = query
        weights = jnp.exp(layout.scores(q, k, rows, columns, values, mask, bias) - lse)
        dweights = dot("BKGTH,BKSH->BKGTS", g, v)
        drops = layout.dropout_rate > 0
        kept = layout.kept(weights.shape, rows, columns, key) if drops else None
        used, dscores = score_gradients(weights, dweights, delta, kept)
        dv += dot("BKGTS,BKGTH->BKSH", used.astype(g.dtype), g)
        if values is not None:
            added = partial(layout.bias, rows, columns, k.shape[1], bias)
            dvalues += bias_gradient(added, values, dscores)
        dscores = (dscores * layout.scale).astype(q.dtype)
        dk += dot("BKGTS,BKGTH->BKSH", dscores, q)
        return (dk, dv, dvalues), dot("BKGTS,BKSH->BKGTH", dscores, k)

    def visit(state, k, v, step):
        """Add to `state` what the keys that arrived in `step` contribute; return it, dk and dv.

        `state` is (dq, gradient of the bias values) of this device; dk and dv are of these keys.
        """
        columns = _blocks(layout, layout.index((me - step) % layout.devices, k.shape[1]))

        def column(state, keys):
            dq, dvalues = state
            k, v, columns = keys

            def one(grads, query):
                return jax.lax.cond(
                    jnp.any(mask.tile(query[-1], columns)),
                    tile,
                    lambda grads, query, *_: (grads, jnp.zeros(query[0].shape, jnp.float32)),
                    grads, query, k, v, columns,
                )  # fmt: skip

            zeros = jnp.zeros(k.shape, jnp.float32)
            (dk, dv, dvalues), added = jax.lax.scan(one, (zeros, zeros, dvalues), queries)
            return (dq + added, dvalues), (dk, dv)

        state, grads = jax.lax.scan(
            column, state, (_blocks(layout, k), _blocks(layout, v), columns)
        )
        return state, tuple(map(_unblocked, grads))

    def step(carry, number):
        k, v, dk, dv, state = carry
        state, (more_dk, more_dv) = visit(state, k, v, number)
        return (*layout.rotate((k, v, dk + more_dk, dv + more_dv)), state), None

    state = jnp.zeros(queries[0].shape, jnp.float32), jax.tree.map(jnp.zeros_like, values)
    zeros = jnp.zeros(k.shape, jnp.float32)
    carry, _ = jax.lax.scan(step, (k, v, zeros, zeros, state), jnp.arange(layout.devices))
    _, _, dk, dv, (dq, dvalues) = carry  # dk and dv are back on the device of their keys
    dq, dk, dv = _unblocked(dq).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)
    return dq, dk, dv, dvalues, None, None, None


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(layout: Ring, q, k, v, values, mask, bias, key):
    return _forward(layout, q, k, v, values, mask, bias, key)[0]


def _attend_forward(layout: Ring, q, k, v, values, mask, bias, key):
    out, lse = _forward(layout, q, k, v, values, mask, bias, key)
    return out, (q, k, v, out, lse, values, mask, bias, key)


_attend.defvjp(_attend_forward, _backward)


def _refusal(call: AttentionCall) -> str | None:
    if call.mask.q_offset is None:
        return None
    return (
        "it splits queries over devices, and does not support a cache: decode with "
        "model.attention.core flash"
    )


SPEC = CoreSpec(name="ring", make=lambda config, shared: ring, refusal=_refusal, length="split")
