"""Schedules with warmup, and the optimizers that follow them."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from train.config import OptimizerConfig

# Of linear maps, of their low-rank updates, and of Linformer along the positions.
MATRICES = ("kernel", "lora_a", "lora_b", "projection", "both", "keys", "values")


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Step -> rate: a linear warmup to the peak, then what `config.schedule` says.

    inverse_sqrt falls as sqrt(warmup / step), which is arXiv:1706.03762 §5.3 when the peak is
    (width * warmup)^-0.5. linear and cosine reach `final_lr` at `steps`.
    """
    warmup = config.warmup_steps
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


def make_optimizer(
    config: OptimizerConfig, steps: int, factors: Any = None
) -> optax.GradientTransformation:
    """Adam or AdamW for the parameters that train; clipping belongs to the step.

    `factors` multiply the rate by parameter (`trainable.rate_factors`); those of 0 are frozen.
    """
    schedule = learning_rate(config, steps)
    how: dict[str, Any] = {"b1": config.b1, "b2": config.b2, "eps": config.epsilon}
    if config.first_moment != "float32":
        how["mu_dtype"] = config.first_moment
    if config.kind == "adam":
        optimizer = optax.adam(schedule, **how)
    else:
        decay = config.weight_decay
        optimizer = optax.adamw(schedule, weight_decay=decay, mask=_decayed, **how)
    if factors is None or all(
        isinstance(f, float) and f in (0, 1) for f in jax.tree.leaves(factors)
    ):
        return optimizer
    # An update, the decay included, is proportional to the rate.
    scale = optax.stateless(
        lambda updates, _: jax.tree.map(
            lambda u, f: None if u is None else u * f, updates, factors, is_leaf=lambda x: x is None
        )
    )
    return optax.chain(optimizer, scale)


def _decayed(params):
    """True for matrices: not for biases, scales, and tables of embeddings."""
    is_matrix = lambda path, _: jax.tree_util.keystr(path[-1:], simple=True) in MATRICES  # noqa: E731
    return jax.tree_util.tree_map_with_path(is_matrix, params)
