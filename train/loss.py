"""Losses as (sum of losses, sum of weights), so that parts can be added, then divided once."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from heedful.model.axes import mesh_axes, shards


def cross_entropy(
    logits: Float[Array, "*b V"],
    targets: Int[Array, "*b"],
    weights: Float[Array, "*b"],
    label_smoothing: float = 0.0,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Return (sum of weighted losses in nats, sum of weights), in float32.

    With label smoothing e, the target distribution is (1 - e) at the target, plus e / V at each of
    the V entries of the vocabulary (arXiv:1512.00567 §7).
    """
    losses: jax.Array = token_losses(logits.astype(jnp.float32), targets, label_smoothing)  # type: ignore[assignment]
    return jnp.sum(losses * weights), jnp.sum(weights)


def cross_entropy_in_chunks(
    score: Callable[[Any, jax.Array], jax.Array],
    params: Any,
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    size: int,
    label_smoothing: float = 0.0,
    *,
    skips: bool = False,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Compute `cross_entropy` of score(params, hidden), `size` positions of a row at a time.

    Gradients are computed together with the values, so that no logits are computed twice. `score`
    must depend on its arguments only. With `skips`, positions of weight 0 move to the end of each
    row, and chunks without any weight above 0 are skipped. B rows, T positions, D width.
    """
    B, T = targets.shape
    devices = shards("act_length")
    part = T // devices  # Positions of a row on each of the devices that share the row.
    size = math.ceil(size / devices)
    number = math.ceil(part / size)
    if skips:
        counts = (weights > 0).reshape(B, devices, part)
        order = jnp.argsort(~counts, axis=-1, stable=True)
        needed = jnp.max(-(-jnp.sum(counts, axis=-1) // size))
    else:
        size, order, needed = math.ceil(part / number), None, None

    def split(x: jax.Array) -> jax.Array:
        """Split [B, T, ...] into chunks [number, B, devices * size, ...], sharded over devices."""
        x = x.reshape(B, devices, part, *x.shape[2:])
        if order is not None:
            x = jax.vmap(jax.vmap(_taken))(x, order)
        x = jnp.pad(x, [(0, 0), (0, 0), (0, number * size - part), *[(0, 0)] * (x.ndim - 3)])
        x = x.reshape(B, devices, number, size, *x.shape[3:])
        return jnp.moveaxis(x, 2, 0).reshape(number, B, devices * size, *x.shape[4:])

    def one(params: Any, hidden: jax.Array, others: tuple[jax.Array, jax.Array]):
        return cross_entropy(score(params, hidden), *others, label_smoothing)

    return _summed(one, params, split(hidden), (split(targets), split(weights)), needed)


def _taken(x: Shaped[Array, "T *d"], order: Int[Array, " T"]) -> Shaped[Array, "T *d"]:
    """Return x[order]; the compiler of the gradient may assume that no index occurs twice."""
    return x.at[order].get(unique_indices=True, mode="promise_in_bounds")


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed(one: Callable, params: Any, hidden: jax.Array, others: Any, needed: jax.Array | None):
    """Return the sum of one(params, hidden[i], others[i]) over i < `needed`; None: over all i."""
    count = len(hidden) if needed is None else needed

    def add(i: Any, total: Any):
        return jax.tree.map(jnp.add, total, one(params, *_at(i, (hidden, others))))

    return jax.lax.fori_loop(0, count, add, (jnp.float32(0), jnp.float32(0)))


def _summed_forward(one: Callable, params: Any, hidden: jax.Array, others: Any, needed: Any):
    count = len(hidden) if needed is None else needed
    gradient = jax.value_and_grad(one, argnums=(0, 1), has_aux=True)

    def add(i: Any, state: Any):
        total, of_hidden = state
        (loss, weight), (of_params, of_chunk) = gradient(params, *_at(i, (hidden, others)))
        total = jax.tree.map(jnp.add, total, (loss, weight, of_params))
        return total, of_hidden.at[i].set(of_chunk)

    zeros = jnp.float32(0), jnp.float32(0), jax.tree.map(jnp.zeros_like, params)
    total, of_hidden = jax.lax.fori_loop(0, count, add, (zeros, jnp.zeros_like(hidden)))
    loss, weight, of_params = total
    return (loss, weight), (of_params, of_hidden)


def _summed_backward(one: Callable, saved: Any, g: tuple[jax.Array, jax.Array]):
    return *jax.tree.map(lambda x: (x * g[0]).astype(x.dtype), saved), None, None


_summed.defvjp(_summed_forward, _summed_backward)


def _at(i: Any, tree: Any) -> Any:
    return jax.tree.map(lambda x: x[i], tree)


def squared_error(
    outputs: Float[Array, "B 1"], targets: Float[Array, " B"], weights: Float[Array, " B"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Return (sum of weighted squared errors, sum of weights), in float32."""
    errors = jnp.square(outputs[:, 0].astype(jnp.float32) - targets)
    return jnp.sum(errors * weights), jnp.sum(weights)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def token_losses(
    logits: Float[Array, "*b V"], targets: Int[Array, "*b"], label_smoothing: float
) -> Float[Array, "*b"]:
    """Return the cross-entropy of each token, in nats."""
    return _forward(logits, targets, label_smoothing)[0]


def _forward(logits: jax.Array, targets: jax.Array, label_smoothing: float):
    if any(mesh_axes("act_vocab")):  # A gather would be slow where V is sharded.
        score = jnp.sum(jnp.where(_is_target(logits, targets), logits, 0.0), axis=-1)
    else:
        score = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    if label_smoothing:
        score = (1 - label_smoothing) * score + label_smoothing * jnp.mean(logits, axis=-1)
    most = jnp.max(logits, axis=-1)
    total = jnp.sum(jnp.exp(logits - most[..., None]), axis=-1)
    return most + jnp.log(total) - score, (logits, targets, most, total)


def _backward(label_smoothing: float, saved: tuple[jax.Array, ...], g: jax.Array):
    """Return softmax - target distribution, in one pass over the logits.

    The exponentials are the same expression as in the forward pass. So XLA on a CPU computes them
    once for both, and not inside of the sum, which would take longer. On an accelerator, XLA
    computes them wherever they are needed.
    """
    logits, targets, most, total = saved
    wanted = jnp.where(_is_target(logits, targets), 1 - label_smoothing, 0.0)
    wanted += label_smoothing / logits.shape[-1]
    softmax = jnp.exp(logits - most[..., None]) * (1 / total)[..., None]
    return (softmax - wanted) * g[..., None], None


token_losses.defvjp(_forward, _backward)


def _is_target(logits: jax.Array, targets: jax.Array) -> jax.Array:
    return jnp.arange(logits.shape[-1]) == targets[..., None]
