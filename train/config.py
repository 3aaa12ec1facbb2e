"""Settings of training and decoding: frozen values, checked when they are made; no jax here."""

import re
from dataclasses import dataclass, field
from typing import Literal

from heedful.model.config import require_choices

MOST = 1 << 20  # tokens of a text
MOST_BEAM = 4096  # hypotheses of a beam


class TrainError(ValueError):
    """A run that cannot start or go on; one line, with the fix."""


class Interrupted(Exception):
    """The run was stopped by a signal, and saved."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


def require(condition: bool, message: str) -> None:
    """Raise TrainError unless the condition holds."""
    if not condition:
        raise TrainError(message)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Adam (arXiv:1412.6980) or AdamW (arXiv:1711.05101), with a schedule that warms up."""

    kind: Literal["adam", "adamw"] = "adamw"
    """adam ignores no weight_decay: it must be 0 there."""
    peak_lr: float = 1e-3
    """Learning rate at the end of the warmup."""
    initial_lr: float = 0.0
    """Learning rate of the first update, where the warmup begins, as in fairseq; 0: the first of
    `warmup_steps` equal steps to the peak, as in arXiv:1706.03762."""
    final_lr: float = 0.0
    """Learning rate that linear and cosine come to when all steps are done."""
    warmup_steps: int = 1000
    """Steps over which the rate grows linearly to its peak."""
    schedule: Literal["inverse_sqrt", "linear", "cosine", "constant"] = "inverse_sqrt"
    """Rate after the warmup; inverse_sqrt is the rule of arXiv:1706.03762 §5.3."""
    b1: float = 0.9
    """Decay of the first moment."""
    b2: float = 0.98
    """Decay of the second moment."""
    first_moment: Literal["float32", "bfloat16"] = "float32"
    """Type of the stored first moment. The second stays in float32: in bfloat16 its small steps,
    1 - b2 of itself, would be rounded away."""
    epsilon: float = 1e-9
    """Added to the root of the second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay, on matrices only: not on biases, norms or embeddings."""
    clip_norm: float | None = 1.0
    """Largest global norm of a gradient; None: no clipping."""
    freeze: tuple[str, ...] = ()
    """Parameters that do not train: regular expressions, searched in names such as
    encoder.blocks.3.self_attention.query.kernel (`heedful inspect` lists them)."""
    layer_decay: float = 1.0
    """Factor of the learning rate from the head to the top layer, and from each layer to the one
    below it; embeddings are below all (arXiv:2106.08254)."""
    head_lr_multiplier: float = 1.0
    """Factor of the head's learning rate."""

    def __post_init__(self):
        require_choices("optimizer", self, TrainError)
        require(self.peak_lr > 0, f"optimizer.peak_lr must be positive, not {self.peak_lr}")
        require(
            self.warmup_steps >= 0,
            f"optimizer.warmup_steps must be at least 0, not {self.warmup_steps}",
        )
        for name in ("b1", "b2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optimizer.{name} must lie in [0, 1), not {value}")
        for name in ("initial_lr", "final_lr", "weight_decay"):
            value = getattr(self, name)
            require(value >= 0, f"optimizer.{name} must be at least 0, not {value}")
        require(self.epsilon > 0, f"optimizer.epsilon must be positive, not {self.epsilon}")
        require(
            self.kind == "adamw" or self.weight_decay == 0,
            f"optimizer.weight_decay = {self.weight_decay} needs optimizer.kind adamw",
        )
        require(
            0 < self.layer_decay <= 1,
            f"optimizer.layer_decay must lie in (0, 1], not {self.layer_decay}",
        )
        require(
            self.final_lr == 0 or self.schedule in ("linear", "cosine"),
            f"optimizer.final_lr = {self.final_lr} needs optimizer.schedule linear or cosine, not "
            f"{self.schedule}: set it to 0",
        )
        require(
            self.initial_lr == 0 or self.warmup_steps > 0,
            f"optimizer.initial_lr = {self.initial_lr} needs optimizer.warmup_steps: set it to 0",
        )
        require(
            self.head_lr_multiplier > 0,
            f"optimizer.head_lr_multiplier must be positive, not {self.head_lr_multiplier}",
        )
        for pattern in self.freeze:
            _require_pattern("optimizer.freeze", pattern)
        require(
            self.clip_norm is None or self.clip_norm > 0,
            f"optimizer.clip_norm must be positive or None, not {self.clip_norm}",
        )


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Axes of the device mesh; the product of their sizes must be the number of devices."""

    data: int = -1
    """Copies of the model that share a batch; -1: all devices that the others leave."""
    fsdp: int = 1
    """Devices that share a batch and also split parameters and optimizer state."""
    seq: int = 1
    """Devices that split the length of a sequence."""
    tensor: int = 1
    """Devices that split heads, feed-forward and vocabulary."""

    def __post_init__(self):
        require_choices("mesh", self, TrainError)
        for name in ("fsdp", "seq", "tensor"):
            value = getattr(self, name)
            require(value > 0, f"mesh.{name} must be positive, not {value}")
        require(
            self.data == -1 or self.data > 0, f"mesh.data must be positive or -1, not {self.data}"
        )


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """Settings of beam search and sampling."""

    beam: int = 4
    """Hypotheses of the beam search; 1: greedy, or sampling when temperature is above 0."""
    length_penalty: float = 0.6
    """Exponent of the length penalty of the beam search (arXiv:1609.08144 §7)."""
    length_penalty_offset: int = 5
    """Number that this penalty adds to a length; 0: scores are divided by length^exponent, as in
    fairseq, Marian and Hugging Face transformers."""
    early_stopping: Literal["never", False, True] = "never"
    """End of a beam search, in the words and by the rule of Hugging Face transformers. True: when
    as many hypotheses are finished as the beam has; False: when these are also as good as the best
    living one would be if it ended now; never: when no living one can become better than the best
    finished one. At the length limit the living ones count as finished."""
    extra_length: int = 50
    """Most tokens of the output beyond those of the source (arXiv:1706.03762 §6.1)."""
    temperature: float = 0.0
    """Sampling temperature, with beam 1."""
    top_k: int = 0
    """Sample among the likeliest k tokens; 0: all."""
    top_p: float = 1.0
    """Sample among the likeliest tokens of this total probability (arXiv:1904.09751)."""
    min_p: float = 0.0
    """Sample among tokens of at least this share of the likeliest one's probability
    (arXiv:2407.01082)."""
    repetition_penalty: float = 1.0
    """Divides positive scores of tokens seen before and multiplies negative ones
    (arXiv:1909.05858 §4.1). The begin token in front of a text counts as not seen. In a beam search
    the scores are log-probabilities, as in Hugging Face transformers."""
    never: tuple[int, ...] = ()
    """Tokens, by their ids, that are never written."""
    special_tokens: bool = False
    """Read special tokens that an input spells (<|user|>, [MASK]) as these tokens. Otherwise their
    spelling is text like any other, as in training."""
    max_tokens: int = 200
    """Most tokens that are written after a prompt. With beam 1 they may go beyond a table of
    learned positions: there each is written from the last three quarters of the table or more,
    which are read anew after every quarter."""
    stop: tuple[str, ...] = ()
    """Texts after a prompt end before the first of these."""
    batch_tokens: int = 4096
    """Most positions (rows x source or prompt length, x beam on a CPU) that are decoded at once. A
    longer source or prompt is refused."""

    def __post_init__(self):
        require_choices("decode", self, TrainError)
        for name in ("beam", "extra_length", "max_tokens", "batch_tokens"):
            value = getattr(self, name)
            require(value > 0, f"decode.{name} must be positive, not {value}")
        for name in ("length_penalty", "length_penalty_offset", "temperature", "top_k"):
            value = getattr(self, name)
            require(value >= 0, f"decode.{name} must be at least 0, not {value}")
        for name in ("extra_length", "max_tokens"):
            value = getattr(self, name)
            require(value <= MOST, f"decode.{name} must be at most {MOST:,}, not {value:,}")
        require(
            self.beam <= MOST_BEAM, f"decode.beam must be at most {MOST_BEAM:,}, not {self.beam:,}"
        )
        require(
            self.length_penalty <= 10,
            f"decode.length_penalty must be at most 10, not {self.length_penalty}: the powers of "
            "long texts would be beyond all numbers",
        )
        require(
            self.temperature == 0 or self.temperature >= 1e-6,
            f"decode.temperature must be 0, which is greedy, or at least 1e-6, not "
            f"{self.temperature}",
        )
        require(0 < self.top_p <= 1, f"decode.top_p must lie in (0, 1], not {self.top_p}")
        require(0 <= self.min_p < 1, f"decode.min_p must lie in [0, 1), not {self.min_p}")
        require(
            self.repetition_penalty >= 1,
            f"decode.repetition_penalty must be at least 1, not {self.repetition_penalty}",
        )
        require(
            all(i >= 0 for i in self.never),
            f"decode.never is {' '.join(map(str, self.never))}: give ids of tokens, from 0 on",
        )
        require(all(self.stop), "decode.stop holds an empty text: every text would end there")
        sampling = self.temperature > 0 or self.top_k > 0 or self.top_p < 1 or self.min_p > 0
        require(
            not sampling or (self.beam == 1 and self.temperature > 0),
            "sampling needs decode.beam = 1 and decode.temperature above 0, "
            f"not {self.beam} and {self.temperature}",
        )


def require_tokens(decode: DecodeConfig, vocab_size: int) -> None:
    """Raise TrainError where `decode.never` has a token that a model does not have."""
    beyond = [i for i in decode.never if i >= vocab_size]
    require(
        not beyond,
        f"decode.never has {' '.join(map(str, beyond))}, but model.vocab_size is {vocab_size}: "
        "leave it out",
    )


Metric = Literal["loss", "smoothed_loss", "accuracy", "f1", "matthews", "pearson", "spearman"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run."""

    init_from: str | None = None
    """Fine-tune the parameters of a run (its directory), of a Hugging Face model (hf:DIR) or of a
    package (package:minilm, package:stories15m); None: pretrain, from random ones."""
    reinit: tuple[str, ...] = ()
    """Parameters that begin at random although `init_from` has them: regular expressions."""

    steps: int = 10_000
    """Updates of the parameters."""
    seed: int = 0
    """Seed of the initial parameters, the dropout and the order of the data."""
    label_smoothing: float = 0.1
    """Share of the target's probability that is spread over the vocabulary (§5.4)."""
    loss_chunk: int | None = None
    """Positions of a row whose logits exist at once, in float32: saves memory and changes no
    result; None: all. An encoder, which restores a share of the tokens, computes the logits of
    these tokens and of what fills up their last chunk, no others."""
    accumulate: int = 1
    """Parts into which a batch is split to save memory; the update stays the same."""
    log_every: int = 20
    """Steps between two lines of metrics."""
    checkpoint_every: int = 500
    """Steps between two checkpoints, each with its validation loss."""
    checkpoints: str | None = None
    """Place of the checkpoints: a folder, or a bucket (gs://... with the package gcsfs, s3://...
    with s3fs); None: in the run directory."""
    max_checkpoints: int = 5
    """Newest checkpoints that are kept, besides the best one and, until the next one is written,
    that of a stop."""
    average_last: int = 5
    """Newest checkpoints whose parameters are averaged for evaluation (§6.1); 1: the best one."""
    metric: Metric = "loss"
    """Measure on the validation data that decides which checkpoint is the best; smoothed_loss is
    the loss with `label_smoothing`, as in training."""
    patience: int | None = None
    """Stop after so many checkpoints without a better one; None: never."""
    deterministic: bool = True
    """The same bits in every run on the same devices: free on CPUs and TPUs, slower on GPUs."""
    fingerprint_every: int = 100
    """Steps between two fingerprints of parameters and loss, beside those of checkpoints, which
    heedful reproduce and verify compare."""
    samples: int = 10
    """Translations shown at the end."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)

    def __post_init__(self):
        require_choices("train", self, TrainError)
        for name in (
            "steps", "accumulate", "log_every", "checkpoint_every", "max_checkpoints",
            "average_last", "fingerprint_every",
        ):  # fmt: skip
            value = getattr(self, name)
            require(value > 0, f"train.{name} must be positive, not {value}")
        require(
            self.patience is None or self.patience > 0,
            f"train.patience must be positive or None, not {self.patience}",
        )
        require(
            self.loss_chunk is None or self.loss_chunk > 0,
            f"train.loss_chunk must be positive or None, not {self.loss_chunk}",
        )
        require(
            not self.reinit or self.init_from is not None,
            f"train.reinit = {' '.join(self.reinit)} needs train.init_from",
        )
        for pattern in self.reinit:
            _require_pattern("train.reinit", pattern)
        require(self.seed >= 0, f"train.seed must be at least 0, not {self.seed}")
        require(self.samples >= 0, f"train.samples must be at least 0, not {self.samples}")
        require(
            0 <= self.label_smoothing < 1,
            f"train.label_smoothing must lie in [0, 1), not {self.label_smoothing}",
        )
        optimizer = self.optimizer
        require(
            optimizer.warmup_steps < self.steps or optimizer.schedule not in ("linear", "cosine"),
            f"train.optimizer.warmup_steps = {optimizer.warmup_steps} leaves nothing of "
            f"train.steps = {self.steps} for the {optimizer.schedule} decay: shorten the warmup",
        )
        require(
            self.average_last <= self.max_checkpoints,
            f"train.average_last = {self.average_last} checkpoints need train.max_checkpoints of "
            f"at least as many, not {self.max_checkpoints}",
        )


def _require_pattern(name: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise TrainError(f"{name} has {pattern!r}, no regular expression: {error}") from error
