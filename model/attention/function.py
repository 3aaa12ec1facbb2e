"""Attention as one function, for models that are not built here."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from flax.errors import ScopeCollectionNotFound, ScopeParamNotFoundError
from jaxtyping import Array, Float, Int

from heedful.model.attention import choose, spec_of
from heedful.model.attention.core import AttentionCall, CoreSpec
from heedful.model.axes import shards, target_platform
from heedful.model.config import AttentionConfig, ModelConfig, ModelError
from heedful.model.masks import AttentionMask, MaskNotSupported, full
from heedful.model.ops.manual import vary
from heedful.model.positions import PositionBias

FIELDS = {
    "model.attention.core": "core",
    "model.attention.dropout": "dropout_rate",
    "model.attention.window": "the window of the mask",
    "model.attention.head_dim": "the size of a head",
    "model.dtype": "the type of q",
    "set train.mesh.seq to at least 2": "use it in a model, with train.mesh.seq of at least 2",
}
"""Config fields in messages of cores, and what they are in a call of `attention`."""


@struct.dataclass
class ArrayBias(PositionBias):
    """A bias that is given for every pair: `values` is [b, n, T, S], b is B or 1, n is N or 1."""

    heads: int = struct.field(pytree_node=False, default=1)
    """Number N of query heads."""

    def tile(
        self, q_index: Int[Array, " t"], kv_index: Int[Array, " s"]
    ) -> Float[Array, "b N t s"]:
        """Return the bias of the queries `q_index` and the keys `kv_index`."""
        tile = self.values[:, :, q_index[:, None], kv_index]
        return jnp.broadcast_to(tile, (len(tile), self.heads, *tile.shape[2:]))


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: AttentionMask | None = None,
    *,
    core: str = "auto",
    bias: PositionBias | Float[Array, "b n T S"] | None = None,
    scale: float | None = None,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> Float[Array, "B T N H"]:
    """Return softmax(scale * q @ k^T + bias) @ v over the pairs that the mask allows.

    The function works under jit, grad (reverse mode only), vmap and shard_map; it has no
    parameters. Axes: B rows of the batch, T queries, S keys, N query heads, K key/value heads (K
    divides N: grouped heads), H size of a head. A query without allowed keys gives 0.

    mask: an AttentionMask of `heedful.masks`, not an array; None: all pairs. Documents and padding
    are segment ids in the mask: `masks.packed(segment_ids)`, `masks.padding(lengths, S)`.
    core: auto (flash for long inputs on a CPU, else dense: `heedful cores` shows from which length
    on), or a name that `heedful cores` lists; performer approximates the softmax.
    bias: an array that is added to the scaled scores, [b, n, T, S] with b = B or 1 and n = N or 1,
    or a PositionBias; None: 0.
    scale: factor of q @ k^T; None: 1 / sqrt(H).
    dropout_rate, dropout_key: share of attention weights that is dropped, and the random key for
    it.

    Raises ModelError for shapes that do not fit and for an unknown core, and MaskNotSupported (a
    ModelError), which names the fix, if the core refuses the mask, the bias or the dropout.

    Example:
        >>> import jax, heedful as hf
        >>> q = jax.random.normal(jax.random.key(0), (1, 16, 4, 8))   # [B, T, N, H]
        >>> k = v = jax.random.normal(jax.random.key(1), (1, 16, 2, 8))   # [B, S, K, H]
        >>> mask = hf.masks.causal() & hf.masks.sliding(4, 0)
        >>> hf.attention(q, k, v, mask, core="flash").shape
        (1, 16, 4, 8)
    """
    mask = full() if mask is None else mask
    if not isinstance(mask, AttentionMask):
        raise ModelError(
            f"mask is {type(mask).__name__}, not an AttentionMask: make one with heedful.masks, "
            "such as masks.causal(); an arbitrary array can be added as a bias"
        )
    for name, x in (("q", q), ("k", k), ("v", v)):
        if getattr(x, "ndim", None) != 4 or not jnp.issubdtype(x.dtype, jnp.floating):
            found = f"{x.dtype}{list(x.shape)}" if hasattr(x, "shape") else type(x).__name__
            raise ModelError(
                f"{name} is {found}: give floating-point numbers [rows, positions, heads, size of "
                "a head] (x[None] adds the axis of rows; jax.vmap works too)"
            )
    if not 0 <= dropout_rate < 1:
        raise ModelError(f"dropout_rate = {dropout_rate} must lie in [0, 1)")
    if dropout_rate and dropout_key is None:
        raise ModelError(
            f"dropout_rate = {dropout_rate} needs dropout_key: give a random key, or rate 0"
        )
    if bias is not None and not isinstance(bias, PositionBias):
        bias = _array_bias(bias, q, k)
    rate_key = dropout_key if dropout_rate else None
    arrays = (q, k, v, mask, bias, rate_key)
    q, k, v, mask, bias, rate_key = vary(arrays, arrays)
    call = AttentionCall(q, k, v, mask, bias, scale, dropout_rate, rate_key)  # type: ignore[arg-type]
    try:
        call.require_shapes()
    except ValueError as error:
        raise ModelError(str(error)) from error
    try:
        return _run(_spec(core, call), call)
    except (ScopeCollectionNotFound, ScopeParamNotFoundError) as error:
        raise ModelError(
            f"core = {core} has parameters of its own: choose a core without parameters, or "
            "use it in a model, with model.attention.core"
        ) from error
    except MaskNotSupported as error:
        raise MaskNotSupported(error.core, _as_argument(error.reason)) from error
    except ModelError as error:
        raise ModelError(_as_argument(str(error))) from error


def _run(spec: CoreSpec, call: AttentionCall) -> jax.Array:
    core = spec.make(_config(spec.name, call), {})
    if isinstance(core, nn.Module):
        return core.apply({}, call)  # type: ignore[return-value]
    return core(call)


def _as_argument(message: str) -> str:
    """Return the message with the names of arguments in place of the names of config fields."""
    for field, name in FIELDS.items():
        message = message.replace(field, name)
    return message


def _spec(core: str, call: AttentionCall) -> CoreSpec:
    """Return the spec of a core without parameters; auto avoids cores that refuse the call."""
    lengths = call.k.shape[1], call.q.shape[1]
    name, _ = choose(core, target_platform(), *lengths, shards("act_length"))
    spec = spec_of(name)
    return spec_of("dense") if core == "auto" and spec.refusal(call) is not None else spec


def _array_bias(values: jax.Array, q: jax.Array, k: jax.Array) -> ArrayBias:
    (B, T, N), S = q.shape[:3], k.shape[1]
    values = jnp.asarray(values)
    fits = values.ndim == 4 and values.shape[2:] == (T, S)
    if not fits or values.shape[0] not in (1, B) or values.shape[1] not in (1, N):
        raise ModelError(
            f"bias has the shape {list(values.shape)}: give [{B} or 1, {N} or 1, {T}, {S}], for "
            "rows, heads, queries and keys"
        )
    return ArrayBias(values, heads=N)


def _config(core: str, call: AttentionCall) -> ModelConfig:
    """Return a model with such heads, from which a core takes its settings."""
    N, H = call.q.shape[2:]
    return ModelConfig(
        architecture="decoder_only",
        width=2 * N * H,
        attention=AttentionConfig(core=core, heads=N, kv_heads=call.k.shape[2], head_dim=H),
    )
