"""Queries, keys and values of multi-head attention, and separate ones for global tokens."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from heedful.model.attention.core import AttentionCall
from heedful.model.attention.dense import attention_weights, dense
from heedful.model.attention.rows import put_rows, take_rows
from heedful.model.config import ModelConfig
from heedful.model.linear import Linear
from heedful.model.masks import AttentionMask, MaskNotSupported, cross
from heedful.model.positions import Rotation

Rotate = Callable[[Float[Array, "B T n h"]], Float[Array, "B T n h"]]


def queries(
    config: ModelConfig, x: Float[Array, "B T D"], rotation: Rotate | None, prefix: str = ""
) -> Float[Array, "B T N H"]:
    """Return rotated queries (rotation None: not rotated), with parameters of the calling layer."""
    attention = config.attention
    # Scores that are not scaled need smaller queries, or the softmax begins saturated.
    gain = 1.0 if attention.scaled else config.key_dim**-0.5
    outputs = {"heads": attention.heads, "head_dim": config.key_dim}
    q = _linear(config, outputs, f"{prefix}query", gain)(x)
    return _padded(q if rotation is None else rotation(q), config.head_dim)


def keys_values(
    config: ModelConfig, x: Float[Array, "B S D"], rotation: Rotate | None, prefix: str = ""
) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """Return keys, which are rotated like queries, and values, which are not rotated."""
    heads = {"kv_heads": config.kv_heads}
    k = _linear(config, heads | {"head_dim": config.key_dim}, f"{prefix}key")(x)
    k = _padded(k if rotation is None else rotation(k), config.head_dim)
    v = _linear(config, heads | {"head_dim": config.head_dim}, f"{prefix}value")(x)
    return k, v


def scale(config: ModelConfig) -> float | None:
    """Return the scale of attention scores; None: head_dim^-0.5, a core's default."""
    if not config.attention.scaled:
        return 1.0
    return None if config.key_dim == config.head_dim else config.key_dim**-0.5


def _linear(config: ModelConfig, outputs: dict[str, int], name: str, gain: float = 1.0) -> Linear:
    return Linear(config, {"embed": config.width}, outputs, config.attention.bias, gain, name=name)


def _padded(x: Float[Array, "B T N h"], size: int) -> Float[Array, "B T N H"]:
    """Pad queries or keys with zeros to `size`, which does not change attention scores."""
    return jnp.pad(x, [(0, 0)] * 3 + [(0, size - x.shape[-1])]) if x.shape[-1] < size else x


# Global tokens ----------------------------------------------------------------------------------


def global_call(
    config: ModelConfig,
    x: Float[Array, "B T D"],
    call: AttentionCall,
    rotation: Rotation | None,
    dropout_key: jax.Array | None,
) -> AttentionCall:
    """Return the attention call of the global tokens, whose queries see all of their segment.

    Queries, keys and values come from separate projections (arXiv:2004.05150 §3.1).
    """
    mask, rows = call.mask, call.mask.global_index
    if rows is None or mask.causal or call.bias is not None:
        raise MaskNotSupported(
            "model.attention.global_projections",
            "it needs global tokens, and neither causality nor a bias by distance: use "
            "model.architecture encoder_only with model.attention.global_tokens above 0, and "
            "model.positions.kind other than alibi and relative",
        )
    at_rows = rotation and jax.tree.map(lambda angles: take_rows(angles, rows), rotation)
    q = queries(config, take_rows(x, rows), at_rows, "global_")
    k, v = keys_values(config, x, rotation, "global_")
    seen = AttentionMask()
    if mask.q_segment_ids is not None and mask.kv_segment_ids is not None:
        seen = cross(take_rows(mask.q_segment_ids, rows), mask.kv_segment_ids)
    return AttentionCall(q, k, v, seen, None, call.scale, call.dropout_rate, dropout_key)


def put_global_rows(
    y: Float[Array, "B T N H"], weights: Float[Array, "B N T S"] | None, rows, call: AttentionCall
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T S"] | None]:
    """Return outputs and weights, in which the rows of global tokens are those of `call`."""
    y = put_rows(y, rows, dense(call))
    if weights is not None:
        own = attention_weights(call)
        own = own.reshape(len(own), -1, *own.shape[3:]).swapaxes(1, 2)
        weights = put_rows(weights.swapaxes(1, 2), rows, own).swapaxes(1, 2)
    return y, weights
