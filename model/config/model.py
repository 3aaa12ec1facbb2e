"""The config of a whole model."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, get_args

from heedful.model.config.attention import AttentionConfig, AttentionSite
from heedful.model.config.checks import require, require_choices, require_rate
from heedful.model.config.parts import FeedForwardConfig, HeadConfig, LoraConfig, NormConfig
from heedful.model.config.pattern import LayerConfig
from heedful.model.config.positions import PositionConfig
from heedful.readable import Readable

Architecture = Literal["encoder_only", "decoder_only", "encoder_decoder"]


@dataclass(frozen=True, kw_only=True, repr=False)
class ModelConfig(Readable):
    """Config of one Transformer.

    The defaults are those of arXiv:1706.03762 for each architecture: norms after the sublayers,
    ReLU, sinusoidal positions, a feed-forward width of 2048. The experiments of
    `heedful configs` show the values of other models.

    Example:
        >>> import heedful as hf
        >>> hf.ModelConfig(architecture="decoder_only", vocab_size=1000, width=64, layers=2)
        ModelConfig(architecture='decoder_only', vocab_size=1000, width=64, layers=2)
    """

    architecture: Architecture = "encoder_decoder"
    """encoder_only (BERT), decoder_only (GPT) or encoder_decoder (translation)."""
    vocab_size: int | None = None
    """Size of the vocabulary (V); None: that of the tokenizer."""
    width: int = 512
    """Width of the residual stream (D)."""
    embedding_width: int | None = None
    """Width of the embeddings of tokens, positions and types, which a linear map then brings to
    `width` (ELECTRA, arXiv:2003.10555; ALBERT, arXiv:1909.11942 §3.1); None: width, no map."""
    layers: int = 6
    """Number of blocks in the stack (L); in an encoder_decoder: in the decoder."""
    encoder_layers: int | None = None
    """Number of blocks in the encoder of an encoder_decoder; None: layers."""
    pattern: tuple[LayerConfig, ...] = ()
    """Layers of a period, which repeats in each stack from its first layer on. A layer is written
    as the fields in which it differs from the model, such as window=16,rotary.base=10000 or
    positions=False; window=all: no window; model: it differs in no field. Empty: all layers are
    equal."""
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    feed_forward: FeedForwardConfig = field(default_factory=FeedForwardConfig)
    norm: NormConfig = field(default_factory=NormConfig)
    positions: PositionConfig = field(default_factory=PositionConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    type_vocab_size: int = 0
    """Number of token types: BERT has 2, for the two sentences of a pair; 0: no types."""
    residuals: bool = True
    """Add each sublayer's input to its output. False is an ablation: deep stacks do not learn."""
    dropout: float = 0.1
    """Dropout rate of each sublayer's output and of the sum of embeddings in training
    (arXiv:1706.03762 §5.4)."""
    tie_embeddings: bool = True
    """Use the embedding matrix as the output projection, too (arXiv:1706.03762 §3.4)."""
    scale_embeddings: bool = True
    """Multiply embeddings by sqrt(width) (arXiv:1706.03762 §3.4)."""
    init: Literal["glorot", "normal", "scaled_normal"] = "glorot"
    """Initial matrices: glorot: uniform; normal: normal with standard deviation 0.02 (BERT);
    scaled_normal: normal, and the last matrix of each sublayer is divided by sqrt(2 * number of
    layers of its stack) (GPT-2)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of computation; parameters, softmax, norms and loss stay in float32."""
    remat: Literal["none", "dots", "attention", "full"] = "none"
    """Values that the backward pass recomputes, to save memory: none; dots: all but the outputs of
    linear maps; attention: all but the outputs of attention's linear maps; full: all but the inputs
    of blocks, which takes a third more time (arXiv:1604.06174)."""
    unroll: int | None = None
    """Layers per iteration of the loop over layers. A larger number is faster, compiles longer, and
    needs memory for a copy of the parameters of these layers. None: 12 on CPUs without remat, where
    the loop can take as long as the layers themselves; else 1. Decoding on CPUs uses at least
    12."""

    def __post_init__(self):
        if isinstance(self.remat, bool):  # Configs of old versions have a bool.
            object.__setattr__(self, "remat", "full" if self.remat else "none")
        require_choices("model", self)
        heads = self.attention.heads
        for name in ("width", "embedding_width", "layers", "unroll"):
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
        name = "width" if self.embedding_width is None else "embedding_width"
        require(
            self.positions.kind != "sinusoidal" or self.input_width % 2 == 0,
            f"model.{name} = {self.input_width} must be even for model.positions.kind sinusoidal",
        )
        require(
            self.embedding_width is None
            or self.head.kind == "classifier"
            or self.head.transform
            or not self.tie_embeddings,
            f"model.embedding_width = {self.embedding_width} with model.tie_embeddings needs "
            "model.head.transform, which brings the hidden states to the width of the embeddings: "
            "set it, or set model.tie_embeddings to False",
        )
        require(
            self.key_dim <= self.head_dim,
            f"model.attention.key_dim = {self.key_dim} must be at most the head size "
            f"{self.head_dim} (model.attention.head_dim, or model.width / model.attention.heads)",
        )
        require(
            self.positions.kind != "rotary" or self.key_dim % 2 == 0,
            f"the size {self.key_dim} of a key (model.attention.key_dim, model.attention.head_dim, "
            "or model.width / model.attention.heads) must be even for model.positions.kind rotary",
        )
        require(
            self.type_vocab_size >= 0,
            f"model.type_vocab_size must be at least 0, not {self.type_vocab_size}",
        )
        require(
            self.type_vocab_size == 0 or self.architecture != "encoder_decoder",
            f"model.type_vocab_size = {self.type_vocab_size} needs model.architecture encoder_only "
            f"or decoder_only, not {self.architecture}: set it to 0, or choose one of them",
        )
        require(
            "gate" not in self.lora.targets or self.feed_forward.gated,
            "model.lora.targets has 'gate', but model.feed_forward.gated is False: leave 'gate' "
            "out, or set model.feed_forward.gated",
        )
        require(
            self.head.kind == "language_model" or self.architecture != "encoder_decoder",
            "model.head.kind = classifier needs model.architecture encoder_only or decoder_only, "
            f"not {self.architecture}: change one of the two fields",
        )
        require(
            self.head.kind == "language_model"
            or self.architecture == "encoder_only"
            or self.head.pooling == "last",
            f"model.head.pooling = {self.head.pooling} does not fit model.architecture "
            "decoder_only, in which only the last token sees all other tokens: choose last",
        )
        for name in ("decoder_core", "cross_core"):
            value = getattr(self.attention, name)
            require(
                value is None or self.architecture == "encoder_decoder",
                f"model.attention.{name} = {value} needs model.architecture encoder_decoder, not "
                f"{self.architecture}: leave model.attention.{name} out",
            )
        require(
            not self.attention.global_projections or self.architecture == "encoder_only",
            "model.attention.global_projections = True needs model.architecture encoder_only, not "
            f"{self.architecture}: leave it out",
        )
        require(
            not self.attention.global_projections
            or self.positions.kind not in ("alibi", "relative"),
            "model.attention.global_projections = True does not support model.positions.kind "
            f"{self.positions.kind}, a bias by distance: choose another kind",
        )
        require(
            self.encoder_layers is None
            or (self.architecture == "encoder_decoder" and self.encoder_layers > 0),
            f"model.encoder_layers = {self.encoder_layers} must be positive for model.architecture "
            f"encoder_decoder, and None for others (here: {self.architecture})",
        )
        require_rate("model.dropout", self.dropout)
        most = max(self.layers, self.encoder_layers or 0)
        require(
            len(self.pattern) <= most,
            f"model.pattern has {len(self.pattern)} layers, but a stack has {most} at most: leave "
            f"out the last layers of the pattern, or set model.layers to {len(self.pattern)}",
        )
        for i, layer in enumerate(self.pattern):
            self._require_fitting(layer, f"model.pattern[{i}]")

    def _require_fitting(self, layer: LayerConfig, name: str) -> None:
        attention, kind = self.attention, self.positions.kind
        require(
            layer.window != "all" or not (attention.dilation or attention.global_tokens),
            f"{name}.window = all: model.attention.dilation and model.attention.global_tokens need "
            f"a window in each layer; leave both out, or set {name}.window to a number",
        )
        require(
            layer.rotary is None or kind == "rotary",
            f"{name}.rotary is set, but model.positions.kind is {kind}: set the kind to rotary, or "
            f"leave {name}.rotary out",
        )
        require(
            layer.positions or kind in ("rotary", "alibi", "relative"),
            f"{name}.positions = False: model.positions.kind = {kind} does not act in single "
            "layers; choose the kind rotary, alibi or relative",
        )

    @property
    def input_width(self) -> int:
        """Width of the embeddings."""
        return self.embedding_width or self.width

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

    @cached_property
    def period(self) -> tuple["ModelConfig", ...]:
        """The shortest period of the pattern: one config per layer, for a model of such layers."""
        pattern = self.pattern or (LayerConfig(),)
        sizes = range(1, len(pattern) + 1)
        repeats = (n for n in sizes if pattern == pattern[:n] * (len(pattern) // n))
        return tuple(map(self._with_layer, pattern[: next(repeats)]))

    def layer(self, index: int) -> "ModelConfig":
        """Return the model in which all layers are like layer `index` (from 0) of this model."""
        return self.period[index % len(self.period)]

    def _with_layer(self, layer: LayerConfig) -> "ModelConfig":
        attention, positions = self.attention, self.positions
        if layer.window is not None:
            window = None if layer.window == "all" else layer.window
            attention = replace(attention, window=window)
        if layer.rotary is not None:
            positions = replace(positions, rotary=layer.rotary)
        if not layer.positions:
            positions = PositionConfig(kind="none", max_length=positions.max_length)
        return replace(self, pattern=(), attention=attention, positions=positions)
