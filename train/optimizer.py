"""Schedules with warmup, and the optimizers that follow them."""

import jax
import jax.numpy as jnp
import optax

from train.config import OptimizerConfig, TrainError


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Step -> rate: a linear warmup to the peak, then what `config.schedule` says.

    inverse_sqrt falls as sqrt(warmup / step), which is arXiv:1706.03762 §5.3 when the peak is
    (width * warmup)^-0.5. linear and cosine reach `final_lr` at `steps`.
    """
    warmup = config.warmup_steps
    if warmup >= steps and config.schedule in ("linear", "cosine"):
        raise TrainError(
            f"optimizer.warmup_steps = {warmup} leaves nothing of train.steps = {steps} for the "
            f"{config.schedule} decay: shorten the warmup"
        )
    if config.schedule == "inverse_sqrt":
        origin = max(warmup, 1)
        # During the warmup it is called with a negative step, and the result is dropped.
        after = lambda step: config.peak_lr * (origin / jnp.maximum(step + origin, 1)) ** 0.5  # noqa: E731
    elif config.schedule == "linear":
        after = optax.linear_schedule(config.peak_lr, config.final_lr, steps - warmup)
    elif config.schedule == "cosine":
        share = config.final_lr / config.peak_lr
        after = optax.cosine_decay_schedule(config.peak_lr, steps - warmup, share)
    else:
        after = optax.constant_schedule(config.peak_lr)
    ramp = optax.linear_schedule(config.initial_lr, config.peak_lr, max(warmup, 1))
    return optax.join_schedules([ramp, after], [warmup]) if warmup else after


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Adam or AdamW; clipping belongs to the step, which knows the norm of the gradient."""
    schedule = learning_rate(config, steps)
    b1, b2, epsilon = config.b1, config.b2, config.epsilon
    if config.kind == "adam":
        return optax.adam(schedule, b1, b2, epsilon)
    return optax.adamw(schedule, b1, b2, epsilon, weight_decay=config.weight_decay, mask=_decayed)


def _decayed(params):
    """True for matrices: not for biases, scales, and tables of embeddings."""
    is_kernel = lambda path, _: jax.tree_util.keystr(path[-1:], simple=True) == "kernel"  # noqa: E731
    return jax.tree_util.tree_map_with_path(is_kernel, params)
