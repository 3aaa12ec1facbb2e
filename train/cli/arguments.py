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
    """Resume from the checkpoint before when the newest is corrupt."""
    audit: bool = True
    """Audit the masks of a small model before the first step (see heedful masks)."""


@dataclass(frozen=True, kw_only=True)
class LoadArguments:
    """Choose the parameters of a run."""

    checkpoint: str | None = None
    """average (of the newest train.average_last), last, best, or a step; None: the average where
    the run averages, else the best."""
    fallback: bool = False
    """Leave corrupt checkpoints out, and say so, instead of stopping."""


@dataclass(frozen=True, kw_only=True)
class ClassifyArguments(LoadArguments):
    """Name the classes of texts."""

    tab: Literal["trained", "pair", "text"] = "trained"
    """Meaning of a tab: it stands between the two texts of a pair, or is a part of the text;
    trained: its meaning in the training data."""


@dataclass(frozen=True, kw_only=True)
class DecodeArguments(LoadArguments):
    """Measure a run, or write with it."""

    seed: int = 0
    """Seed of the sampling, with decode.temperature."""
    decode: DecodeConfig = field(default_factory=DecodeConfig)


@dataclass(frozen=True, kw_only=True)
class EvaluateArguments(DecodeArguments):
    """Measure a run."""

    stride: int | None = None
    """For causal_lm: read long documents in windows of data.max_length that move by so many tokens,
    so that each token is predicted from as many before it; None: pieces side by side."""
    other_data: bool = False
    """Measure on data that have changed since the training: the scores are of other texts."""


@dataclass(frozen=True, kw_only=True)
class AttentionArguments(LoadArguments):
    """Draw the attention weights of a layer, of each head or of their mean."""

    target: str | None = None
    """A second text: what the decoder reads, by default the model's own output; for prefix_lm what
    follows the prefix; for classification and regression the second text of a pair."""
    which: Literal["self", "cross", "encoder"] | None = None
    """self: of the decoder, or of the only stack, to itself; cross: of the decoder to the source;
    encoder: of the encoder to itself. None: cross where the model has it, else self."""
    layer: int | None = None
    """Layer, from 1; None: the last."""
    mean: bool = False
    """Draw the mean over the heads instead of each head."""
    output: Path | None = None
    """PNG to write; None: one in the run directory, named after attention and layer."""


@dataclass(frozen=True, kw_only=True)
class InspectArguments:
    """Parameters, memory, arithmetic and masks of an experiment or of a run."""

    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    length: int | None = None
    """Tokens per row for the arithmetic of attention; None: data.max_length."""
    names: bool = False
    """List every parameter with its shape, and whether it trains."""


@dataclass(frozen=True, kw_only=True)
class MasksArguments(LoadArguments):
    """Draw the masks of a run and audit them, with its parameters."""

    length: int | None = None
    """Positions of a row; None: 16. Longer ones show wide windows and blocks of keys."""
    cores: bool = False
    """Audit every attention core that can run the model, not only its own."""
    output: Path | None = None
    """PNG to write; None: masks.png in the run directory, or CONFIG.masks.png here."""


@dataclass(frozen=True, kw_only=True)
class ConfigMasksArguments:
    """Draw the masks of an experiment and audit them, on a small model with random parameters."""

    model: ModelConfig
    data: DataConfig
    length: int | None = None
    """Positions of a row; None: 16. Longer ones show wide windows and blocks of keys."""
    cores: bool = False
    """Audit every attention core that can run the model, not only its own."""
    output: Path | None = None
    """PNG to write; None: CONFIG.masks.png here."""


@dataclass(frozen=True, kw_only=True)
class PlanArguments:
    """Memory and time of a training step on chips that need not be there, from their compiler."""

    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    topology: str | None = None
    """Chips to plan for, such as v5e:16x16 or v5p:8x8x8; None: the devices of this machine."""
    search: bool = False
    """Compile other meshes and model.remat too, and rank those that fit."""
    compiles: int = 8
    """Most layouts that --search compiles, the likeliest first."""


@dataclass(frozen=True, kw_only=True)
class ReproduceArguments:
    """Train a run again from its record, and compare every fingerprint."""

    steps: int | None = None
    """Stop after so many steps; None: at the last fingerprint of the run."""
    run_dir: Path | None = None
    """Directory of the new run; None: a temporary one, which is deleted."""


@dataclass(frozen=True, kw_only=True)
class VerifyArguments:
    """Train on from a checkpoint of a run, and compare with what the run has recorded."""

    checkpoint: int | None = None
    """Step of the checkpoint; None: the newest that the run went on from."""
    steps: int | None = None
    """Train for so many steps; None: as many as lie between two checkpoints."""
    run_dir: Path | None = None
    """Directory of the new run; None: a temporary one, which is deleted."""


@dataclass(frozen=True, kw_only=True)
class ImportArguments:
    """Make a run of a Hugging Face model, to be used and fine-tuned like any other."""

    run_dir: Path
    """Directory of the new run."""
    data: DataConfig
    decode: DecodeConfig = field(default_factory=lambda: DecodeConfig(beam=1))
