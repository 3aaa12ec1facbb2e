"""Options of multi-head attention and of its cores."""

from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal

from heedful.model.config.checks import require, require_choices, require_rate
from heedful.readable import Readable

AttentionSite = Literal["self", "decoder", "cross"]
"""self: self-attention in a stack without cross-attention; decoder: self-attention beside
cross-attention; cross: cross-attention."""

GLOBAL_TOKENS_LIMIT = 100_000


@dataclass(frozen=True, kw_only=True, repr=False)
class PerformerConfig(Readable):
    """The core `performer`: attention by random features (arXiv:2009.14794).

    Example:
        >>> import heedful as hf
        >>> hf.AttentionConfig(core="performer", performer=hf.PerformerConfig(features=64))
        AttentionConfig(core='performer', performer=PerformerConfig(features=64))
    """

    features: int = 256
    """Number of random features (R); the error falls as 1 / sqrt(R)."""
    kernel: Literal["softmax", "relu"] = "softmax"
    """softmax: softmax attention with an unbiased estimate of exp(q k) (arXiv:2009.14794 §2.3);
    relu: attention with another kernel (arXiv:2009.14794 §2.2)."""
    orthogonal: bool = True
    """Make each block of head_dim features orthogonal (arXiv:2009.14794 §2.4); False: all features
    are independent."""
    redraw_steps: int | None = None
    """Training steps between two draws of the features; None: one draw from a fixed key. Evaluation
    and generation always use the draw from the fixed key. A model adapts to its features: after
    hundreds of steps with one draw, the model is worse with another draw."""
    chunk: int = 128
    """Positions per block of the causal prefix sum; changes memory and time, not the result."""

    def __post_init__(self):
        require_choices("model.attention.performer", self)
        for name in ("features", "chunk"):
            value = getattr(self, name)
            require(value > 0, f"model.attention.performer.{name} must be positive, not {value}")
        require(
            self.redraw_steps is None or self.redraw_steps > 0,
            "model.attention.performer.redraw_steps must be positive or None, not "
            f"{self.redraw_steps}",
        )


@dataclass(frozen=True, kw_only=True, repr=False)
class LinformerConfig(Readable):
    """The core `linformer`: keys and values projected along the length (arXiv:2006.04768).

    Example:
        >>> import heedful as hf
        >>> hf.AttentionConfig(core="linformer", linformer=hf.LinformerConfig(rank=32))
        AttentionConfig(core='linformer', linformer=LinformerConfig(rank=32))
    """

    rank: int = 256
    """Number of projected keys and values (R; k in the paper)."""
    max_length: int = 4096
    """Number of positions of the projections, the longest input that is accepted."""
    sharing: Literal["none", "heads", "key_value", "layers"] = "heads"
    """none: each head has a projection of keys and another one of values; heads: all heads of a
    layer share both projections; key_value: keys and values of a layer share one projection;
    layers: all layers of a stack share one projection (arXiv:2006.04768 §4)."""

    def __post_init__(self):
        require_choices("model.attention.linformer", self)
        require(
            0 < self.rank <= self.max_length,
            f"model.attention.linformer.rank = {self.rank} must be positive and at most "
            f"model.attention.linformer.max_length = {self.max_length}",
        )


