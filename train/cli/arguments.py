"""Flags of each command, as dataclasses whose field docstrings are the help."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from heedful.data.config import DataConfig
from heedful.model.config import ModelConfig
from heedful.train.config import DecodeConfig, TrainConfig


@dataclass(frozen=True, kw_only=True)
class TrainArguments:
    """Train an experiment; the same command again resumes it."""

    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    run_dir: Path
    """Directory of the run."""
    fallback: bool = False
    """Resume from an earlier checkpoint if the newest is corrupt."""
    audit: bool = True
    """Audit the masks of a small model before the first step (see heedful masks)."""


@dataclass(frozen=True, kw_only=True)
class ConfigsArguments:
    """Describe an experiment."""

    json: bool = False
    """Print all settings as JSON, which --config reads."""


@dataclass(frozen=True, kw_only=True)
class LoadArguments:
    """Choose the parameters of a run."""

    checkpoint: str | None = None
    """average (of the newest train.average_last checkpoints), last, best, or a step; None: average
    if train.average_last of the run is above 1, else best."""
    fallback: bool = False
    """Skip corrupt checkpoints with a message, instead of stopping with an error."""


@dataclass(frozen=True, kw_only=True)
class ClassifyArguments(LoadArguments):
    """Name the classes of texts."""

    tab: Literal["trained", "pair", "text"] = "trained"
    """Meaning of a tab in a line. pair: it separates the two texts of a pair; text: it is a part of
    the text; trained: as in the training data."""


@dataclass(frozen=True, kw_only=True)
class DecodeArguments(LoadArguments):
    """Translate or continue texts with a run."""

    seed: int = 0
    """Random seed of sampling; it has an effect only if decode.temperature is above 0."""
    decode: DecodeConfig = field(default_factory=DecodeConfig)


@dataclass(frozen=True, kw_only=True)
class EvaluateArguments(DecodeArguments):
    """Measure loss and scores of a run on validation and test data."""

    stride: int | None = None
    """For causal_lm: read long documents in windows of data.max_length tokens, which move by this
    number of tokens; only the new tokens of a window are predicted, so that they have a long
    context. None: windows do not overlap."""
    other_data: bool = False
    """Evaluate although the data differ from those of the training run, instead of stopping with an
    error."""


@dataclass(frozen=True, kw_only=True)
class AttentionArguments(LoadArguments):
    """Draw the attention weights of a layer, of each head or of their mean."""

    target: str | None = None
    """Second text. Encoder-decoder: the input of the decoder (None: the model's own output);
    prefix_lm: the text after the prefix; classification and regression: the second text of a
    pair."""
    which: Literal["self", "cross", "encoder"] | None = None
    """Attention to draw. self: self-attention of the decoder, or of the only stack; cross: from the
    decoder to the source; encoder: self-attention of the encoder. None: cross if the model has it,
    else self."""
    layer: int | None = None
    """Number of the layer, from 1; None: the last layer."""
    mean: bool = False
    """Draw the mean over the heads instead of each head."""
    output: Path | None = None
    """PNG file to write; None: a file in the run directory, named after attention, layer and
    text."""


@dataclass(frozen=True, kw_only=True)
class PlotArguments:
    """Draw the curves of runs: loss, learning rate, gradient norm and throughput."""

    output: Path | None = None
    """PNG file to write; None: for plot, plot.png in the run; for compare, compare.RUN.RUN.png in
    the current directory."""


@dataclass(frozen=True, kw_only=True)
class InspectArguments:
    """Show parameters, memory, FLOPs and masks of an experiment or of a run."""

    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    length: int | None = None
    """Number of tokens per row for the FLOPs of attention; None: data.max_length."""
    names: bool = False
    """List every parameter with its shape and the factor of its learning rate (frozen: 0)."""


@dataclass(frozen=True, kw_only=True)
class MasksArguments(LoadArguments):
    """Draw and audit the masks of a run, with the parameters of the run."""

    length: int | None = None
    """Number of positions of a row; None: 16. Longer rows show wide windows and blocks of keys."""
    cores: bool = False
    """Audit every attention core that can run the model, not only the core of the run."""
    output: Path | None = None
    """PNG file to write; None: masks.png in the run directory."""


@dataclass(frozen=True, kw_only=True)
class ConfigMasksArguments:
    """Draw and audit the masks of an experiment, in a small model with random parameters."""

    model: ModelConfig
    data: DataConfig
    length: int | None = None
    """Number of positions of a row; None: 16. Longer rows show wide windows and blocks of keys."""
    cores: bool = False
    """Audit every attention core that can run the model, not only the core of the config."""
    output: Path | None = None
    """PNG file to write; None: CONFIG.masks.png in the current directory."""


@dataclass(frozen=True, kw_only=True)
class PlanArguments:
    """Compile a train step, also for chips that are not present; estimate its memory and time."""

    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    topology: str | None = None
    """Chips to plan for, such as v5e:16x16 or v5p:8x8x8; None: the devices of this machine."""
    search: bool = False
    """Also compile other meshes and values of model.remat, and rank the layouts that fit."""
    compiles: int = 8
    """Largest number of layouts that --search compiles, the most promising first."""


@dataclass(frozen=True, kw_only=True)
class ReproduceArguments:
    """Train a run again from the start, and compare every fingerprint with the record."""

    steps: int | None = None
    """Number of steps to train; None: up to the last fingerprint of the run."""
    run_dir: Path | None = None
    """Directory of the new run; None: a temporary directory, which is deleted."""


@dataclass(frozen=True, kw_only=True)
class VerifyArguments:
    """Train from a checkpoint of a run, and compare every fingerprint with the record."""

    checkpoint: int | None = None
    """Step of the checkpoint; None: the last checkpoint before the last fingerprint of the run."""
    steps: int | None = None
    """Number of steps to train; None: train.checkpoint_every of the run."""
    run_dir: Path | None = None
    """Directory of the new run; None: a temporary directory, which is deleted."""


@dataclass(frozen=True, kw_only=True)
class ImportArguments:
    """Convert a Hugging Face model to a run, to use and fine-tune it like any other run."""

    run_dir: Path
    """Directory of the new run."""
    data: DataConfig
    decode: DecodeConfig = field(default_factory=lambda: DecodeConfig(beam=1))
