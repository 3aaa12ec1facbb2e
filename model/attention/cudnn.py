"""Fused attention of cuDNN on NVIDIA GPUs, through jax.nn.dot_product_attention."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from heedful.model.attention.core import AttentionCall, CoreSpec
from heedful.model.attention.fused import band, band_refusal, fill, segment_ids
from heedful.model.masks import cross


def cudnn(call: AttentionCall) -> Float[Array, "B T N H"]:
    """Compute `dense` for a full mask, a causal mask, or a window that looks back.

    cuDNN takes lengths, not segments: each row must have one segment, and padding only after the
    segment. Segments are not known while tracing, so other rows give NaN.
    """
    SPEC.require(call)
    return attend(call, "cudnn")


def refusal(call: AttentionCall) -> str | None:
    """Return why cuDNN does not support the call, and the fix; None: it supports the call."""
    reason = band_refusal(call)
    if reason is not None:
        return reason
    (left, right), T, S = band(call.mask), call.q.shape[1], call.k.shape[1]
    if right not in (0, None) or (left is not None and right is None):
        return (
            f"its windows look back only, not ({left}, {right}): choose model.attention.core flash"
        )
    if left is not None and T > S:
        return (
            f"its windows need at least as many keys as queries, not {S} for {T}: choose "
            "model.attention.core flash"
        )
    return None


def attend(call: AttentionCall, implementation: str) -> Float[Array, "B T N H"]:
    """Compute attention over a band and segments with jax.nn.dot_product_attention.

    `implementation` is the argument of this function, "cudnn" or "xla".
    """
    q, k, v = call.q, call.k, call.v
    left, right = band(call.mask)
    attention = partial(
        jax.nn.dot_product_attention,
        scale=call.scale,
        is_causal=right == 0,
        local_window_size=None if left is None else (left, 0),
        implementation=implementation,  # type: ignore[arg-type]
    )
    T, ids = q.shape[1], segment_ids(call)
    if ids is None:
        return attention(q, k, v)
    # With incomplete tiles, the backward pass of cuDNN has given NaN, and jax refuses odd lengths.
    # So the arrays are padded, and the lengths exclude padding. See
    # github.com/NVIDIA/cudnn-frontend/issues/160.
    q, k, v, q_ids, kv_ids = map(fill, (q, k, v, *ids))
    q_real, kv_real = q_ids != 0, kv_ids != 0
    q_lengths, kv_lengths = (jnp.sum(real, 1, dtype=jnp.int32) for real in (q_real, kv_real))
    # The output of the kernel in padding is not defined: outputs and gradients are set to 0 there.
    # With lengths of at least 1, each row has a softmax.
    q, k, v = _zero(q, q_real), _zero(k, kv_real), _zero(v, kv_real)
    out = attention(
        q,
        k,
        v,
        query_seq_lengths=jnp.maximum(q_lengths, 1),
        key_value_seq_lengths=jnp.maximum(kv_lengths, 1),
    )
    out = _zero(out, q_real & (kv_lengths > 0)[:, None])
    is_expressed = _is_one_segment(q_ids, kv_ids)
    if left is not None:  # each query that is not padding must see its own key
        is_expressed &= q_lengths <= kv_lengths
    return jnp.where(is_expressed[:, None, None, None], out[:, :T], jnp.nan)


def _is_one_segment(q_ids: Int[Array, "B T"], kv_ids: Int[Array, "B S"]) -> Bool[Array, " B"]:
    """Return True for rows in which all tokens have one id, and padding comes after the tokens."""
    one = cross(q_ids, kv_ids).has_one_segment()
    for ids in (q_ids, kv_ids):
        one &= jnp.all((ids[:, :-1] != 0) | (ids[:, 1:] == 0), axis=1)
    return one


def _zero(x: Float[Array, "B T n H"], real: Bool[Array, "B T"]) -> Float[Array, "B T n H"]:
    return jnp.where(real[:, :, None, None], x, 0)


SPEC = CoreSpec(
    name="cudnn",
    make=lambda config, shared: cudnn,
    refusal=refusal,
    one_document_at=("self", "decoder", "cross"),
    platforms=("gpu",),
    length="whole",
    head_sizes=range(8, 129, 8),
    dtypes=("bfloat16", "float16"),
    saves_memory_on=("gpu",),
)
