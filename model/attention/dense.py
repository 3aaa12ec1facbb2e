"""Scaled dot-product attention that computes every pair: the reference for all other cores."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from model.dropout import dropout
from model.masks import AttentionMask


def dense(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: AttentionMask,
    *,
    bias: Float[Array, "b N T S"] | None = None,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> Float[Array, "B T N H"]:
    """softmax(q k^T / sqrt(H) + bias) v over the pairs that `mask` allows.

    arXiv:1706.03762 §3.2.1. The softmax is in float32. A query that may look at nothing gives 0,
    with gradient 0. `bias` is added to the scaled scores. Each key/value head serves N / K
    consecutive query heads. Memory: B * N * T * S.
    """
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    if k.shape != v.shape or k.shape != (B, S, K, H) or N % K:
        raise ValueError(f"shapes do not fit: q {q.shape}, k {k.shape}, v {v.shape}")
    q = q.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q, k, preferred_element_type=jnp.float32)
    scores *= H**-0.5  # here and not on q, which may be too coarse a type for it
    if bias is not None:
        scores += bias.reshape(bias.shape[0], K, N // K, *bias.shape[2:])
    if mask.is_full:
        weights = jax.nn.softmax(scores)
    else:
        weights = masked_softmax(scores, mask.to_bool(T, S)[:, None, None])
    weights = dropout(weights, dropout_rate, dropout_key)
    out = jnp.einsum("BKGTS,BSKH->BTKGH", weights.astype(v.dtype), v)
    return out.reshape(B, T, N, H)


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
