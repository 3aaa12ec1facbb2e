"""What a model is: frozen values, checked when they are made. No jax is imported here."""

import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args, get_origin

Architecture = Literal["encoder_only", "decoder_only", "encoder_decoder"]
AttentionSite = Literal["self", "decoder", "cross"]
"""Where an attention stands: alone in its stack, in a decoder beside cross-attention, or across."""

MOST_GLOBAL = 100_000


class ModelError(ValueError):
    """A model that cannot be built, or an input that it cannot take; one line, with the fix."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ModelError(message)


@dataclass(frozen=True, kw_only=True)
class PerformerConfig:
    """The core `performer`: attention by random features (arXiv:2009.14794)."""

    features: int = 256
    """Random features (R): the error falls as 1 / sqrt(R)."""
    kernel: Literal["softmax", "relu"] = "softmax"
    """softmax: an unbiased estimate of softmax attention (§2.3); relu: another attention (§4)."""
    orthogonal: bool = True
    """Whether features are orthogonal in blocks (§2.4), or independent."""
    redraw_steps: int | None = None
    """Training steps between two draws of the features; None: drawn once, from a fixed key, which
    measuring and generating use in any case. A model adapts to the draw that it trains with: in
    hundreds of steps on one draw it becomes worse with others."""
    chunk: int = 128
    """Positions per block of the causal prefix sum: memory and time, not the result."""

    def __post_init__(self):
        require_choices("attention.performer", self)
        for name in ("features", "chunk"):
            value = getattr(self, name)
            require(value > 0, f"attention.performer.{name} must be positive, not {value}")
        require(
            self.redraw_steps is None or self.redraw_steps > 0,
            f"attention.performer.redraw_steps must be positive or None, not {self.redraw_steps}",
        )


@dataclass(frozen=True, kw_only=True)
class LinformerConfig:
    """The core `linformer`: keys and values projected along the length (arXiv:2006.04768)."""

    rank: int = 256
    """Rows to which keys and values are projected (k in the paper)."""
    max_length: int = 4096
    """Columns of the projections: no longer input is accepted."""
    sharing: Literal["none", "heads", "key_value", "layers"] = "heads"
    """none: projections of each head, for keys and for values; heads: one pair for all heads;
    key_value: one for all heads and both; layers: one for the whole stack (§4)."""

    def __post_init__(self):
        require_choices("attention.linformer", self)
        require(
            0 < self.rank <= self.max_length,
            f"attention.linformer.rank = {self.rank} must be positive and at most "
            f"attention.linformer.max_length = {self.max_length}",
        )


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Multi-head attention (arXiv:1706.03762 §3.2), with grouped key/value heads."""

    core: str = "auto"
    """Attention core: auto, or a name from model/attention."""
    decoder_core: str | None = None
    """Core of the decoder's self-attention in an encoder_decoder; None: `core`."""
    cross_core: str | None = None
    """Core of cross-attention; None: `core`."""
    window: int | None = None
    """Self-attention sees so many positions to each side; None: all (arXiv:2004.05150 §3.1, whose
    w is twice that)."""
    dilation: tuple[int, ...] = ()
    """Steps between the positions of the window, one for each head; none: 1 (§3.1)."""
    global_tokens: int = 0
    """So many tokens at the beginning of each row see all, and are seen by all (§3.1)."""
    global_projections: bool = False
    """Whether what global tokens see has query, key and value projections of its own (§3.1)."""
    heads: int = 8
    """Query heads (N)."""
    kv_heads: int | None = None
    """Key and value heads (K), a divisor of the query heads; None: as many (arXiv:2305.13245)."""
    head_dim: int | None = None
    """Size of one head (H); None: width / heads."""
    key_dim: int | None = None
    """Size of a head's queries and keys (d_k); None: head_dim, which its values have. Cores get
    them filled up with zeros: a smaller one saves parameters, not time."""
    bias: bool = True
    """Whether the four projections have a bias."""
    scaled: bool = True
    """Whether scores are divided by sqrt(head_dim); T5's are not, its queries start smaller, and
    learn in steps smaller by as much."""
    dropout: float = 0.0
    """Share of attention weights dropped in training."""
    performer: PerformerConfig = field(default_factory=PerformerConfig)
    linformer: LinformerConfig = field(default_factory=LinformerConfig)

    def __post_init__(self):
        require_choices("attention", self)
        require(self.heads > 0, f"attention.heads must be positive, not {self.heads}")
        require(
            self.window is None or self.window >= 0,
            f"attention.window must be None or at least 0, not {self.window}",
        )
        require(
            0 <= self.global_tokens <= MOST_GLOBAL,
            f"attention.global_tokens must lie in [0, {MOST_GLOBAL}], not {self.global_tokens}",
        )
        for name in ("dilation", "global_tokens"):
            require(
                self.window is not None or not getattr(self, name),
                f"attention.{name} = {getattr(self, name)} needs attention.window",
            )
        require(
            len(self.dilation) in (0, self.heads) and all(step > 0 for step in self.dilation),
            f"attention.dilation = {self.dilation} needs a positive step for each of "
            f"attention.heads = {self.heads}",
        )
        require(
            not self.global_projections or self.global_tokens > 0,
            "attention.global_projections needs attention.global_tokens above 0",
        )
        kv_heads = self.kv_heads
        require(
            kv_heads is None or (kv_heads > 0 and self.heads % kv_heads == 0),
            f"attention.kv_heads = {kv_heads} must divide attention.heads = {self.heads}",
        )
        require(
            self.head_dim is None or self.head_dim > 0,
            f"attention.head_dim must be positive, not {self.head_dim}",
        )
        require(
            self.key_dim is None or self.key_dim > 0,
            f"attention.key_dim must be positive, not {self.key_dim}",
        )
        _require_rate("attention.dropout", self.dropout)
        used = {self.core, self.decoder_core, self.cross_core}
        for name, default in (("performer", PerformerConfig()), ("linformer", LinformerConfig())):
            require(
                name in used or getattr(self, name) == default,
                f"attention.{name} is set, but no attention core is {name}",
            )

    def core_of(self, place: AttentionSite) -> str:
        """The core of the attention at this place, or auto."""
        own = {"self": None, "decoder": self.decoder_core, "cross": self.cross_core}[place]
        return own or self.core


