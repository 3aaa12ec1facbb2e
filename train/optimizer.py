"""Schedules with warmup, and the optimizers that follow them."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from heedful.train.config import OptimizerConfig

# Of linear maps, of their low-rank updates, and of Linformer along the positions.
MATRICES = ("kernel", "lora_a", "lora_b", "projection", "both", "keys", "values")


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Updates done before -> rate of the next: a linear warmup to the peak, then `config.schedule`.

    With updates counted from n = 1, the warmup has the rate peak n / warmup, and inverse_sqrt then
    falls as sqrt(warmup / n): arXiv:1706.03762 §5.3 when the peak is (width * warmup)^-0.5. With an
    `initial_lr` both are fairseq's: that is the rate of the first update, which counts as n = 0.
    linear and cosine reach `final_lr` when all `steps` are done.
    """
    warmup, first = config.warmup_steps, int(config.initial_lr == 0)
    if config.schedule == "inverse_sqrt":
        # During the warmup it is called with a negative step, and the result is dropped.
        number = lambda step: jnp.maximum(step + warmup + first, 1)  # noqa: E731
        after = lambda step: config.peak_lr * (max(warmup, 1) / number(step)) ** 0.5  # noqa: E731
    elif config.schedule == "linear":
        after = optax.linear_schedule(config.peak_lr, config.final_lr, steps - warmup)
    elif config.schedule == "cosine":
        share = config.final_lr / config.peak_lr
        after = optax.cosine_decay_schedule(config.peak_lr, steps - warmup, share)
    else:
        after = optax.constant_schedule(config.peak_lr)
    if not warmup:
        return after
    ramp = optax.linear_schedule(config.initial_lr, config.peak_lr, warmup)
    return optax.join_schedules([lambda step: ramp(step + first), after], [warmup])


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
