"""Fused attention of cuDNN on NVIDIA GPUs, through jax.nn.dot_product_attention."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from heedful.model.attention.dense import require_whole_rows
from heedful.model.attention.fused import band, fill, segment_ids
from heedful.model.axes import target_platform
from heedful.model.config import require
from heedful.model.masks import AttentionMask, MaskNotSupported, Window, cross
from heedful.model.positions import PositionBias


def cudnn(
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
    """As `dense`, in bfloat16 or float16, for a mask that is causal, looks back so far, or neither.

    Of segments cuDNN knows their lengths: a row of the mask may hold one segment and after it
    padding. What a row holds is not known while tracing: one of several segments comes out as NaN.
    """
    window = window_of(mask, q.shape[1], k.shape[1], bias, dropout_rate)
    mask.require_lengths(q.shape[1], k.shape[1])
    H = q.shape[3]
    require(
        H % 8 == 0 and H <= 128,
        f"core cudnn needs heads of a multiple of 8 up to 128, not model.attention.head_dim = {H}",
    )
    require(
        q.dtype in (jnp.bfloat16, jnp.float16),
        f"core cudnn needs a GPU and model.dtype bfloat16 or float16, not {q.dtype}",
    )
    platform = target_platform()
    require(
        platform == "gpu",
        f"core cudnn needs a GPU, not {platform}: choose model.attention.core auto",
    )
    require_whole_rows("cudnn")
    return attend(q, k, v, mask, window, scale, "cudnn")


def window_of(
    mask: AttentionMask,
    q_length: int,
    kv_length: int,
    bias: PositionBias | None = None,
    dropout_rate: float = 0.0,
) -> Window:
    """The window of a mask that cuDNN has: (None, None), (None, 0) or (left, 0)."""
    left, right = band("cudnn", mask, bias, dropout_rate)
    if right not in (0, None) or (left is not None and right is None):
        raise MaskNotSupported(
            "cudnn", f"its windows look back only, not ({left}, {right}); choose flash"
        )
    if left is not None and q_length > kv_length:
        raise MaskNotSupported(
            "cudnn",
            f"a window needs a key for each query, not {kv_length} for {q_length}; choose flash",
        )
    return left, right


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: AttentionMask,
    window: Window,
    scale: float | None,
    implementation: str,
) -> Float[Array, "B T N H"]:
    """Attention over `window` and the segments of `mask`, by an implementation of jax.nn."""
    left, right = window
    attention = partial(
        jax.nn.dot_product_attention,
        scale=scale,
        is_causal=right == 0,
        local_window_size=None if left is None else (left, 0),
        implementation=implementation,  # type: ignore[arg-type]
    )
    T, ids = q.shape[1], segment_ids(mask, q, k)
    if ids is None:
        return attention(q, k, v)
    # Backward cuDNN has given NaN, and jax refuses odd lengths: a tile is filled up, and lengths
    # say with what. See github.com/NVIDIA/cudnn-frontend/issues/160.
    q, k, v, q_ids, kv_ids = map(fill, (q, k, v, *ids))
    q_real, kv_real = q_ids != 0, kv_ids != 0
    q_lengths, kv_lengths = (jnp.sum(real, 1, dtype=jnp.int32) for real in (q_real, kv_real))
    # What a kernel leaves in padding is not defined: it is taken out of values and gradients. With
    # a length of at least 1 there is a softmax in each row.
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
    if left is not None:  # every query that is real sees itself
        is_expressed &= q_lengths <= kv_lengths
    return jnp.where(is_expressed[:, None, None, None], out[:, :T], jnp.nan)


def _is_one_segment(q_ids: Int[Array, "B T"], kv_ids: Int[Array, "B S"]) -> Bool[Array, " B"]:
    """Where all that is real has one id, and padding comes after it."""
    one = cross(q_ids, kv_ids).has_one_segment()
    for ids in (q_ids, kv_ids):
        one &= jnp.all((ids[:, :-1] != 0) | (ids[:, 1:] == 0), axis=1)
    return one


def _zero(x: Float[Array, "B T n H"], real: Bool[Array, "B T"]) -> Float[Array, "B T n H"]:
    return jnp.where(real[:, :, None, None], x, 0)
