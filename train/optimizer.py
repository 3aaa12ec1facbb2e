"""Schedules with warmup, and the optimizers that follow them."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from heedful import own_code
from heedful.train.config import OptimizerConfig
from heedful.train.errors import TrainError

# Names of matrices: linear maps, their low-rank updates, and Linformer's maps of positions.
MATRICES = ("kernel", "lora_a", "lora_b", "projection", "both", "keys", "values")


def _inverse_sqrt(config: OptimizerConfig, steps: int) -> optax.Schedule:
    warmup, first = config.warmup_steps, int(config.initial_lr == 0)
    # During the warmup the step is negative, and the result is not used.
    number = lambda step: jnp.maximum(step + warmup + first, 1)  # noqa: E731
    return lambda step: config.peak_lr * (max(warmup, 1) / number(step)) ** 0.5


def _linear(config: OptimizerConfig, steps: int) -> optax.Schedule:
    return optax.linear_schedule(config.peak_lr, config.final_lr, steps - config.warmup_steps)


def _cosine(config: OptimizerConfig, steps: int) -> optax.Schedule:
    share = config.final_lr / config.peak_lr
    return optax.cosine_decay_schedule(config.peak_lr, steps - config.warmup_steps, share)


def _constant(config: OptimizerConfig, steps: int) -> optax.Schedule:
    return optax.constant_schedule(config.peak_lr)


SCHEDULES: dict[str, Callable[[OptimizerConfig, int], optax.Schedule]] = {
    "inverse_sqrt": _inverse_sqrt,
    "linear": _linear,
    "cosine": _cosine,
    "constant": _constant,
}
"""(config, steps) -> schedule: learning rate by the number of updates after the warmup."""


def _adam(config: OptimizerConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    return optax.adam(rate, **_moments(config))


def _adamw(config: OptimizerConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    decay = config.weight_decay
    return optax.adamw(rate, weight_decay=decay, mask=_decayed, **_moments(config))


OPTIMIZERS: dict[str, Callable[[OptimizerConfig, optax.Schedule], optax.GradientTransformation]] = {
    "adam": _adam,
    "adamw": _adamw,
}

OPTIMIZER_FORM = (
    "give a function (OptimizerConfig, rate) that returns an optax.GradientTransformation, or an "
    "optimizer of optax"
)
SCHEDULE_FORM = (
    "give a function (OptimizerConfig, steps) that returns a schedule, a function from the number "
    "of updates after the warmup to the learning rate"
)


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Return the schedule: learning rate by the number of earlier updates.

    A linear warmup to `peak_lr` is followed by `config.schedule`. In update n = 1, 2, ..., the
    warmup has the rate peak_lr * n / warmup_steps, and inverse_sqrt then has peak_lr *
    sqrt(warmup_steps / n): this is arXiv:1706.03762 §5.3 if peak_lr is (width * warmup_steps)^-0.5.
    With an `initial_lr`, both are as in fairseq: `initial_lr` is the rate of the first update,
    which counts as n = 0. linear and cosine reach `final_lr` after all `steps`. Raises TrainError
    if the import path of a schedule does not name a schedule.
    """
    warmup, first = config.warmup_steps, int(config.initial_lr == 0)
    after = (SCHEDULES.get(config.schedule) or _own_schedule)(config, steps)
    if not warmup:
        return after
    ramp = optax.linear_schedule(config.initial_lr, config.peak_lr, warmup)
    return optax.join_schedules([lambda step: ramp(step + first), after], [warmup])


def make_optimizer(
    config: OptimizerConfig, steps: int, factors: Any = None
) -> optax.GradientTransformation:
    """Return the optimizer of the trainable parameters for a run of `steps` steps.

    It does not clip: the train step does. `factors` (see `trainable.rate_factors`) has a factor of
    the learning rate for each parameter; parameters with factor 0 are frozen. None: all are 1.
    Raises TrainError if the import path of an optimizer does not name an optimizer.
    """
    optimizer = (OPTIMIZERS.get(config.kind) or _own_optimizer)(
        config, learning_rate(config, steps)
    )
    if factors is None or all(
        isinstance(f, float) and f in (0, 1) for f in jax.tree.leaves(factors)
    ):
        return optimizer
    # An update, weight decay included, is proportional to the learning rate.
    scale = optax.stateless(
        lambda updates, _: jax.tree.map(
            lambda u, f: None if u is None else u * f, updates, factors, is_leaf=lambda x: x is None
        )
    )
    return optax.chain(optimizer, scale)


