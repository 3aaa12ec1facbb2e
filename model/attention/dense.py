"""Scaled dot-product attention that computes every pair: the reference for all other cores."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from heedful.model.axes import mesh_axes
from heedful.model.config import require
from heedful.model.dropout import dropout_words, keep
from heedful.model.masks import AttentionMask
from heedful.model.positions import PositionBias


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
    pairs = pairs_of(mask, bias, q.shape[1], k.shape[1])
    return attend_pairs(
        q, k, v, *pairs, scale=scale, dropout_rate=dropout_rate, dropout_key=dropout_key
    )


def pairs_of(
    mask: AttentionMask, bias: PositionBias | None, q_length: int, kv_length: int
) -> tuple[Bool[Array, "b n T S"] | None, Float[Array, "c N T S"] | None]:
    """What each query may look at, None: everything; and the bias of each score, None: 0."""
    allowed = None if mask.is_full else mask.to_bool(q_length, kv_length)
    added = None if bias is None else bias.tile(jnp.arange(q_length), jnp.arange(kv_length))
    return allowed, added


def attend_pairs(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    allowed: Bool[Array, "b n T S"] | None,
    bias: Float[Array, "c N T S"] | None,
    *,
    scale: float | None = None,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> Float[Array, "B T N H"]:
    """`dense`, given the pairs that are allowed, None: all, and what is added to their scores."""
    scores, allowed = _scores(q, k, allowed, bias, scale)
    words = dropout_words(dropout_rate, dropout_key)
    kept = None if words is None else keep(words, scores.shape, dropout_rate)
    out: Any = _average(dropout_rate, scores, allowed, kept, jnp.swapaxes(v, 1, 2))
    return jnp.swapaxes(out.reshape(len(q), q.shape[2], -1, q.shape[3]), 1, 2)


def attention_weights(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    mask: AttentionMask,
    *,
    bias: PositionBias | None = None,
    scale: float | None = None,
) -> Float[Array, "B K G T S"]:
    """What share each query takes of each key, in float32; all 0 where nothing may be seen."""
    require_shapes(q, k)
    pairs = pairs_of(mask, bias, q.shape[1], k.shape[1])
    weights = masked_softmax(*_scores(q, k, *pairs, scale))
    return weights.reshape(*weights.shape[:2], -1, q.shape[1], k.shape[1])


def _scores(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    allowed: Bool[Array, "b n T S"] | None,
    bias: Float[Array, "c N T S"] | None,
    scale: float | None,
) -> tuple[Float[Array, "B K R S"], Bool[Array, "b k R S"] | None]:
    """What goes into the softmax, in float32, and where it counts; None: everywhere.

    The R rows of a key/value head are its G query heads' T queries, one head after the other.
    """
    B, _, N, H = q.shape
    S, K = k.shape[1:3]
    q = jnp.swapaxes(q, 1, 2).reshape(B, K, -1, H)
    k = jnp.swapaxes(k, 1, 2)
    factor = H**-0.5 if scale is None else scale
    is_fine = q.dtype == jnp.float32  # Otherwise q may be too coarse a type for the scale.
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
    """Scalar products in float32, whose derivatives sum over queries by `_over_queries`."""
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
    """A sum over R with the larger factor second: a CPU would turn it around if it were first."""
    return jnp.swapaxes(jnp.einsum("BKRH,BKRS->BKHS", queries, pairs), 2, 3)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _average(
    dropout_rate: float,
    scores: Float[Array, "B K R S"],
    allowed: Bool[Array, "b k R S"] | None,
    kept: Bool[Array, "B K R S"] | None,
    v: Float[Array, "B K S H"],
) -> Float[Array, "B K R H"]:
    """`v` weighted by the softmax of scores, of whose weights some are dropped.

    The derivative of the softmax takes its sum over all keys from the result, which has H numbers
    a query in place of S (arXiv:2205.14135 appendix B.2).
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


def require_shapes(q: jax.Array, k: jax.Array, v: jax.Array | None = None) -> None:
    """Raises ValueError unless q is [B, T, N, H] and k and v are [B, S, K, H], K a divisor of N."""
    (B, _, N, H), (S, K) = q.shape, k.shape[1:3]
    if k.shape != (B, S, K, H) or N % K or (v is not None and v.shape != k.shape):
        values = "" if v is None else f", v {v.shape}"
        raise ValueError(f"shapes do not fit: q {q.shape}, k {k.shape}{values}")


def require_whole_rows(core: str) -> None:
    """Raises ModelError where the mesh splits the sequence."""
    (length,) = mesh_axes("act_length")
    require(
        not length,
        f"core {core} needs whole sequences, and the mesh splits them over {length}: set "
        "train.mesh.seq to 1, or choose model.attention.core ring or dense",
    )


def masked_softmax(
    scores: Float[Array, "*b T S"], allowed: Bool[Array, "*#b T S"] | None
) -> Float[Array, "*b T S"]:
    """Softmax over the allowed entries of the last axis; 0 for the others, and for an empty row.

    `allowed` None: all.
    """
    if allowed is None:
        return jax.nn.softmax(scores)
    # Excluded entries are replaced, not offset: no score is large enough to get around that.
    scores = jnp.where(allowed, scores, -jnp.inf)
    highest = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    highest = jnp.where(jnp.isfinite(highest), highest, 0.0)
    exponentials = jnp.exp(scores - highest)
    total = jnp.sum(exponentials, axis=-1, keepdims=True)
    return exponentials / jnp.where(total > 0.0, total, 1.0)
