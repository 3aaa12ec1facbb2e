"""Settings of training and decoding, checked when they are created. Nothing here imports jax."""

import re
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from heedful import own_code
from heedful.model.config import require_choices
from heedful.names import did_you_mean
from heedful.readable import Readable
from heedful.train.errors import TrainError, require

MOST = 1 << 20  # Largest number of tokens of a text.
MOST_BEAM = 4096  # Largest number of hypotheses of a beam search.


OptimizerKind = Literal["adam", "adamw"]
ScheduleKind = Literal["inverse_sqrt", "linear", "cosine", "constant"]


@dataclass(frozen=True, kw_only=True, repr=False)
class OptimizerConfig(Readable):
    """Adam (arXiv:1412.6980), AdamW (arXiv:1711.05101) or another optimizer; learning rate.

    Example:
        >>> import heedful as hf
        >>> hf.OptimizerConfig(peak_lr=3e-4, schedule="cosine")
        OptimizerConfig(peak_lr=0.0003, schedule='cosine')
    """

    kind: OptimizerKind | str = "adamw"
    """Optimizer. With adam, weight_decay must be 0. An import path names another optimizer: one of
    optax, such as optax:lion, or your own, my_package.my_module:NAME, a function (OptimizerConfig,
    learning rate by step) -> optax.GradientTransformation."""
    peak_lr: float = 1e-3
    """Learning rate at the end of the warmup."""
    initial_lr: float = 0.0
    """Learning rate of the first update, from which the warmup rises, as in fairseq; 0: the first
    update has peak_lr / warmup_steps, as in arXiv:1706.03762."""
    final_lr: float = 0.0
    """Learning rate of the linear and cosine schedules after all steps."""
    warmup_steps: int = 1000
    """Number of steps in which the learning rate rises linearly to peak_lr."""
    schedule: ScheduleKind | str = "inverse_sqrt"
    """Learning rate after the warmup; inverse_sqrt is the rule of arXiv:1706.03762 §5.3. An import
    path my_package.my_module:NAME names a schedule of your own: a function (OptimizerConfig,
    train.steps) -> learning rate by the number of updates after the warmup."""
    b1: float = 0.9
    """Decay rate of the first moment."""
    b2: float = 0.98
    """Decay rate of the second moment."""
    first_moment: Literal["float32", "bfloat16"] = "float32"
    """Type of the stored first moment. The second moment stays in float32: in bfloat16, its small
    updates, a share 1 - b2 of the moment, would be lost in rounding."""
    epsilon: float = 1e-9
    """Number that is added to the square root of the second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay, which is multiplied by the learning rate, on matrices only: not on
    biases, norms or embeddings."""
    clip_norm: float | None = 1.0
    """Largest global norm of the gradient; None: no clipping."""
    freeze: tuple[str, ...] = ()
    """Parameters that are not trained: regular expressions, searched in names such as
    encoder.blocks.3.self_attention.query.kernel (`heedful inspect --names` lists the names)."""
    layer_decay: float = 1.0
    """Factor of the learning rate from the head to the top layer, and from each layer to the layer
    below it. The embeddings count as the layer below all others (arXiv:2106.08254)."""
    head_lr_multiplier: float = 1.0
    """Factor of the learning rate of the head."""

    @property
    def follows_steps(self) -> bool:
        """Tell if the learning rate of a step depends on `train.steps`."""
        return self.schedule not in ("inverse_sqrt", "constant")

    def __post_init__(self):
        require_choices("train.optimizer", self, TrainError)
        _require_name("train.optimizer.kind", self.kind, OptimizerKind)
        _require_name("train.optimizer.schedule", self.schedule, ScheduleKind)
        require(self.peak_lr > 0, f"train.optimizer.peak_lr must be positive, not {self.peak_lr}")
        require(
            self.warmup_steps >= 0,
            f"train.optimizer.warmup_steps must be at least 0, not {self.warmup_steps}",
        )
        for name in ("b1", "b2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"train.optimizer.{name} must lie in [0, 1), not {value}")
        for name in ("initial_lr", "final_lr", "weight_decay"):
            value = getattr(self, name)
            require(value >= 0, f"train.optimizer.{name} must be at least 0, not {value}")
        require(self.epsilon > 0, f"train.optimizer.epsilon must be positive, not {self.epsilon}")
        require(
            self.kind != "adam" or self.weight_decay == 0,
            f"train.optimizer.weight_decay = {self.weight_decay} needs train.optimizer.kind adamw, "
            f"not {self.kind}: set train.optimizer.kind to adamw, or weight_decay to 0",
        )
        require(
            0 < self.layer_decay <= 1,
            f"train.optimizer.layer_decay must lie in (0, 1], not {self.layer_decay}",
        )
        require(
            self.final_lr == 0 or self.schedule not in ("inverse_sqrt", "constant"),
            f"train.optimizer.final_lr = {self.final_lr} needs train.optimizer.schedule linear or "
            f"cosine, not {self.schedule}: set train.optimizer.final_lr to 0",
        )
        require(
            self.initial_lr == 0 or self.warmup_steps > 0,
            f"train.optimizer.initial_lr = {self.initial_lr} has no effect with "
            "train.optimizer.warmup_steps = 0: set train.optimizer.initial_lr to 0",
        )
        require(
            self.head_lr_multiplier > 0,
            f"train.optimizer.head_lr_multiplier must be positive, not {self.head_lr_multiplier}",
        )
        for pattern in self.freeze:
            _require_pattern("train.optimizer.freeze", pattern)
        require(
            self.clip_norm is None or self.clip_norm > 0,
            f"train.optimizer.clip_norm must be positive or None, not {self.clip_norm}",
        )


@dataclass(frozen=True, kw_only=True, repr=False)
class MeshConfig(Readable):
    """Axes of the device mesh; the product of their sizes must be the number of devices.

    Example:
        >>> import heedful as hf
        >>> hf.MeshConfig(fsdp=4)
        MeshConfig(fsdp=4)
    """

    data: int = -1
    """Number of copies of the model that share a batch; -1: all devices that other axes leave."""
    fsdp: int = 1
    """Number of devices that share a batch, and also split parameters and optimizer state."""
    seq: int = 1
    """Number of devices that split the length of a sequence."""
    tensor: int = 1
    """Number of devices that split heads, feed-forward layers and vocabulary."""

    def __post_init__(self):
        require_choices("train.mesh", self, TrainError)
        for name in ("fsdp", "seq", "tensor"):
            value = getattr(self, name)
            require(value > 0, f"train.mesh.{name} must be positive, not {value}")
        require(
            self.data == -1 or self.data > 0,
            f"train.mesh.data must be positive or -1, not {self.data}",
        )


@dataclass(frozen=True, kw_only=True, repr=False)
class DecodeConfig(Readable):
    """Settings of beam search and sampling.

    Example:
        >>> import heedful as hf
        >>> hf.DecodeConfig(beam=1, temperature=0.8)
        DecodeConfig(beam=1, temperature=0.8)
    """

    beam: int = 4
    """Number of hypotheses of the beam search (num_beams in Hugging Face transformers); 1: greedy
    decoding, or sampling if temperature is above 0."""
    length_penalty: float = 0.6
    """Exponent of the length penalty of the beam search (arXiv:1609.08144 §7)."""
    length_penalty_offset: int = 5
    """Number that the length penalty adds to a length; 0: scores are divided by length^exponent, as
    in fairseq, Marian and Hugging Face transformers."""
    early_stopping: Literal["never", False, True] = "never"
    """Rule that ends a beam search, as in Hugging Face transformers. True: as many hypotheses as
    the beam are finished. False: in addition, no unfinished hypothesis would be better than the
    worst of them if it ended now. never: no unfinished hypothesis can become better than the best
    finished hypothesis. At the length limit, all hypotheses count as finished."""
    extra_length: int = 50
    """Largest difference between the numbers of output tokens and source tokens (arXiv:1706.03762
    §6.1)."""
    temperature: float = 0.0
    """Sampling temperature, for beam 1; 0: no sampling."""
    top_k: int = 0
    """Sample among the k most probable tokens; 0: all tokens."""
    top_p: float = 1.0
    """Sample among the most probable tokens with this total probability (arXiv:1904.09751)."""
    min_p: float = 0.0
    """Sample among the tokens with at least this share of the highest probability of a token
    (arXiv:2407.01082)."""
    repetition_penalty: float = 1.0
    """Number that divides positive scores of tokens that the text has already, and multiplies
    negative scores (arXiv:1909.05858 §4.1). The begin token in front of a text does not count. In a
    beam search, the scores are log-probabilities, as in Hugging Face transformers."""
    never: tuple[int, ...] = ()
    """Ids of tokens that are never generated."""
    special_tokens: bool = False
    """Encode names of special tokens in an input (<|user|>, [MASK]) as these tokens. Otherwise the
    names are encoded as text, as in training."""
    max_tokens: int = 200
    """Largest number of tokens that are generated after a prompt (max_new_tokens in Hugging Face
    transformers). With beam 1, a text may become
    longer than a table of learned positions. Then at least the last three quarters of the table's
    length are context for each token, and are read again after every quarter."""
    stop: tuple[str, ...] = ()
    """Strings that end a generated text; the text ends before the first of them."""
    batch_tokens: int = 4096
    """Largest number of positions (rows x source or prompt length, x beam on a CPU) that are
    decoded at once. A longer source or prompt is an error."""

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
            f"decode.length_penalty must be at most 10, not {self.length_penalty}: larger powers "
            "of long lengths would overflow",
        )
        require(
            self.temperature == 0 or self.temperature >= 1e-6,
            f"decode.temperature must be 0 (greedy decoding) or at least 1e-6, not "
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
            f"decode.never is {' '.join(map(str, self.never))}: give token ids of at least 0",
        )
        require(
            all(self.stop),
            "decode.stop has an empty string, which would end every text at once: leave it out",
        )
        sampling = self.temperature > 0 or self.top_k > 0 or self.top_p < 1 or self.min_p > 0
        require(
            not sampling or (self.beam == 1 and self.temperature > 0),
            "sampling (decode.temperature, top_k, top_p, min_p) needs decode.beam = 1 and "
            f"decode.temperature above 0, not {self.beam} and {self.temperature}",
        )


