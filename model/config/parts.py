"""Options of the other parts of a model: feed-forward layer, norms, head and low-rank updates."""

from dataclasses import dataclass
from typing import Literal

from heedful.model.config.checks import require, require_choices, require_idle, require_rate
from heedful.readable import Readable


@dataclass(frozen=True, kw_only=True, repr=False)
class FeedForwardConfig(Readable):
    """The position-wise feed-forward layer (arXiv:1706.03762 §3.3).

    Example:
        >>> import heedful as hf
        >>> hf.FeedForwardConfig(width=1024, gated=True)
        FeedForwardConfig(width=1024, gated=True)
    """

    width: int = 2048
    """Inner width (F)."""
    activation: Literal["relu", "gelu", "gelu_tanh", "silu"] = "relu"
    """Non-linearity; gelu_tanh is GPT-2's approximation of gelu (arXiv:1606.08415 §2)."""
    gated: bool = False
    """Multiply by a gate, which a third matrix computes; with silu this is SwiGLU
    (arXiv:2002.05202)."""
    bias: bool = True
    """Add a bias to each linear map."""
    dropout: float = 0.0
    """Dropout rate of inner activations in training."""

    def __post_init__(self):
        require_choices("model.feed_forward", self)
        require(self.width > 0, f"model.feed_forward.width must be positive, not {self.width}")
        require_rate("model.feed_forward.dropout", self.dropout)


@dataclass(frozen=True, kw_only=True, repr=False)
class NormConfig(Readable):
    """Normalisation of each sublayer.

    Example:
        >>> import heedful as hf
        >>> hf.NormConfig(kind="rmsnorm", position="pre")
        NormConfig(kind='rmsnorm', position='pre')
    """

    kind: Literal["layernorm", "rmsnorm", "none"] = "layernorm"
    """layernorm (arXiv:1607.06450), rmsnorm (arXiv:1910.07467), or none, for an ablation."""
    position: Literal["post", "pre"] = "post"
    """post: norm(x + f(x)), the original; pre: x + f(norm(x)), and a norm after the last layer."""
    epsilon: float = 1e-6
    """Number that is added to the variance."""
    bias: bool = True
    """Give each layernorm a bias."""
    embeddings: bool = False
    """Normalise the sum of embeddings too (BERT)."""

    def __post_init__(self):
        require_choices("model.norm", self)
        require(self.epsilon > 0, f"model.norm.epsilon must be positive, not {self.epsilon}")


@dataclass(frozen=True, kw_only=True, repr=False)
class HeadConfig(Readable):
    """The head on top of the stack.

    Example:
        >>> import heedful as hf
        >>> hf.HeadConfig(kind="classifier", outputs=3)
        HeadConfig(kind='classifier', outputs=3)
    """

    kind: Literal["language_model", "classifier"] = "language_model"
    """Logits for the entries of the vocabulary, or for classes."""
    transform: bool = False
    """For language_model: apply a dense layer, activation and norm before the logits (BERT)."""
    bias: bool = False
    """For language_model: give each entry of the vocabulary a bias (BERT, Marian)."""
    scale: bool = False
    """For language_model: multiply the input by width^-0.5 (T5 with tied embeddings)."""
    outputs: int | None = None
    """For classifier: number of classes, or 1 for a regression; None: that of the data."""
    pooling: Literal["first", "mean", "last"] = "first"
    """For classifier: vector of a row: its first hidden state (BERT), the mean, or the last one."""
    pooler: bool = True
    """For classifier: apply a dense layer and an activation after the pooling (BERT)."""
    pooler_activation: Literal["tanh", "relu", "gelu"] = "tanh"
    """For classifier with a pooler: its activation: tanh (BERT), relu (DistilBERT,
    arXiv:1910.01108) or gelu (ELECTRA, arXiv:2003.10555)."""
    dropout: float = 0.1
    """For classifier: dropout rate of the pooled features in training."""

    def __post_init__(self):
        require_choices("model.head", self)
        require(
            self.outputs is None or self.outputs > 0,
            f"model.head.outputs must be positive or None, not {self.outputs}",
        )
        require_rate("model.head.dropout", self.dropout)
        if self.kind == "classifier":
            idle, need = ("transform", "bias", "scale"), "model.head.kind language_model"
        else:
            idle = ("outputs", "pooling", "pooler", "pooler_activation")
            need = "model.head.kind classifier"
        require_idle("model.head", self, idle, f"{need}, not {self.kind}")
        if not self.pooler:
            require_idle("model.head", self, ("pooler_activation",), "model.head.pooler True")


@dataclass(frozen=True, kw_only=True, repr=False)
class LoraConfig(Readable):
    """Low-rank adaptation (arXiv:2106.09685): W + alpha / rank * A @ B.

    `fit` and `heedful train` do not train W; freeze it with optax in a training loop of your own.

    Example:
        >>> import heedful as hf
        >>> hf.LoraConfig(rank=8)
        LoraConfig(rank=8)
    """

    rank: int = 0
    """Rank of the update (R); 0: no update."""
    alpha: float = 16.0
    """Factor of the update, which is also divided by rank."""
    targets: tuple[str, ...] = ("query", "value")
    """Linear maps to adapt, among query, key, value, out, up, gate, down."""

    def __post_init__(self):
        require_choices("model.lora", self)
        require(self.rank >= 0, f"model.lora.rank must be at least 0, not {self.rank}")
        require(self.alpha > 0, f"model.lora.alpha must be positive, not {self.alpha}")
        known = ("query", "key", "value", "out", "up", "gate", "down")
        for target in self.targets:
            require(
                target in known,
                f"model.lora.targets has {target!r}: choose among {', '.join(known)}",
            )
        require(bool(self.targets), "model.lora.targets is empty: name at least one linear map")
        if not self.rank:
            require_idle("model.lora", self, ("alpha", "targets"), "model.lora.rank above 0")
