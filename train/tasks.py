"""Tasks: loss, models, metrics and command of each objective.

The rows of an objective are defined in `data.objectives`. A new task needs an entry in both tables,
and a loss, if no existing loss fits. A task of your own needs no entry: data.objective also takes
its import path, my_package.my_task:TASK.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from heedful import own_code
from heedful.data.config import DataConfig
from heedful.data.objectives import OBJECTIVES, Objective
from heedful.data.pipeline import Dataset
from heedful.model.config import ModelConfig
from heedful.names import did_you_mean
from heedful.train.errors import TrainError
from heedful.train.evaluation import baselines, scores
from heedful.train.model_loss import (
    Loss,
    classification_loss,
    language_model_loss,
    regression_loss,
)


def nats_per_token(loss: float, dataset: Dataset) -> list[str]:
    """Describe a mean loss per token in lines for people."""
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return [f"loss: {loss:.4f} nats per token (perplexity {perplexity:.2f})"]


def bits_per_character(loss: float, dataset: Dataset) -> list[str]:
    """Describe a mean loss per token in lines for people, also in bits per character."""
    bits = loss * dataset.target_count / dataset.characters / math.log(2)
    return [*nats_per_token(loss, dataset), f"bits per character: {bits:.4f}"]


def nats_per_example(loss: float, dataset: Dataset) -> list[str]:
    """Describe a mean loss per example in lines for people."""
    return [f"loss: {loss:.4f} nats per example"]


def squared_error(loss: float, dataset: Dataset) -> list[str]:
    """Describe the loss of a regression in lines for people."""
    return [f"mean squared error: {loss:.4f}"]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task: an objective with its loss, models, metrics and command.

    Example:
        >>> import dataclasses, heedful as hf
        >>> from heedful.train.tasks import TASKS
        >>> task = dataclasses.replace(TASKS["causal_lm"], metrics=("loss",))
        >>> isinstance(task, hf.Task), task.use
        (True, 'generate')
    """

    objective: Objective
    architectures: tuple[str, ...]
    """Values of model.architecture that can learn this task."""
    head: Literal["language_model", "classifier"] = "language_model"
    """Value of model.head.kind that this task needs."""
    outputs: Callable[[DataConfig], int] | None = None
    """Function that returns model.head.outputs for the data; None: the config decides."""
    loss: Loss = language_model_loss
    scores: Callable[..., dict[str, float]] | None = None
    """Function that returns scores; its keyword arguments are the outputs of the loss, [examples,
    ...] without rows of padding. None: the task has no scores."""
    metrics: tuple[str, ...] = ("loss", "smoothed_loss")
    """Values of train.metric that this task has."""
    baseline: Callable[[Dataset], float] | None = baselines.target_entropy
    """Function that returns the loss of a guess without any input; None: there is no baseline."""
    describe: Callable[[float, Dataset], list[str]] = nats_per_token
    """Function that describes the mean loss in lines for people."""
    has_stride: bool = False
    """True if documents can be evaluated in overlapping windows."""
    use: Literal["translate", "generate", "classify"] | None = None
    """Command that uses a trained model; None: no command. With `translate`, a training run ends by
    translating the test data."""
    default_source: str | None = None
    """Value of data.source to evaluate an imported model; None: imports do not get this task."""

    def fits(self, model: ModelConfig) -> bool:
        """Return True if this task can be learned by a model with this architecture and head.kind.

        Other settings of the model are not checked.
        """
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
    """Return the task that data.objective names; raise TrainError for an Objective alone."""
    return task_named(data.objective, "data.objective")


def task_named(name: str, field: str = "task") -> Task:
    """Return the task with this name or import path, the value of `field`.

    Raises TrainError for an unknown name and for an import path without a Task.
    """
    if name in TASKS:
        return TASKS[name]
    if own_code.is_import_path(name):
        return own_code.resolve(name, field, Task, TrainError)
    raise TrainError(
        f"unknown {field} '{name}': {did_you_mean(name, TASKS)}choose one of {', '.join(TASKS)}, "
        "or an import path, my_package.my_task:TASK"
    )