def require_tokens(decode: DecodeConfig, vocab_size: int) -> None:
    """Raise TrainError if `decode.never` has a token id that the model lacks."""
    beyond = [i for i in decode.never if i >= vocab_size]
    require(
        not beyond,
        f"decode.never has {' '.join(map(str, beyond))}, but model.vocab_size is {vocab_size}: "
        "give smaller token ids",
    )


Metric = Literal["loss", "smoothed_loss", "accuracy", "f1", "matthews", "pearson", "spearman"]


@dataclass(frozen=True, kw_only=True, repr=False)
class TrainConfig(Readable):
    """Settings of a training run.

    Example:
        >>> import heedful as hf
        >>> hf.TrainConfig(steps=100, optimizer=hf.OptimizerConfig(warmup_steps=10))
        TrainConfig(steps=100, optimizer=OptimizerConfig(warmup_steps=10))
    """

    init_from: str | None = None
    """Fine-tune the parameters of a run (its directory), of a Hugging Face model (hf:DIR) or of a
    package (package:minilm, package:stories15m); None: train from random parameters."""
    reinit: tuple[str, ...] = ()
    """Parameters that start with random values although `init_from` has them: regular
    expressions."""

    steps: int = 10_000
    """Number of updates of the parameters."""
    seed: int = 0
    """Random seed of the initial parameters, the dropout and the order of the data."""
    label_smoothing: float = 0.1
    """Share of the target's probability that is spread over the vocabulary (arXiv:1706.03762 §5.4);
    the loss of the training includes it. Set it to 0 for language models and regression."""
    loss_chunk: int | None = None
    """Number of positions of a row whose float32 logits are computed at a time; None: all. A small
    number saves memory, with the same result. An encoder-only model, which predicts a share of the
    tokens, then computes logits only for these tokens, in whole chunks."""
    accumulate: int = 1
    """Number of micro-batches into which a batch is split to save memory; the update stays the
    same."""
    log_every: int = 20
    """Number of steps between two lines of metrics."""
    checkpoint_every: int = 500
    """Number of steps between two checkpoints; each is evaluated on the validation data."""
    checkpoints: str | None = None
    """Location of the checkpoints: a folder, or a bucket (gs://... with the package gcsfs, s3://...
    with s3fs); None: in the run directory."""
    max_checkpoints: int = 5
    """Number of newest checkpoints that are kept. Also kept are the best checkpoint, and, until the
    next checkpoint, the checkpoint of an interruption."""
    average_last: int = 5
    """Number of newest checkpoints whose parameters are averaged for evaluation, generation and
    export (arXiv:1706.03762 §6.1); 1: the best checkpoint is used."""
    metric: Metric = "loss"
    """Metric on the validation data that decides which checkpoint is the best; smoothed_loss is the
    loss with `label_smoothing`, as in training."""
    patience: int | None = None
    """Number of checkpoints without improvement after which training stops; None: it never does."""
    deterministic: bool = True
    """Give the same bits in every run on the same devices. This makes GPUs slower; CPUs and TPUs
    compute the same in any case."""
    fingerprint_every: int = 100
    """Number of steps between two fingerprints of parameters and loss, which heedful reproduce and
    heedful verify compare. Every checkpoint has a fingerprint, too."""
    samples: int = 10
    """Number of translations that are printed at the end."""
    tracker: Literal["wandb", "trackio"] | None = None
    """Experiment tracker that receives config, metrics, pictures and the final result, besides
    metrics.jsonl and TensorBoard events: Weights & Biases (pip install 'heedful[wandb]') or Trackio
    (pip install 'heedful[trackio]'); None: none."""
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
            f"train.reinit = {' '.join(self.reinit)} needs train.init_from: give train.init_from, "
            "or leave train.reinit out",
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
            f"train.steps = {self.steps} for the {optimizer.schedule} decay: give fewer warmup "
            "steps",
        )
        require(
            self.average_last <= self.max_checkpoints,
            f"train.average_last = {self.average_last} is more than train.max_checkpoints = "
            f"{self.max_checkpoints}: raise train.max_checkpoints, or lower train.average_last",
        )


def _require_pattern(name: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise TrainError(
            f"{name} has {pattern!r}, which is no regular expression ({error}): correct it"
        ) from error


def _require_name(field: str, value: str, choices: Any) -> None:
    """Raise TrainError unless the value is one of the choices of a Literal, or an import path."""
    known = get_args(choices)
    require(
        value in known or own_code.is_import_path(value),
        f"{field} must be one of {', '.join(known)}, or an import path, my_package.my_module:NAME, "
        f"not {value}; {did_you_mean(value, known).strip() or 'correct it'}",
    )