def _own_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Return the schedule that the function at an import path returns; try its first value."""
    path = f"train.optimizer.schedule = {config.schedule}"
    make: Any = own_code.resolve(config.schedule, "train.optimizer.schedule", Callable, TrainError)  # type: ignore[arg-type]
    try:
        schedule = own_code.call(make, config, steps)
        first = own_code.call(schedule, jnp.int32(0))
    except own_code.NotUsable as error:
        raise TrainError(f"{path}: {error}; {SCHEDULE_FORM}") from error
    try:
        jnp.asarray(first, jnp.float32).reshape(())
    except (TypeError, ValueError) as error:
        problem = f"gives {first!r} as the first learning rate"
        raise TrainError(f"{path} {problem}; {SCHEDULE_FORM}") from error
    return schedule


def _own_optimizer(config: OptimizerConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    """Return the optimizer at an import path: a function (config, rate), or one of optax's form.

    A function of optax's form has `learning_rate` as its first argument. Its arguments b1, b2, eps,
    mu_dtype, weight_decay and mask get the values of the config; others keep their defaults.
    """
    path = f"train.optimizer.kind = {config.kind}"
    make: Any = own_code.resolve(config.kind, "train.optimizer.kind", Callable, TrainError)  # type: ignore[arg-type]
    try:
        names = [*inspect.signature(make).parameters]
    except (TypeError, ValueError):  # A builtin.
        names = []
    arguments, settings = (config, rate), {}
    if names[:1] == ["learning_rate"]:
        arguments, settings = (rate,), _settings_of_optax(config, names)
    try:
        optimizer = own_code.call(partial(make, *arguments, **settings))
    except own_code.NotUsable as error:
        raise TrainError(f"{path}: {error}; {OPTIMIZER_FORM}") from error
    if not isinstance(optimizer, optax.GradientTransformation):
        raise TrainError(f"{path} returns a {type(optimizer).__name__}; {OPTIMIZER_FORM}")
    return optimizer


def _settings_of_optax(config: OptimizerConfig, names: list[str]) -> dict[str, Any]:
    """Return the arguments among `names` for an optimizer of optax.

    Raises TrainError for a changed setting of the config that the optimizer does not take.
    """
    taken = {"b1": "b1", "b2": "b2", "epsilon": "eps", "first_moment": "mu_dtype"}
    values = _moments(config)
    if config.weight_decay or {"weight_decay", "mask"} <= set(names):
        taken |= {"weight_decay": "weight_decay"}
        values |= {"weight_decay": config.weight_decay, "mask": _decayed}
    for field, name in taken.items():
        wanted = {name, "mask"} if name == "weight_decay" else {name}
        value, default = getattr(config, field), getattr(OptimizerConfig, field)
        if value != default and not wanted <= set(names):
            raise TrainError(
                f"train.optimizer.{field} = {value} has no effect with train.optimizer.kind = "
                f"{config.kind}, which takes no {' and '.join(sorted(wanted))}: set "
                f"train.optimizer.{field} to {default}, or write a function (OptimizerConfig, rate)"
            )
    return {name: value for name, value in values.items() if name in names}


def _moments(config: OptimizerConfig) -> dict[str, Any]:
    moments: dict[str, Any] = {"b1": config.b1, "b2": config.b2, "eps": config.epsilon}
    if config.first_moment != "float32":
        moments["mu_dtype"] = config.first_moment
    return moments


def _decayed(params):
    """Return a tree that is True for matrices, not for biases, scales and embedding tables."""
    is_matrix = lambda path, _: jax.tree_util.keystr(path[-1:], simple=True) in MATRICES  # noqa: E731
    return jax.tree_util.tree_map_with_path(is_matrix, params)