@dataclass(frozen=True, kw_only=True)
class FeedForwardConfig:
    """The position-wise feed-forward layer (arXiv:1706.03762 §3.3)."""

    width: int = 2048
    """Inner width (F)."""
    activation: Literal["relu", "gelu", "gelu_tanh", "silu"] = "relu"
    """Non-linearity; gelu_tanh is GPT-2's approximation of gelu (arXiv:1606.08415 §2)."""
    gated: bool = False
    """Whether a third matrix is the gate: silu and gated is SwiGLU (arXiv:2002.05202)."""
    bias: bool = True
    """Whether the matrices have a bias."""
    dropout: float = 0.0
    """Share of inner activations dropped in training."""

    def __post_init__(self):
        require_choices("feed_forward", self)
        require(self.width > 0, f"feed_forward.width must be positive, not {self.width}")
        _require_rate("feed_forward.dropout", self.dropout)


@dataclass(frozen=True, kw_only=True)
class NormConfig:
    """Normalisation of each sublayer."""

    kind: Literal["layernorm", "rmsnorm", "none"] = "layernorm"
    """layernorm (arXiv:1607.06450), rmsnorm (arXiv:1910.07467), or none, to show what it is for."""
    position: Literal["post", "pre"] = "post"
    """post: norm(x + f(x)), the original; pre: x + f(norm(x)) and one last norm."""
    epsilon: float = 1e-6
    """Added to the variance."""
    bias: bool = True
    """Whether a layernorm has a bias."""
    embeddings: bool = False
    """Whether the sum of embeddings is normalised too (BERT)."""

    def __post_init__(self):
        require_choices("norm", self)
        require(self.epsilon > 0, f"norm.epsilon must be positive, not {self.epsilon}")


