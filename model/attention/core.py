"""The interface of attention cores: the inputs of a core, and its properties."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import jax
from flax import struct
from jaxtyping import Array, Bool, Float

from heedful.model.axes import mesh_axes, target_platform
from heedful.model.config import AttentionConfig, AttentionSite, ModelConfig, ModelError
from heedful.model.masks import AttentionMask, MaskNotSupported
from heedful.model.positions import PositionBias

FEATURES = "features"
"""Stream of random keys from which cores draw features; only training steps may provide it."""


DEVICES = {"cpu": "a CPU", "gpu": "a GPU", "tpu": "a TPU"}


class AttentionCall(struct.PyTreeNode):
    """The inputs of an attention core.

    Axes: B rows of the batch, T queries, S keys, N query heads, K key/value heads, H size of a
    head. Each key/value head serves N / K consecutive query heads.

    Example:
        >>> import jax.numpy as jnp, heedful as hf
        >>> q = jnp.ones((1, 3, 2, 8))
        >>> hf.AttentionCall(q, q, q, hf.masks.causal()).factor
        0.3535533905932738
    """

    q: Float[Array, "B T N H"]
    k: Float[Array, "B S K H"]
    v: Float[Array, "B S K H"]
    mask: AttentionMask
    bias: PositionBias | None = None
    """Bias that is added to the scaled attention scores; None: 0."""
    scale: float | None = struct.field(pytree_node=False, default=None)
    """Factor of q @ k^T; None: 1 / sqrt(H)."""
    dropout_rate: float = struct.field(pytree_node=False, default=0.0)
    """Dropout rate of attention weights."""
    dropout_key: jax.Array | None = None

    @property
    def factor(self) -> float:
        """`scale`, or 1 / sqrt(H) if `scale` is None."""
        return self.q.shape[3] ** -0.5 if self.scale is None else self.scale

    def require_shapes(self) -> None:
        """Raise ValueError unless q is [B, T, N, H], k and v are [B, S, K, H], K divides N, and the
        mask was made for T queries and S keys."""
        (B, T, N, H), (S, K) = self.q.shape, self.k.shape[1:3]
        if self.k.shape != (B, S, K, H) or N % K or self.v.shape != self.k.shape:
            raise ValueError(
                f"shapes do not fit: q {self.q.shape}, k {self.k.shape}, v {self.v.shape}; give q "
                "[B, T, N, H], and k and v [B, S, K, H], where K divides N"
            )
        self.mask.require_lengths(T, S)


Core = Callable[[AttentionCall], Float[Array, "B T N H"]]


@runtime_checkable
class Cache(Protocol):
    """The earlier tokens of one layer, in the form that its core reads in decoding.

    The leading axis of each array is the batch.
    """

    def attend(
        self, core: Core, call: AttentionCall, cache_write_mask: Bool[Array, "B T"] | None
    ) -> tuple[Float[Array, "B T N H"], "Cache"]:
        """Attend from new tokens at `mask.q_offset` to these tokens and all tokens before them.

        Return the outputs, and the cache with the new tokens added. Later queries do not see the
        tokens for which `cache_write_mask` is False; None: all tokens are added.
        """
        ...

    def keys(self, new: int) -> int:
        """Return the number of keys, new ones included, that `new` new tokens attend to."""
        ...


@dataclass(frozen=True, kw_only=True)
class CoreSpec:
    """The properties of an attention core that the rest of the project uses.

    Example:
        >>> import jax.numpy as jnp, heedful as hf
        >>> def mean(call: hf.AttentionCall):
        ...     return jnp.broadcast_to(call.v.mean(1, keepdims=True), call.q.shape)
        >>> spec = hf.CoreSpec(name="mean", make=lambda config, shared: mean, is_exact=False)
        >>> spec.fits("cpu", shards=1)
        True
    """

    name: str
    make: Callable[[ModelConfig, Mapping[str, jax.Array]], Core]
    """(config, parameters that the layers of a stack share) -> core. A core that is a flax module
    must have a name; each call of its layer makes a new instance."""

    # What the core computes.
    is_exact: bool = True
    """True: the core computes softmax attention, like reference.py; False: an approximation."""
    has_weights: bool = True
    """True: the core averages values by attention weights [T, S], which can be shown."""
    refusal: Callable[[AttentionCall], str | None] = lambda call: None
    """Returns why the core does not support the mask, bias or dropout of a call, and the fix; None:
    the core supports the call."""
    one_document_at: tuple[AttentionSite, ...] = ()
    """Sites at which the core cannot separate the documents of a packed row: such a row gives
    NaN."""

    # Where the core runs.
    platforms: tuple[str, ...] = ("cpu", "gpu", "tpu")
    """Platforms that can run the core; the first is the platform for which it was written."""
    length: Literal["any", "whole", "split"] = "any"
    """any: the mesh may split the sequence; whole: it must not; split: it must."""
    head_sizes: range | None = None
    """Supported sizes H of a head; None: all sizes."""
    dtypes: tuple[str, ...] = ()
    """Supported types of queries; empty: all types."""

    # When to choose the core.
    faster_from: Mapping[str, int] = field(default_factory=dict)
    """{platform: length}; from this length on, the core is faster than dense in forward and
    backward pass together, and auto chooses it."""
    is_quadratic: bool = False
    """True: the memory of the core grows with the square of the length."""
    saves_memory_on: tuple[str, ...] = ()
    """Platforms on which this core is recommended if a quadratic core runs out of memory."""
    keys: Callable[[ModelConfig], int] | None = None
    """Number of keys per query that take as many FLOPs as the core; None: the keys that the mask
    allows."""
    sizes: Callable[[ModelConfig], Mapping[str, int]] = lambda config: {}
    """{config fields that determine an array: its number of elements}, for the largest arrays."""
    shrunk: Callable[[AttentionConfig, int], Mapping[str, Any]] = lambda attention, length: {}
    """(attention, length) -> fields of `attention` to change for the small model of the mask audit,
    whose rows have this length."""

    # Further parts of the core.
    shared_params: Callable[[ModelConfig], Mapping[str, tuple[Any, tuple[int, ...]]]] = (
        lambda config: {}
    )
    """{name: (initializer, shape)} of parameters that the layers of a stack share."""
    redraw_steps: Callable[[ModelConfig], int | None] = lambda config: None
    """Training steps between two draws of random numbers from the stream FEATURES; None: training
    does not provide the stream."""
    new_cache: Callable[[ModelConfig, int], Cache] | None = None
    """(config, batch) -> an empty cache of one layer, whose size does not depend on the number of
    tokens; None: keys and values are cached."""
    cached: str = "keys and values"
    """Content of the cache, in words."""

    def fits(self, platform: str, shards: int) -> bool:
        """Return True if `platform` runs the core with the sequence split over `shards` devices."""
        can_split = {"any": True, "whole": shards == 1, "split": shards > 1}[self.length]
        return platform in self.platforms and can_split

    def require(self, call: AttentionCall) -> None:
        """Raise an error unless the core supports the call, on the target platform and the mesh.

        MaskNotSupported is for mask, bias and dropout; ModelError for the size of heads, the type
        of queries, the platform and the mesh; ValueError for shapes that do not fit.
        """
        call.require_shapes()
        reason = self.refusal(call)
        if reason is not None:
            raise MaskNotSupported(self.name, reason)
        self._require_array(call.q.shape[3], str(call.q.dtype))
        self._require_here()

    def _require_array(self, head_dim: int, dtype: str) -> None:
        sizes, device = self.head_sizes, DEVICES[self.platforms[0]]
        if sizes is not None and head_dim not in sizes:
            raise ModelError(
                f"core {self.name} needs a head size that is a multiple of {sizes.step} up to "
                f"{sizes[-1]}, not model.attention.head_dim = {head_dim}: change the size, or "
                "choose model.attention.core auto"
            )
        if self.dtypes and dtype not in self.dtypes:
            raise ModelError(
                f"core {self.name} needs {device} and model.dtype {' or '.join(self.dtypes)}, "
                f"not {dtype}: change model.dtype, or choose model.attention.core auto"
            )

    def _require_here(self) -> None:
        platform, (length,) = target_platform(), mesh_axes("act_length")
        if platform not in self.platforms:
            raise ModelError(
                f"core {self.name} needs {DEVICES[self.platforms[0]]}, not {platform}: choose "
                "model.attention.core auto"
            )
        if self.length == "whole" and length:
            raise ModelError(
                f"core {self.name} needs whole sequences, but the mesh axes {length} split "
                "sequences: set train.mesh.seq to 1, or choose model.attention.core ring or dense"
            )
        if self.length == "split" and not length:
            raise ModelError(
                f"core {self.name} needs a mesh that splits the sequence over devices: set "
                "train.mesh.seq to at least 2, or choose model.attention.core flash"
            )
