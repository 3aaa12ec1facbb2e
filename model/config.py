"""What a model is: frozen values, checked when they are made. No jax is imported here."""

from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args, get_origin

Architecture = Literal["encoder_only", "decoder_only", "encoder_decoder"]


class ModelError(ValueError):
    """A model that cannot be built, or an input that it cannot take; one line, with the fix."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ModelError(message)


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Multi-head attention (arXiv:1706.03762 §3.2), with grouped key/value heads."""

    core: str = "auto"
    """Attention core: auto, or a name from model/attention."""
    heads: int = 8
    """Query heads (N)."""
    kv_heads: int | None = None
    """Key and value heads (K), a divisor of the query heads; None: as many (arXiv:2305.13245)."""
    head_dim: int | None = None
    """Size of one head (H); None: width / heads."""
    bias: bool = True
    """Whether the four projections have a bias."""
    dropout: float = 0.0
    """Share of attention weights dropped in training."""

    def __post_init__(self):
        require(self.heads > 0, f"attention.heads must be positive, not {self.heads}")
        kv_heads = self.kv_heads
        require(
            kv_heads is None or (kv_heads > 0 and self.heads % kv_heads == 0),
            f"attention.kv_heads = {kv_heads} must divide attention.heads = {self.heads}",
        )
        require(
            self.head_dim is None or self.head_dim > 0,
            f"attention.head_dim must be positive, not {self.head_dim}",
        )
        _require_rate("attention.dropout", self.dropout)


@dataclass(frozen=True, kw_only=True)
class FeedForwardConfig:
    """The position-wise feed-forward layer (arXiv:1706.03762 §3.3)."""

    width: int = 2048
    """Inner width (F)."""
    activation: Literal["relu", "gelu", "swiglu"] = "relu"
    """Non-linearity; swiglu has a third matrix, the gate (arXiv:2002.05202)."""
    bias: bool = True
    """Whether the matrices have a bias."""
    dropout: float = 0.0
    """Share of inner activations dropped in training."""

    def __post_init__(self):
        _require_choices("feed_forward", self)
        require(self.width > 0, f"feed_forward.width must be positive, not {self.width}")
        _require_rate("feed_forward.dropout", self.dropout)


@dataclass(frozen=True, kw_only=True)
class NormConfig:
    """Normalisation of each sublayer."""

    kind: Literal["layernorm", "rmsnorm"] = "layernorm"
    """layernorm (arXiv:1607.06450) or rmsnorm (arXiv:1910.07467)."""
    position: Literal["post", "pre"] = "post"
    """post: norm(x + f(x)), the original; pre: x + f(norm(x)) and one last norm."""
    epsilon: float = 1e-6
    """Added to the variance."""

    def __post_init__(self):
        _require_choices("norm", self)
        require(self.epsilon > 0, f"norm.epsilon must be positive, not {self.epsilon}")


@dataclass(frozen=True, kw_only=True)
class PositionConfig:
    """How the model knows the order of its input."""

    kind: Literal["none", "sinusoidal", "learned"] = "sinusoidal"
    """none, sinusoidal (arXiv:1706.03762 §3.5) or learned (arXiv:1705.03122)."""
    max_length: int = 512
    """Rows in the table of learned positions: no longer input is accepted."""

    def __post_init__(self):
        _require_choices("positions", self)
        require(
            self.max_length > 0, f"positions.max_length must be positive, not {self.max_length}"
        )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One Transformer: which blocks, how many, how wide."""

    architecture: Architecture = "encoder_decoder"
    """encoder_only (BERT), decoder_only (GPT) or encoder_decoder (translation)."""
    vocab_size: int | None = None
    """Rows of the embedding (V); None: as many as the tokenizer has."""
    width: int = 512
    """Width of the residual stream (D)."""
    layers: int = 6
    """Blocks in the stack, the decoder's where there are two."""
    encoder_layers: int | None = None
    """Blocks in the encoder of an encoder-decoder; None: as many as the decoder."""
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    feed_forward: FeedForwardConfig = field(default_factory=FeedForwardConfig)
    norm: NormConfig = field(default_factory=NormConfig)
    positions: PositionConfig = field(default_factory=PositionConfig)
    dropout: float = 0.1
    """Share dropped of each sublayer's output and of the embedding sum, in training (§5.4)."""
    tie_embeddings: bool = True
    """Whether the output projection is the embedding matrix (§3.4)."""
    scale_embeddings: bool = True
    """Whether embeddings are multiplied by sqrt(width) (§3.4)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute type; parameters, softmax, norms and loss stay in float32."""
    remat: bool = False
    """Recompute each block in the backward pass: memory for one block, a third more time."""
    unroll: int = 1
    """Layers per iteration of the loop over layers: more is faster and compiles longer."""

    def __post_init__(self):
        _require_choices("model", self)
        heads = self.attention.heads
        for name in ("width", "layers", "unroll"):
            value = getattr(self, name)
            require(value > 0, f"model.{name} must be positive, not {value}")
        require(
            self.vocab_size is None or self.vocab_size > 0,
            f"model.vocab_size must be positive, not {self.vocab_size}",
        )
        require(
            self.attention.head_dim is not None or self.width % heads == 0,
            f"model.attention.heads = {heads} does not divide model.width = {self.width}: "
            "change one of them or set model.attention.head_dim",
        )
        require(
            self.positions.kind != "sinusoidal" or self.width % 2 == 0,
            f"model.width = {self.width} must be even for sinusoidal positions",
        )
        require(
            self.encoder_layers is None
            or (self.architecture == "encoder_decoder" and self.encoder_layers > 0),
            f"model.encoder_layers = {self.encoder_layers} must be positive, "
            "and belongs to an encoder_decoder only",
        )
        _require_rate("model.dropout", self.dropout)

    @property
    def head_dim(self) -> int:
        return self.attention.head_dim or self.width // self.attention.heads

    @property
    def kv_heads(self) -> int:
        return self.attention.kv_heads or self.attention.heads


def _require_choices(section: str, config: Any) -> None:
    """An unknown choice would silently mean whichever branch comes last."""
    for entry in fields(config):
        value, choices = getattr(config, entry.name), get_args(entry.type)
        require(
            get_origin(entry.type) is not Literal or value in choices,
            f"{section}.{entry.name} must be one of {', '.join(map(str, choices))}, not {value}",
        )


def _require_rate(name: str, value: float) -> None:
    require(0 <= value < 1, f"{name} must lie in [0, 1), not {value}")
