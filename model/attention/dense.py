"""Scaled dot-product attention that computes every pair: the reference for all other cores."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from model.dropout import dropout
from model.masks import AttentionMask
from model.positions import PositionBias


def dense(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: AttentionMask,
    *,
    bias: PositionBias | None = None,
    scale: float | None = None,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> Float[Array, "B T N H"]:
    """softmax(scale q k^T + bias) v over the pairs that `mask` allows; scale None: 1 / sqrt(H).

    arXiv:1706.03762 §3.2.1. The softmax is in float32. A query that may look at nothing gives 0,
    with gradient 0. Each key/value head serves N / K consecutive query heads.
    Memory: B * N * T * S.
    """
    require_shapes(q, k, v)
    weights = attention_weights(q, k, mask, bias=bias, scale=scale)
    weights = dropout(weights, dropout_rate, dropout_key)
    out = jnp.einsum("BKGTS,BSKH->BTKGH", weights.astype(v.dtype), v)
    return out.reshape(q.shape)


def attention_weights(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    mask: AttentionMask,
    *,
    bias: PositionBias | None = None,
    scale: float | None = None,
) -> Float[Array, "B K G T S"]:
    """What share each query takes of each key, in float32; all 0 where nothing may be seen."""
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    require_shapes(q, k)
    q = q.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q, k, preferred_element_type=jnp.float32)
    # The scale is applied here and not to q, which may be too coarse a type for it.
    scores *= H**-0.5 if scale is None else scale
    if bias is not None:
        tile = bias.tile(jnp.arange(T), jnp.arange(S))
        scores += tile.reshape(tile.shape[0], K, N // K, T, S)
    if mask.is_full:
        return jax.nn.softmax(scores)
    allowed = mask.to_bool(T, S)
    if allowed.shape[1] == 1:
        return masked_softmax(scores, allowed[:, None])
    return masked_softmax(scores, allowed.reshape(allowed.shape[0], K, N // K, T, S))


def require_shapes(q: jax.Array, k: jax.Array, v: jax.Array | None = None) -> None:
    """Raises ValueError unless q is [B, T, N, H] and k and v are [B, S, K, H], K a divisor of N."""
    (B, _, N, H), (S, K) = q.shape, k.shape[1:3]
    if k.shape != (B, S, K, H) or N % K or (v is not None and v.shape != k.shape):
        values = "" if v is None else f", v {v.shape}"
        raise ValueError(f"shapes do not fit: q {q.shape}, k {k.shape}{values}")


def masked_softmax(
    scores: Float[Array, "*b T S"], allowed: Bool[Array, "*#b T S"]
) -> Float[Array, "*b T S"]:
    """Softmax over the allowed entries of the last axis; 0 for the others, and for an empty row."""
    # Excluded entries are replaced, not offset: no score is large enough to get around that.
    scores = jnp.where(allowed, scores, -jnp.inf)
    highest = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    highest = jnp.where(jnp.isfinite(highest), highest, 0.0)
    exponentials = jnp.exp(scores - highest)
    total = jnp.sum(exponentials, axis=-1, keepdims=True)
    return exponentials / jnp.where(total > 0.0, total, 1.0)
