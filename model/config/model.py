"""A whole model."""

from dataclasses import dataclass, field
from typing import Literal, get_args

from heedful.model.config.attention import AttentionConfig, AttentionSite
from heedful.model.config.checks import require, require_choices, require_rate
from heedful.model.config.parts import FeedForwardConfig, HeadConfig, LoraConfig, NormConfig
from heedful.model.config.positions import PositionConfig

Architecture = Literal["encoder_only", "decoder_only", "encoder_decoder"]


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
    head: HeadConfig = field(default_factory=HeadConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    type_vocab_size: int = 0
    """Rows of the table of token types: BERT's 2 tell the sentences of a pair apart; 0: none."""
    residuals: bool = True
    """Whether a sublayer adds to its input. Without, to show what they are for: deep stacks do not
    learn."""
    dropout: float = 0.1
    """Share dropped of each sublayer's output and of the embedding sum, in training (§5.4)."""
    tie_embeddings: bool = True
    """Whether the output projection is the embedding matrix (§3.4)."""
    scale_embeddings: bool = True
    """Whether embeddings are multiplied by sqrt(width) (§3.4)."""
    init: Literal["glorot", "normal", "scaled_normal"] = "glorot"
    """Initial matrices: glorot (uniform); normal, of deviation 0.02 (BERT); scaled_normal: the last
    matrix of each sublayer smaller by sqrt(2 layers of its stack) (GPT-2)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute type; parameters, softmax, norms and loss stay in float32."""
    remat: Literal["none", "dots", "attention", "full"] = "none"
    """What the backward pass computes again to save memory: none; dots: all but what linear maps
    give; attention: all but what those of attention give; full: all but each block's input, a third
    more time (arXiv:1604.06174)."""
    unroll: int | None = None
    """Layers per iteration of the loop over layers: more is faster, compiles longer and needs the
    memory of their parameters once more; None: 12 on CPUs without remat, where the loop can cost as
    much as what is in it, 1 elsewhere. In decoding on CPUs at least 12."""

    def __post_init__(self):
        if isinstance(self.remat, bool):  # in runs from before it had names
            object.__setattr__(self, "remat", "full" if self.remat else "none")
        require_choices("model", self)
        heads = self.attention.heads
        for name in ("width", "layers", "unroll"):
            value = getattr(self, name)
            require(value is None or value > 0, f"model.{name} must be positive, not {value}")
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
            self.key_dim <= self.head_dim,
            f"model.attention.key_dim = {self.key_dim} must be at most the head size "
            f"{self.head_dim} (width / heads or attention.head_dim)",
        )
        require(
            self.positions.kind != "rotary" or self.key_dim % 2 == 0,
            f"the size {self.key_dim} of a key (width / heads, attention.head_dim or "
            "attention.key_dim) must be even for rotary positions",
        )
        require(
            self.type_vocab_size >= 0,
            f"model.type_vocab_size must be at least 0, not {self.type_vocab_size}",
        )
        require(
            self.type_vocab_size == 0 or self.architecture != "encoder_decoder",
            f"model.type_vocab_size = {self.type_vocab_size} needs an encoder_only or a "
            "decoder_only",
        )
        require(
            "gate" not in self.lora.targets or self.feed_forward.gated,
            "model.lora.targets has 'gate', but model.feed_forward.gated is False",
        )
        require(
            self.head.kind == "language_model" or self.architecture != "encoder_decoder",
            "model.head.kind classifier needs an encoder_only or a decoder_only",
        )
        require(
            self.head.kind == "language_model"
            or self.architecture == "encoder_only"
            or self.head.pooling == "last",
            f"model.head.pooling = {self.head.pooling}, but in a decoder_only just the last token "
            "has seen the others: choose last",
        )
        for name in ("decoder_core", "cross_core"):
            value = getattr(self.attention, name)
            require(
                value is None or self.architecture == "encoder_decoder",
                f"model.attention.{name} = {value} belongs to an encoder_decoder only",
            )
        require(
            not self.attention.global_projections or self.architecture == "encoder_only",
            "model.attention.global_projections needs an encoder_only: in a decoder what global "
            "tokens see is what all others see",
        )
        require(
            not self.attention.global_projections
            or self.positions.kind not in ("alibi", "relative"),
            "model.attention.global_projections does not go with model.positions.kind "
            f"{self.positions.kind}, a bias by distance: choose other positions",
        )
        require(
            self.encoder_layers is None
            or (self.architecture == "encoder_decoder" and self.encoder_layers > 0),
            f"model.encoder_layers = {self.encoder_layers} must be positive, "
            "and belongs to an encoder_decoder only",
        )
        require_rate("model.dropout", self.dropout)

    @property
    def head_dim(self) -> int:
        return self.attention.head_dim or self.width // self.attention.heads

    @property
    def key_dim(self) -> int:
        return self.attention.key_dim or self.head_dim

    @property
    def sites(self) -> tuple[AttentionSite, ...]:
        """Sites of attention in this architecture."""
        return get_args(AttentionSite) if self.architecture == "encoder_decoder" else ("self",)

    @property
    def decoding_site(self) -> AttentionSite:
        """Site of the self-attention that reads a cache while decoding."""
        return "decoder" if self.architecture == "encoder_decoder" else "self"

    @property
    def kv_heads(self) -> int:
        return self.attention.kv_heads or self.attention.heads
