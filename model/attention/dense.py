"""Scaled dot-product attention that computes all pairs of queries and keys."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from heedful.model.attention.core import AttentionCall, CoreSpec
from heedful.model.masks import AttentionMask
from heedful.model.ops.dropout import dropout_words, keep
from heedful.model.positions import PositionBias


def dense(call: AttentionCall) -> Float[Array, "B T N H"]:
    """Return softmax(scale * q @ k^T + bias) @ v over the pairs that the mask allows.

    arXiv:1706.03762 §3.2.1. The softmax is computed in float32. A query without allowed keys gives
    0, with gradient 0. Memory: O(B * N * T * S).
    """
    SPEC.require(call)
    pairs = pairs_of(call.mask, call.bias, call.q.shape[1], call.k.shape[1])
    return attend_pairs(call, *pairs)


def pairs_of(
    mask: AttentionMask, bias: PositionBias | None, q_length: int, kv_length: int
) -> tuple[Bool[Array, "b n T S"] | None, Float[Array, "c N T S"] | None]:
    """Return the allowed pairs (None: all) and the bias of attention scores (None: 0).

    b, c and n are B, B and N, or 1 if the array is the same for all rows or heads.
    """
    allowed = None if mask.is_full else mask.to_bool(q_length, kv_length)
    added = None if bias is None else bias.tile(jnp.arange(q_length), jnp.arange(kv_length))
    return allowed, added


def attend_pairs(
    call: AttentionCall,
    allowed: Bool[Array, "b n T S"] | None,
    bias: Float[Array, "c N T S"] | None,
) -> Float[Array, "B T N H"]:
    """Compute `dense` with `allowed` pairs (None: all) and `bias` instead of those of the call."""
    q, v, rate = call.q, call.v, call.dropout_rate
    scores, allowed = _scores(call, allowed, bias)
    words = dropout_words(rate, call.dropout_key)
    kept = None if words is None else keep(words, scores.shape, rate)
    out: Any = _average(rate, scores, allowed, kept, jnp.swapaxes(v, 1, 2))
    return jnp.swapaxes(out.reshape(len(q), q.shape[2], -1, q.shape[3]), 1, 2)


def attention_weights(call: AttentionCall) -> Float[Array, "B K G T S"]:
    """Return the attention weights in float32, without dropout.

    Queries without allowed keys have the weights 0. G = N / K query heads share a key head.
    """
    call.require_shapes()
    T, S = call.q.shape[1], call.k.shape[1]
    weights = masked_softmax(*_scores(call, *pairs_of(call.mask, call.bias, T, S)))
    return weights.reshape(*weights.shape[:2], -1, T, S)


def _scores(
    call: AttentionCall,
    allowed: Bool[Array, "b n T S"] | None,
    bias: Float[Array, "c N T S"] | None,
) -> tuple[Float[Array, "B K R S"], Bool[Array, "b k R S"] | None]:
    """Return attention scores in float32, and the allowed pairs (None: all).

    R = G * T: the T queries of the first of the G query heads of a key/value head, then those of
    the next query head, and so on.
    """
    (B, _, N, H), (S, K) = call.q.shape, call.k.shape[1:3]
    q = jnp.swapaxes(call.q, 1, 2).reshape(B, K, -1, H)
    k = jnp.swapaxes(call.k, 1, 2)
    factor = call.factor
    # Types other than float32 are too coarse to scale q: the scores are scaled instead.
    is_fine = q.dtype == jnp.float32
    q = q * factor if is_fine else q
    scores: Any = _products(q, k)
    scores = scores if is_fine else scores * factor
    if bias is not None:
        scores += bias.reshape(len(bias), K, -1, S)
    if allowed is None:
        return scores, None
    if allowed.shape[1] == 1:
        return scores, jnp.tile(allowed, (1, 1, N // K, 1))
    return scores, allowed.reshape(len(allowed), K, -1, S)


@jax.custom_vjp
def _products(q: Float[Array, "B K R H"], k: Float[Array, "B K S H"]) -> Float[Array, "B K R S"]:
    """Return q @ k^T in float32; its derivative sums over queries by `_over_queries`."""
    return _products_forward(q, k)[0]


def _products_forward(q, k):
    return jnp.einsum("BKRH,BKSH->BKRS", q, k, preferred_element_type=jnp.float32), (q, k)


def _products_backward(saved: tuple, g: jax.Array):
    q, k = saved
    dq, dk = jnp.einsum("BKRS,BKSH->BKRH", g, k), _over_queries(g, q)
    return dq.astype(q.dtype), dk.astype(k.dtype)


_products.defvjp(_products_forward, _products_backward)


def _over_queries(
    pairs: Float[Array, "B K R S"], queries: Float[Array, "B K R H"]
) -> Float[Array, "B K S H"]:
    """Return pairs^T @ queries, summed over R.

    The larger factor `pairs` is the second one in the einsum: as the first, a CPU transposes it.
    """
    return jnp.swapaxes(jnp.einsum("BKRH,BKRS->BKHS", queries, pairs), 2, 3)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _average(
    dropout_rate: float,
    scores: Float[Array, "B K R S"],
    allowed: Bool[Array, "b k R S"] | None,
    kept: Bool[Array, "B K R S"] | None,
    v: Float[Array, "B K S H"],
) -> Float[Array, "B K R H"]:
    """Return dropout(softmax(scores)) @ v; allowed None: all pairs; kept None: no dropout.

    The derivative of the softmax needs a sum over the S keys of each query. It is computed as a sum
    over H numbers, output times gradient of the output (arXiv:2205.14135 appendix B.2).
    """
    return _average_forward(dropout_rate, scores, allowed, kept, v)[0]


def _average_forward(dropout_rate: float, scores, allowed, kept, v):
    weights = masked_softmax(scores, allowed)
    used = _dropped(weights, kept, dropout_rate).astype(v.dtype)
    out = jnp.einsum("BKRS,BKSH->BKRH", used, v)
    return out, (weights, kept, v, out)


def _average_backward(dropout_rate: float, saved: tuple, g: jax.Array):
    weights, kept, v, out = saved
    used = _dropped(weights, kept, dropout_rate).astype(v.dtype)
    dv = _over_queries(used, g)
    dweights = jnp.einsum("BKRH,BKSH->BKRS", g, v, preferred_element_type=jnp.float32)
    dweights = _dropped(dweights, kept, dropout_rate)
    delta = jnp.sum(g.astype(jnp.float32) * out, axis=-1, keepdims=True)
    return weights * (dweights - delta), None, None, dv


_average.defvjp(_average_forward, _average_backward)


def _dropped(weights: jax.Array, kept: jax.Array | None, rate: float) -> jax.Array:
    return weights if kept is None else jnp.where(kept, weights / (1 - rate), 0)


def masked_softmax(
    scores: Float[Array, "*b T S"], allowed: Bool[Array, "*#b T S"] | None
) -> Float[Array, "*b T S"]:
    """Compute the softmax over the allowed entries of the last axis; None: all entries.

    Entries that are not allowed get 0, and so do all entries of a row without allowed entries.
    """
    if allowed is None:
        return jax.nn.softmax(scores)
    # Excluded scores are replaced, as a very large score could outweigh a number added to it.
    scores = jnp.where(allowed, scores, -jnp.inf)
    highest = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    highest = jnp.where(jnp.isfinite(highest), highest, 0.0)
    exponentials = jnp.exp(scores - highest)
    total = jnp.sum(exponentials, axis=-1, keepdims=True)
    return exponentials / jnp.where(total > 0.0, total, 1.0)


SPEC = CoreSpec(name="dense", make=lambda config, shared: dense, is_quadratic=True)
