"""Softmax attention as in arXiv:1706.03762 §3.2.1, with which the tests compare all cores."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from heedful.model.attention.core import AttentionCall
from heedful.model.ops.dropout import dropout


def reference(call: AttentionCall) -> Float[Array, "B T N H"]:
    """Return softmax(scale * q @ k^T + bias) @ v over allowed pairs, computed in float32.

    A query without allowed keys gives 0.
    """
    (T, N), (S, K) = call.q.shape[1:3], call.k.shape[1:3]
    q, k, v = (x.astype(jnp.float32) for x in (call.q, call.k, call.v))
    k, v = (jnp.repeat(x, N // K, axis=2) for x in (k, v))
    scores = jnp.einsum("BTNH,BSNH->BNTS", q, k) * call.factor
    if call.bias is not None:
        scores += call.bias.tile(jnp.arange(T), jnp.arange(S))
    allowed = call.mask.to_bool(T, S)
    # Not -inf: the gradient of a query without keys would be NaN.
    scores = jnp.where(allowed, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores) * allowed
    weights = dropout(weights, call.dropout_rate, call.dropout_key)
    return jnp.einsum("BNTS,BSNH->BTNH", weights, v).astype(call.q.dtype)