@dataclass(frozen=True, kw_only=True)
class RotaryConfig:
    """Frequencies of rotary positions."""

    base: float = 10_000.0
    """Wavelengths are 2 pi base^(2i/H)."""
    scaling: Literal["none", "linear", "llama3"] = "none"
    """linear: positions are divided by `factor` (arXiv:2306.15595); llama3: only the long
    wavelengths are (LLaMA 3.1)."""
    factor: float = 1.0
    """How much longer inputs may be than `original_length`."""
    low_frequency_factor: float = 1.0
    """For llama3: wavelengths above original_length / this are scaled in full."""
    high_frequency_factor: float = 4.0
    """For llama3: wavelengths below original_length / this are not scaled."""
    original_length: int = 8192
    """For llama3: longest input before the scaling."""

    def __post_init__(self):
        require_choices("positions.rotary", self)
        for name in ("base", "factor", "low_frequency_factor", "original_length"):
            value = getattr(self, name)
            require(value > 0, f"positions.rotary.{name} must be positive, not {value}")
        require(
            self.high_frequency_factor > self.low_frequency_factor,
            f"positions.rotary.high_frequency_factor = {self.high_frequency_factor} must be above "
            f"low_frequency_factor = {self.low_frequency_factor}",
        )
        require(
            self.scaling != "none" or self.factor == 1,
            f"positions.rotary.factor = {self.factor} needs positions.rotary.scaling",
        )
        require(
            self.scaling == "none" or self.factor != 1,
            f"positions.rotary.scaling = {self.scaling} needs a positions.rotary.factor other than "
            "1, which scales nothing",
        )
        if self.scaling != "llama3":
            names = "low_frequency_factor", "high_frequency_factor", "original_length"
            need = f"positions.rotary.scaling llama3, not {self.scaling}"
            _require_idle("positions.rotary", self, names, need)


