"""Tasks: what training, evaluation and commands need to know of each objective.

The rows of an objective stand in `data.objectives`. A new task is an entry in both tables, and a
loss if it has one of its own.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from heedful.data.config import DataConfig
from heedful.data.objectives import OBJECTIVES, Objective
from heedful.data.pipeline import Dataset
from heedful.model.config import ModelConfig
from heedful.train.evaluation import baselines, scores
from heedful.train.model_loss import (
    Loss,
    classification_loss,
    language_model_loss,
    regression_loss,
)


def nats_per_token(loss: float, dataset: Dataset) -> list[str]:
    """Describe a loss by tokens in lines for people."""
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return [f"loss: {loss:.4f} nats per token (perplexity {perplexity:.2f})"]


def bits_per_character(loss: float, dataset: Dataset) -> list[str]:
    """Describe a loss by tokens, of which each stands for its part of the text."""
    bits = loss * dataset.target_count / dataset.characters / math.log(2)
    return [*nats_per_token(loss, dataset), f"bits per character: {bits:.4f}"]


def nats_per_example(loss: float, dataset: Dataset) -> list[str]:
    """Describe a loss by examples in lines for people."""
    return [f"loss: {loss:.4f} nats per example"]


def squared_error(loss: float, dataset: Dataset) -> list[str]:
    """Describe the loss of a regression in lines for people."""
    return [f"mean squared error: {loss:.4f}"]


@dataclass(frozen=True, kw_only=True)
class Task:
    """An objective with its loss, the models that learn it, what is measured, and its use."""

    objective: Objective
    architectures: tuple[str, ...]
    """Values of model.architecture that learn it."""
    head: Literal["language_model", "classifier"] = "language_model"
    """Value of model.head.kind that it needs."""
    outputs: Callable[[DataConfig], int] | None = None
    """Value of model.head.outputs that the data ask for; None: what the config says."""
    loss: Loss = language_model_loss
    scores: Callable[..., dict[str, float]] | None = None
    """Scores, from the outputs of the loss without padding rows, as keywords [E, ...]."""
    metrics: tuple[str, ...] = ("loss", "smoothed_loss")
    """Values of train.metric that exist, for the choice of the best checkpoint."""
    baseline: Callable[[Dataset], float] | None = baselines.target_entropy
    """Loss of a guess without any input; None: there is none."""
    describe: Callable[[float, Dataset], list[str]] = nats_per_token
    """Lines for people about the mean loss."""
    has_stride: bool = False
    """Documents can be measured in windows that overlap."""
    use: Literal["translate", "generate", "classify"] | None = None
    """The command that uses its models. Translations of the test data are part of a training."""
    default_source: str | None = None
    """Value of data.source for the measurement of models that were imported."""

    def fits(self, model: ModelConfig) -> bool:
        """Tell if a model can learn it."""
        return model.architecture in self.architectures and model.head.kind == self.head


TASKS: dict[str, Task] = {
    "causal_lm": Task(
        objective=OBJECTIVES["causal_lm"],
        architectures=("decoder_only",),
        describe=bits_per_character,
        has_stride=True,
        use="generate",
        default_source="shakespeare",
    ),
    "masked_lm": Task(
        objective=OBJECTIVES["masked_lm"],
        architectures=("encoder_only",),
        default_source="shakespeare",
    ),
    "prefix_lm": Task(
        objective=OBJECTIVES["prefix_lm"], architectures=("decoder_only",), use="generate"
    ),
    "span_corruption": Task(
        objective=OBJECTIVES["span_corruption"], architectures=("encoder_decoder",)
    ),
    "translation": Task(
        objective=OBJECTIVES["translation"],
        architectures=("encoder_decoder",),
        use="translate",
        default_source="homeassistant",
    ),
    "classification": Task(
        objective=OBJECTIVES["classification"],
        architectures=("encoder_only", "decoder_only"),
        head="classifier",
        outputs=lambda data: len(data.classes),
        loss=classification_loss,
        scores=scores.classification,
        metrics=("loss", "smoothed_loss", "accuracy", "f1", "matthews"),
        describe=nats_per_example,
        use="classify",
        default_source="sentiment",
    ),
    "regression": Task(
        objective=OBJECTIVES["regression"],
        architectures=("encoder_only", "decoder_only"),
        head="classifier",
        outputs=lambda data: 1,
        loss=regression_loss,
        scores=scores.regression,
        metrics=("loss", "pearson", "spearman"),
        baseline=baselines.target_variance,
        describe=squared_error,
        use="classify",
        default_source="sentiment",
    ),
}


def task_of(data: DataConfig) -> Task:
    """Return the task of the config's objective."""
    return TASKS[data.objective]