@dataclass(frozen=True, kw_only=True, repr=False)
class AttentionConfig(Readable):
    """Multi-head attention (arXiv:1706.03762 §3.2), with grouped key/value heads.

    Example:
        >>> import heedful as hf
        >>> hf.AttentionConfig(heads=8, kv_heads=2, window=256)
        AttentionConfig(window=256, kv_heads=2)
    """

    core: str = "auto"
    """Attention core: auto, cudnn, dense, flash, linformer, longformer, performer, ring or splash
    (`heedful cores` shows which masks each of them supports), or the import path of a CoreSpec of
    your own, my_package.my_core:SPEC."""
    decoder_core: str | None = None
    """Core of the decoder's self-attention in an encoder_decoder; None: `core`."""
    cross_core: str | None = None
    """Core of cross-attention; None: `core`."""
    window: int | None = None
    """Number of positions on each side of a token (in a decoder: before it) that self-attention
    sees, the token itself not counted; None: all. The window w of arXiv:2004.05150 §3.1 is twice
    this number; sliding_window of Hugging Face transformers is this number + 1."""
    dilation: tuple[int, ...] = ()
    """Step between the positions of the window, one number for each query head; empty: 1 for all
    heads (arXiv:2004.05150 §3.1)."""
    global_tokens: int = 0
    """Number of tokens at the beginning of each row that see all tokens and that all tokens see
    (arXiv:2004.05150 §3.1)."""
    global_projections: bool = False
    """Give the attention of global tokens its own query, key and value projections
    (arXiv:2004.05150 §3.1)."""
    heads: int = 8
    """Number of query heads (N)."""
    kv_heads: int | None = None
    """Number of key and value heads (K), a divisor of `heads`; None: as many as `heads`
    (arXiv:2305.13245)."""
    head_dim: int | None = None
    """Size of one head (H); None: width / heads."""
    key_dim: int | None = None
    """Size of a head's queries and keys (d_k); None: head_dim, the size of its values. Cores get
    queries and keys padded with zeros to head_dim: a smaller size saves parameters, not time."""
    bias: bool = True
    """Add a bias to the projections of queries, keys, values and outputs."""
    scaled: bool = True
    """Divide attention scores by sqrt(key_dim). False (T5): the initial matrix of the queries and
    its learning rate are divided by sqrt(key_dim) instead."""
    dropout: float = 0.0
    """Dropout rate of attention weights in training."""
    performer: PerformerConfig = field(default_factory=PerformerConfig)
    linformer: LinformerConfig = field(default_factory=LinformerConfig)

    def __post_init__(self):
        require_choices("model.attention", self)
        require(self.heads > 0, f"model.attention.heads must be positive, not {self.heads}")
        require(
            self.window is None or self.window >= 0,
            f"model.attention.window must be None or at least 0, not {self.window}",
        )
        require(
            0 <= self.global_tokens <= GLOBAL_TOKENS_LIMIT,
            f"model.attention.global_tokens must lie in [0, {GLOBAL_TOKENS_LIMIT}], not "
            f"{self.global_tokens}",
        )
        for name in ("dilation", "global_tokens"):
            require(
                self.window is not None or not getattr(self, name),
                f"model.attention.{name} = {getattr(self, name)} needs model.attention.window: set "
                f"it, or leave model.attention.{name} out",
            )
        require(
            len(self.dilation) in (0, self.heads) and all(step > 0 for step in self.dilation),
            f"model.attention.dilation = {self.dilation} must have one positive step for each of "
            f"model.attention.heads = {self.heads}",
        )
        require(
            not self.global_projections or self.global_tokens > 0,
            "model.attention.global_projections = True needs model.attention.global_tokens above "
            "0: set it, or leave model.attention.global_projections out",
        )
        kv_heads = self.kv_heads
        require(
            kv_heads is None or (kv_heads > 0 and self.heads % kv_heads == 0),
            f"model.attention.kv_heads = {kv_heads} must divide model.attention.heads = "
            f"{self.heads}",
        )
        require(
            self.head_dim is None or self.head_dim > 0,
            f"model.attention.head_dim must be positive, not {self.head_dim}",
        )
        require(
            self.key_dim is None or self.key_dim > 0,
            f"model.attention.key_dim must be positive, not {self.key_dim}",
        )
        require_rate("model.attention.dropout", self.dropout)
        used = {self.core, self.decoder_core, self.cross_core}
        for name, options in self.core_options.items():
            require(
                name in used or options == type(options)(),
                f"model.attention.{name} is set, but no attention core is {name}: set "
                f"model.attention.core to {name}, or leave model.attention.{name} out",
            )

    def core_of(self, site: AttentionSite) -> str:
        """Return the core of the attention at this site, or auto."""
        own = {"self": None, "decoder": self.decoder_core, "cross": self.cross_core}[site]
        return own or self.core

    @property
    def core_options(self) -> dict[str, Any]:
        """{name of a core: its options}, for the cores that have options."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {name: value for name, value in values.items() if is_dataclass(value)}