@dataclass(frozen=True, kw_only=True)
class PositionConfig:
    """How the model knows the order of its input."""

    kind: Literal["none", "sinusoidal", "learned", "rotary", "alibi", "relative"] = "sinusoidal"
    """none, sinusoidal (arXiv:1706.03762 §3.5), learned (arXiv:1705.03122), rotary
    (arXiv:2104.09864), alibi (arXiv:2108.12409) or relative, T5's bias (arXiv:1910.10683 §2.1)."""
    max_length: int = 512
    """Rows in the table of learned positions: no longer input is accepted. Of others, only what a
    file for transformers or llama2.c says."""
    buckets: int = 32
    """For relative: distances that are told apart, half of them exactly, the rest by logarithm."""
    max_distance: int = 128
    """For relative: distances from here on share a bucket."""
    rotary: RotaryConfig = field(default_factory=RotaryConfig)

    def __post_init__(self):
        require_choices("positions", self)
        for name in ("max_length", "buckets", "max_distance"):
            value = getattr(self, name)
            require(value > 0, f"positions.{name} must be positive, not {value}")
        require(
            self.buckets % 4 == 0 and self.max_distance > self.buckets // 2,
            f"positions.buckets = {self.buckets} must be a multiple of 4, and "
            f"positions.max_distance = {self.max_distance} above half of it",
        )
        if self.kind != "relative":
            need = f"positions.kind relative, not {self.kind}"
            _require_idle("positions", self, ("buckets", "max_distance"), need)
        require(
            self.kind == "rotary" or self.rotary == RotaryConfig(),
            f"positions.rotary is set, but positions.kind is {self.kind}",
        )


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """What stands on top of the stack."""

    kind: Literal["language_model", "classifier"] = "language_model"
    """Scores for each entry of the vocabulary, or for each class."""
    transform: bool = False
    """For language_model: a dense layer, activation and norm before the scores (BERT)."""
    bias: bool = False
    """For language_model: whether each entry of the vocabulary has a bias (BERT, Marian)."""
    scale: bool = False
    """For language_model: whether the input is multiplied by width^-0.5 (T5, tied)."""
    outputs: int | None = None
    """For classifier: classes, or 1 for a regression; None: as many as the data has."""
    pooling: Literal["first", "mean", "last"] = "first"
    """For classifier: which hidden states are summed up: the first (BERT), all, or the last."""
    pooler: bool = True
    """For classifier: whether a dense layer and tanh follow the pooling (BERT)."""
    dropout: float = 0.1
    """For classifier: share of the pooled features dropped in training."""

    def __post_init__(self):
        require_choices("head", self)
        require(
            self.outputs is None or self.outputs > 0,
            f"head.outputs must be positive, not {self.outputs}",
        )
        _require_rate("head.dropout", self.dropout)
        if self.kind == "classifier":
            idle, need = ("transform", "bias", "scale"), "head.kind language_model"
        else:
            idle, need = ("outputs", "pooling", "pooler"), "head.kind classifier"
        _require_idle("head", self, idle, f"{need}, not {self.kind}")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adaptation (arXiv:2106.09685): W + alpha / rank A B, where only A and B train."""

    rank: int = 0
    """Rank of the update (R); 0: none."""
    alpha: float = 16.0
    """Strength of the update."""
    targets: tuple[str, ...] = ("query", "value")
    """Linear maps that are adapted: query, key, value, out, up, gate, down."""

    def __post_init__(self):
        require_choices("lora", self)
        require(self.rank >= 0, f"lora.rank must be at least 0, not {self.rank}")
        require(self.alpha > 0, f"lora.alpha must be positive, not {self.alpha}")
        known = ("query", "key", "value", "out", "up", "gate", "down")
        for target in self.targets:
            require(
                target in known, f"lora.targets has {target!r}: choose among {', '.join(known)}"
            )
        require(bool(self.targets), "lora.targets is empty: name a linear map")
        if not self.rank:
            _require_idle("lora", self, ("alpha", "targets"), "lora.rank above 0")


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
        _require_rate("model.dropout", self.dropout)

    @property
    def head_dim(self) -> int:
        return self.attention.head_dim or self.width // self.attention.heads

    @property
    def key_dim(self) -> int:
        return self.attention.key_dim or self.head_dim

    @property
    def places(self) -> tuple[AttentionSite, ...]:
        """Where attentions stand in this architecture."""
        return get_args(AttentionSite) if self.architecture == "encoder_decoder" else ("self",)

    @property
    def kv_heads(self) -> int:
        return self.attention.kv_heads or self.attention.heads


def require_choices(section: str, config: Any, error: type[ValueError] = ModelError) -> None:
    """An unknown choice would silently mean whichever branch comes last, and a lower limit lets
    infinity pass."""
    for entry in fields(config):
        value, choices = getattr(config, entry.name), get_args(entry.type)
        if isinstance(value, float) and not math.isfinite(value):
            raise error(f"{section}.{entry.name} must be a finite number, not {value}")
        if get_origin(entry.type) is Literal and value not in choices:
            known = ", ".join(map(str, choices))
            raise error(f"{section}.{entry.name} must be one of {known}, not {value}")


def _require_idle(section: str, config: Any, names: tuple[str, ...], need: str) -> None:
    """Fields that do nothing without `need` stand at their defaults: who sets one expects more."""
    for entry in fields(config):
        value = getattr(config, entry.name)
        require(
            entry.name not in names or value == entry.default,
            f"{section}.{entry.name} = {value} needs {need}: set that, or leave it out",
        )


def _require_rate(name: str, value: float) -> None:
    require(0 <= value < 1, f"{name} must lie in [0, 1), not {value}")
