"""Losses of a model on a batch: the forward pass, a sum of losses and a sum of weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import flax.linen as nn
import jax

from heedful.model.config import ModelConfig
from heedful.train.loss import cross_entropy, cross_entropy_in_chunks, squared_error

Batch = Mapping[str, Any]
Outputs = dict[str, jax.Array]
LossSums = tuple[jax.Array, jax.Array, Outputs | None]


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """Settings of a loss. The defaults are for evaluation: no dropout, no label smoothing."""

    chunk: int | None = None
    """Number of positions of a row whose logits are computed at a time; None: all."""
    label_smoothing: float = 0.0
    deterministic: bool = True
    """True: without dropout."""
    rngs: Mapping[str, jax.Array] | None = None
    """Random keys of the model, by their names in flax."""


@runtime_checkable
class Loss(Protocol):
    """Loss of an objective; `train.tasks` names the loss of each objective."""

    def __call__(
        self, model: nn.Module, params: Any, batch: Batch, options: LossOptions
    ) -> LossSums:
        """Return (sum of losses, sum of weights, outputs), the sums in float32.

        Training minimises the sum of losses divided by the sum of weights, both over a whole batch.
        `outputs` has the arrays [B, ...] (B rows) that `Task.scores` takes by name, and `weights`
        [B], which are 0 for rows of padding; None: the task has no scores.
        """
        ...


def language_model_loss(
    model: nn.Module, params: Any, batch: Batch, options: LossOptions
) -> LossSums:
    """Return the cross-entropy of the target tokens, in nats."""
    targets, weights, chunk = batch["targets"], batch["weights"], options.chunk
    if chunk is None or targets.shape[1] <= chunk:
        logits = forward(model, params, batch, options)
        return *cross_entropy(logits, targets, weights, options.label_smoothing), None
    hidden = forward(model, params, batch, options, return_logits=False)
    of_head = {name: params[name] for name in ("embedding", "head") if name in params}

    def score(params: Any, x: jax.Array) -> jax.Array:
        return model.apply({"params": params}, x, method="score")  # type: ignore[return-value]

    # An encoder-only model predicts only a share of the tokens: skip chunks without targets.
    skips = model.config.architecture == "encoder_only"  # type: ignore[attr-defined]
    sums = cross_entropy_in_chunks(
        score, of_head, hidden, targets, weights, chunk, options.label_smoothing, skips=skips
    )
    return *sums, None


def classification_loss(
    model: nn.Module, params: Any, batch: Batch, options: LossOptions
) -> LossSums:
    """Return the cross-entropy of the class of each row, in nats."""
    outputs = forward(model, params, batch, options)
    targets, weights = batch["targets"], batch["weights"]
    sums = cross_entropy(outputs, targets, weights, options.label_smoothing)
    return *sums, {"outputs": outputs, "targets": targets, "weights": weights}


def regression_loss(model: nn.Module, params: Any, batch: Batch, options: LossOptions) -> LossSums:
    """Return the squared error of the predicted number of each row."""
    outputs = forward(model, params, batch, options)
    targets, weights = batch["targets"], batch["weights"]
    sums = squared_error(outputs, targets, weights)
    return *sums, {"outputs": outputs, "targets": targets, "weights": weights}


def forward(
    model: nn.Module, params: Any, batch: Batch, options: LossOptions, **call: Any
) -> jax.Array:
    """Return the outputs of the model on a batch; `call` has further arguments of the model."""
    call |= {"deterministic": options.deterministic, "rngs": options.rngs}
    inputs = model_inputs(model.config, batch)  # type: ignore[attr-defined]
    return model.apply({"params": params}, **inputs, **call)  # type: ignore[return-value]


def model_inputs(config: ModelConfig, batch: Batch) -> dict[str, Any]:
    """Return the arrays of a batch that the model reads.

    A model without type embeddings does not read `type_ids`: an end token separates the two texts.
    """
    unread = ["targets", "weights", *([] if config.type_vocab_size else ["type_ids"])]
    return {name: x for name, x in batch.items() if name not in unread}
