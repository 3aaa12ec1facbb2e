"""The contract of attention cores: what a core is given, and what is known of it."""

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
"""The stream of keys from which cores draw random numbers: a training step may give it."""


DEVICES = {"cpu": "a CPU", "gpu": "a GPU", "tpu": "a TPU"}


class AttentionCall(struct.PyTreeNode):
    """Everything that an attention core is given.

    Each of the K key/value heads serves N / K consecutive query heads.
    """

    q: Float[Array, "B T N H"]
    k: Float[Array, "B S K H"]
    v: Float[Array, "B S K H"]
    mask: AttentionMask
    bias: PositionBias | None = None
    """Added to the scaled attention scores."""
    scale: float | None = struct.field(pytree_node=False, default=None)
    """Multiplies q k^T; None: 1 / sqrt(H)."""
    dropout_rate: float = struct.field(pytree_node=False, default=0.0)
    """Share of attention weights that is dropped."""
    dropout_key: jax.Array | None = None

    @property
    def factor(self) -> float:
        """The scale as a number."""
        return self.q.shape[3] ** -0.5 if self.scale is None else self.scale

    def require_shapes(self) -> None:
        """Raise ValueError unless q is [B, T, N, H], k and v are [B, S, K, H], K divides N, and the
        mask was made for T queries and S keys."""
        (B, T, N, H), (S, K) = self.q.shape, self.k.shape[1:3]
        if self.k.shape != (B, S, K, H) or N % K or self.v.shape != self.k.shape:
            raise ValueError(
                f"shapes do not fit: q {self.q.shape}, k {self.k.shape}, v {self.v.shape}"
            )
        self.mask.require_lengths(T, S)


Core = Callable[[AttentionCall], Float[Array, "B T N H"]]


@runtime_checkable
class Cache(Protocol):
    """The earlier tokens of one layer in the form that its core reads while decoding.

    All arrays lead with the batch, then the key/value heads if they have any.
    """

    def attend(
        self, core: Core, call: AttentionCall, cache_write_mask: Bool[Array, "B T"] | None
    ) -> tuple[Float[Array, "B T N H"], "Cache"]:
        """Attend from new tokens at `mask.q_offset` to themselves and to all before them.

        Return the cache with the new tokens added as well. Tokens outside of `cache_write_mask`
        (None: none) leave no trace that a later query sees.
        """
        ...

    def keys(self, new: int) -> int:
        """Return the number of keys that `new` tokens are compared with."""
        ...


@dataclass(frozen=True, kw_only=True)
class CoreSpec:
    """All that the rest of the project knows of an attention core."""

    name: str
    make: Callable[[ModelConfig, Mapping[str, jax.Array]], Core]
    """(config, parameters that the layers of a stack share) -> core. A core that is a module gets a
    name, and is made anew in each call of the layer that holds it."""

    # What it computes.
    is_exact: bool = True
    """True: it computes softmax attention, as reference.py does; False: an approximation."""
    has_weights: bool = True
    """True: its output is the mean of the values by attention weights, which can be shown."""
    refusal: Callable[[AttentionCall], str | None] = lambda call: None
    """Reason why it cannot express the mask, bias or dropout of a call; None: it can."""
    one_document_at: tuple[AttentionSite, ...] = ()
    """Sites at which it cannot tell the documents of a packed row apart: such a row becomes NaN."""

    # Where it runs.
    platforms: tuple[str, ...] = ("cpu", "gpu", "tpu")
    """Platforms that can run it; it is made for the first."""
    length: Literal["any", "whole", "split"] = "any"
    """The mesh may split the sequence (any), must not (whole), or must (split)."""
    head_sizes: range | None = None
    """Sizes H of a head; None: all."""
    dtypes: tuple[str, ...] = ()
    """Types of the queries; none: all."""

    # When it pays.
    faster_from: Mapping[str, int] = field(default_factory=dict)
    """{platform: length from which it is faster than dense, forward and backward}: auto takes it
    from there on."""
    is_quadratic: bool = False
    """True: its memory grows with the square of the length."""
    saves_memory_on: tuple[str, ...] = ()
    """Platforms on which it is the first choice where a quadratic core runs out of memory."""
    keys: Callable[[ModelConfig], int] | None = None
    """Keys that the products of a query are worth; None: those that its mask leaves."""
    sizes: Callable[[ModelConfig], Mapping[str, int]] = lambda config: {}
    """Numbers in its largest arrays, by the config fields that they follow from."""
    shrunk: Callable[[AttentionConfig, int], Mapping[str, Any]] = lambda attention, length: {}
    """Fields of `attention` changed for a small model on rows of this length, which is audited."""

    # What it brings along.
    shared_params: Callable[[ModelConfig], Mapping[str, tuple[Any, tuple[int, ...]]]] = (
        lambda config: {}
    )
    """{name: (initializer, shape)} of parameters that the layers of a stack share."""
    redraw_steps: Callable[[ModelConfig], int | None] = lambda config: None
    """Training steps between two draws of its random numbers from the stream FEATURES; None: the
    stream is not given."""
    new_cache: Callable[[ModelConfig, int], Cache] | None = None
    """(config, batch) -> an empty cache of one layer, of one size for any number of tokens; None:
    keys and values are cached."""
    cached: str = "keys and values"
    """The content of its cache, in words."""

    def fits(self, platform: str, shards: int) -> bool:
        """Return True if the platform runs it, with the length split over so many devices."""
        can_split = {"any": True, "whole": shards == 1, "split": shards > 1}[self.length]
        return platform in self.platforms and can_split

    def require(self, call: AttentionCall) -> None:
        """Raise an error unless the core can do what the call asks for, where it is to run.

        MaskNotSupported says what it cannot express, another ModelError what it needs to run;
        ValueError means that shapes do not fit.
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
                f"core {self.name} needs heads of a multiple of {sizes.step} up to {sizes[-1]}, "
                f"not model.attention.head_dim = {head_dim}"
            )
        if self.dtypes and dtype not in self.dtypes:
            raise ModelError(
                f"core {self.name} needs {device} and model.dtype {' or '.join(self.dtypes)}, "
                f"not {dtype}"
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
                f"core {self.name} needs whole sequences, and the mesh splits them over {length}: "
                "set train.mesh.seq to 1, or choose model.attention.core ring or dense"
            )
        if self.length == "split" and not length:
            raise ModelError(
                f"core {self.name} splits the sequence over devices: set train.mesh.seq to at "
                "least 2, or choose model.attention.core flash"
            )
