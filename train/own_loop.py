"""Steps for a training loop of one's own: no run, no config of training, no mesh."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from heedful.model.config import ModelConfig
from heedful.train.errors import TrainError, require
from heedful.train.model_loss import Loss, LossOptions
from heedful.train.state import TrainState
from heedful.train.step import random_keys, summed_gradients
from heedful.train.tasks import task_named

Metrics = dict[str, jax.Array]
EvalStep = Callable[[Any, Mapping[str, Any]], Metrics]
TrainStep = Callable[[TrainState, Mapping[str, Any]], tuple[TrainState, Metrics]]


def make_train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    task: str | Loss = "causal_lm",
    *,
    label_smoothing: float = 0.0,
    loss_chunk: int | None = None,
    accumulate: int = 1,
    seed: int = 0,
    donate: bool = False,
) -> TrainStep:
    """Return a function (state, batch) -> (state, metrics), compiled, for a loop of your own.

    The gradient is that of (sum of losses) / (sum of weights) over the whole batch. A batch is a
    dict of arrays [B, T] (B rows, T positions), as `Dataset` makes it: inputs, targets and weights,
    and if wanted segment_ids and positions; for an encoder_decoder also encoder_inputs [B, S].
    Classification and regression have targets and weights [B].
    metrics: loss (mean), weight (sum of weights) and grad_norm, float32 [].

    model: a model of `build`, or, with a loss of your own, any Flax module.
    optimizer: an optax optimizer, with its schedule, clipping and freezing: nothing is frozen
    otherwise, not even with model.lora.
    task: name or import path (my_package.my_task:TASK) of a task with its loss, or a loss: (model,
    params, batch, options) -> (sum of losses, sum of weights, outputs or None); see
    `heedful.train.model_loss.Loss`.
    loss_chunk: positions of a row whose logits are computed at a time, to save memory; None: all.
    accumulate: micro-batches into which a batch is split, to save memory; the update is the same.
    seed: of dropout; the step is added.
    donate: reuse the memory of the old state, which can then not be read any more.

    Raises TrainError for an unknown task and for a task that the model cannot learn; the step
    raises it for arrays that do not fit together.

    Example:
        >>> import jax, optax, heedful as hf
        >>> texts = ["red cat sleeps", "blue bird sings"] * 16
        >>> tokenizer = hf.Tokenizer.train(texts, hf.TokenizerConfig(kind="words"))
        >>> data = hf.Dataset.from_texts(texts, tokenizer, max_length=8, batch_tokens=64)
        >>> model = hf.build(hf.ModelConfig(architecture="decoder_only", width=16, layers=1,
        ...     vocab_size=tokenizer.vocab_size))
        >>> optimizer = optax.adam(1e-2)
        >>> state = hf.TrainState.create(hf.init(model, jax.random.key(0)), optimizer)
        >>> step = hf.make_train_step(model, optimizer, task="causal_lm")
        >>> for batch, _ in zip(data.train_iterator(), range(3)):
        ...     state, metrics = step(state, batch)
        >>> sorted(metrics), int(state.step)
        (['grad_norm', 'loss', 'weight'], 3)
    """
    config, loss = _config(model), _loss(model, task)

    def train_step(state: TrainState, batch: Mapping[str, Any]) -> tuple[TrainState, Metrics]:
        key, features = random_keys(config, seed, state.step)

        def loss_sum(params: Any, batch: Mapping[str, Any], key: jax.Array):
            options = LossOptions(
                chunk=loss_chunk,
                label_smoothing=label_smoothing,
                deterministic=False,
                rngs={"dropout": key} | features,
            )
            return loss(model, params, batch, options)[:2]

        total, weight, grads = summed_gradients(
            loss_sum, state.params, dict(batch), key, accumulate
        )
        count = jnp.maximum(weight, 1.0)
        grads = jax.tree.map(lambda g: g / count, grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": total / count, "weight": weight, "grad_norm": optax.tree.norm(grads)}
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state), metrics  # type: ignore[attr-defined]

    compiled = jax.jit(train_step, donate_argnums=0 if donate else ())

    def step(state: TrainState, batch: Mapping[str, Any]) -> tuple[TrainState, Metrics]:
        if isinstance(task, str):
            require_arrays(batch)
        require_rows(batch, accumulate)
        return compiled(state, dict(batch))

    return step


def make_eval_step(
    model: nn.Module, task: str | Loss = "causal_lm", *, loss_chunk: int | None = None
) -> EvalStep:
    """Return a function (params, batch) -> metrics, compiled, without dropout and smoothing.

    metrics: loss (mean over the batch) and weight (sum of weights), float32 []. The mean over
    several batches is the sum of loss * weight, divided by the sum of the weights. Arguments,
    batches and errors are those of `make_train_step`.

    Example:
        >>> import jax, heedful as hf
        >>> texts = ["red cat sleeps", "blue bird sings"] * 16
        >>> tokenizer = hf.Tokenizer.train(texts, hf.TokenizerConfig(kind="words"))
        >>> data = hf.Dataset.from_texts(texts, tokenizer, max_length=8, batch_tokens=64)
        >>> model = hf.build(hf.ModelConfig(architecture="decoder_only", width=16, layers=1,
        ...     vocab_size=tokenizer.vocab_size))
        >>> step = hf.make_eval_step(model)
        >>> params = hf.init(model, jax.random.key(0))
        >>> measured = [step(params, batch) for batch in data.eval_batches()]
        >>> int(sum(metrics["weight"] for metrics in measured))
        128
    """
    loss = _loss(model, task)

    @jax.jit
    def eval_step(params: Any, batch: Mapping[str, Any]) -> Metrics:
        total, weight, _ = loss(model, params, batch, LossOptions(chunk=loss_chunk))
        return {"loss": total / jnp.maximum(weight, 1.0), "weight": weight}

    def step(params: Any, batch: Mapping[str, Any]) -> Metrics:
        if isinstance(task, str):
            require_arrays(batch)
        return eval_step(params, dict(batch))

    return step


def require_rows(batch: Mapping[str, Any], accumulate: int) -> None:
    """Raise TrainError unless all arrays have one number of rows, which `accumulate` divides."""
    rows = {name: len(array) for name, array in batch.items()}
    require(
        len(set(rows.values())) == 1,
        f"the arrays of the batch have different numbers of rows ({rows}): give the same number",
    )
    count = next(iter(rows.values()))
    require(
        count % accumulate == 0,
        f"the batch has {count} rows, which accumulate = {accumulate} does not divide",
    )


def require_arrays(batch: Mapping[str, Any]) -> None:
    """Raise TrainError for a batch without the arrays of a task, or of shapes that do not fit."""
    missing = [name for name in ("inputs", "targets", "weights") if name not in batch]
    require(
        not missing,
        f"the batch has no {' and no '.join(missing)}: give arrays as Dataset makes them",
    )
    targets = batch["targets"].shape
    require(
        len(targets) == 1 or targets == batch["inputs"].shape,
        f"targets have the shape {targets} and inputs {batch['inputs'].shape}: give one target for "
        "each position, or one for each row",
    )
    require(
        batch["weights"].shape == targets,
        f"weights have the shape {batch['weights'].shape} and targets {targets}: give one weight "
        "for each target",
    )


def _config(model: nn.Module) -> ModelConfig | None:
    """Return the config of a model of `build`; None for other modules."""
    config = getattr(model, "config", None)
    return config if isinstance(config, ModelConfig) else None


def _loss(model: nn.Module, task: str | Loss) -> Loss:
    if not isinstance(task, str):
        return task
    config, spec = _config(model), task_named(task)
    if config is None:
        raise TrainError(
            f"task {task} needs a model of heedful.build, not {type(model).__name__}: give a loss "
            "function in place of the task"
        )
    require(
        spec.fits(config),
        f"task {task} needs model.architecture {' or '.join(spec.architectures)} and "
        f"model.head.kind {spec.head}, not {config.architecture} and {config.head.kind}: change "
        "the task or the model",
    )
    return spec.loss
