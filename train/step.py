"""The train step and the eval step, as compiled functions."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from heedful.model.attention import FEATURES, redraw_steps
from heedful.model.config import ModelConfig
from heedful.model.transformer import build
from heedful.train.config import TrainConfig
from heedful.train.model_loss import Loss, LossOptions, Outputs
from heedful.train.optimizer import learning_rate
from heedful.train.sharding import flax_rules, replicated
from heedful.train.state import Setup, TrainState
from heedful.train.trainable import join, split

Batch = dict[str, jax.Array]
Metrics = dict[str, Any]


def make_train_step(
    model_config: ModelConfig,
    config: TrainConfig,
    setup: Setup,
    loss: Loss,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Return (state, batch) -> (state, metrics), jitted; the old state is donated, so not usable.

    The gradient is that of (sum of losses) / (sum of weights) over the whole batch, independent of
    its division into micro-batches and over devices. Parameters whose `factors` are 0 are frozen.
    Metrics: `loss` (sum), `weight` (sum), `lr`, `grad_norm` (before clipping), and `grad_norms` and
    `param_norms` by parameter and layer.
    """
    model, factors = build(model_config), setup.factors
    schedule = learning_rate(config.optimizer, config.steps)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        trainable, frozen = split(state.params, factors)

        def loss_sum(trainable: Any, batch: Batch, key: jax.Array):
            options = LossOptions(
                chunk=config.loss_chunk,
                label_smoothing=config.label_smoothing,
                deterministic=False,
                rngs={"dropout": key} | features,
            )
            return loss(model, join(trainable, frozen), batch, options)[:2]

        # The rules are not part of jit's cache key: enter them inside the traced function.
        with nn.logical_axis_rules(flax_rules()):
            key, features = random_keys(model_config, config.seed, state.step)
            total, weight, grads = summed_gradients(
                loss_sum, trainable, batch, key, config.accumulate
            )
        # In an array of stacked layers, the gradients of frozen layers do not count in the norm.
        grads = jax.tree.map(
            lambda g, f: g if g is None or isinstance(f, float) else g * (f != 0),
            grads,
            factors,
            is_leaf=lambda x: x is None,
        )
        scale = 1.0 / jnp.maximum(weight, 1.0)
        grad_norms = jax.tree_util.tree_map_with_path(_norms, grads)
        grad_norm = optax.tree.norm(grad_norms) * scale
        if config.optimizer.clip_norm is not None:
            scale *= jnp.minimum(1.0, config.optimizer.clip_norm / jnp.maximum(grad_norm, 1e-30))
        grads = jax.tree.map(lambda g: g * scale, grads)
        updates, opt_state = setup.optimizer.update(grads, state.opt_state, trainable)
        params = join(optax.apply_updates(trainable, updates), frozen)
        metrics = {
            "loss": total,
            "weight": weight,
            "lr": schedule(state.step),
            "grad_norm": grad_norm,
            "grad_norms": jax.tree.map(lambda x: x / jnp.maximum(weight, 1.0), grad_norms),
            "param_norms": jax.tree_util.tree_map_with_path(_norms, trainable),
        }
        return TrainState(state.step + 1, params, opt_state), metrics

    shardings = jax.tree.map(lambda x: x.sharding, setup.abstract)
    return jax.jit(
        train_step,
        donate_argnums=0,
        out_shardings=(shardings, replicated(setup.mesh)),
        compiler_options=compiler_options(setup.mesh, model_config.width, config.deterministic),
    )


def make_eval_step(
    model_config: ModelConfig,
    mesh: Mesh,
    loss: Loss,
    loss_chunk: int | None = None,
    deterministic: bool = False,
    label_smoothing: float | None = None,
) -> Callable[[Any, Batch], tuple[dict[str, jax.Array], jax.Array, Outputs | None]]:
    """Return (params, batch) -> (sums of losses, sum of weights, outputs of the loss), jitted.

    The sums of losses are a dict: "loss" is without label smoothing; with `label_smoothing`, there
    is also "smoothed_loss". Outputs are replicated, so that every process can read them.
    """
    model = build(model_config)

    def eval_step(params: Any, batch: Batch) -> tuple:
        with nn.logical_axis_rules(flax_rules()):
            total, weight, outputs = loss(model, params, batch, LossOptions(chunk=loss_chunk))
            losses = {"loss": total}
            if label_smoothing is not None:  # XLA computes the forward pass only once.
                options = LossOptions(chunk=loss_chunk, label_smoothing=label_smoothing)
                losses["smoothed_loss"], *_ = loss(model, params, batch, options)
        return losses, weight, outputs

    return jax.jit(
        eval_step,
        out_shardings=replicated(mesh),
        compiler_options=compiler_options(mesh, model_config.width, deterministic),
    )


def compiler_options(mesh: Mesh, width: int, deterministic: bool) -> dict[str, Any]:
    """Return XLA options for this mesh: fast, and if `deterministic` with the same bits every time.

    Programs on CPUs always give the same bits. There, narrow models compute matrix products with
    Eigen and sums with YNNPACK; by default YNNPACK does both, which is 10 % slower at width 128 but
    10 % faster in GPT-2 124M, whose width is 768. On GPUs, `xla_gpu_deterministic_ops` avoids
    atomic additions, and kernels that are chosen by timing during compilation (xla/xla.proto;
    github.com/openxla/xla/pull/12520). `xla_gpu_autotune_level` also avoids such timing, because
    versions of XLA differ in the effect of the first option. These are options of one program, not
    XLA_FLAGS, which are read before the devices are known.
    """
    platform = mesh.devices.flat[0].platform
    if platform == "cpu" and width < 768:
        return {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}
    if not deterministic or platform != "gpu":
        return {}
    return {"xla_gpu_deterministic_ops": True, "xla_gpu_autotune_level": 0}


def random_keys(
    config: ModelConfig | None, seed: int, step: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return the random key of dropout in a step, and the stream of the cores' random features.

    config: None for a model without such cores.
    """
    key, redraw = jax.random.key(seed), redraw_steps(config) if config else None
    features = {} if redraw is None else {FEATURES: jax.random.fold_in(key, step // redraw)}
    return jax.random.fold_in(key, step), features


def summed_gradients(loss_sum: Callable, params: Any, batch: Batch, key: jax.Array, parts: int):
    """Return (sum of losses, sum of weights, gradient of the sum of losses) over micro-batches."""
    gradient = jax.value_and_grad(loss_sum, has_aux=True)
    if parts == 1:
        (loss, weight), grads = gradient(params, batch, key)
        return loss, weight, grads

    def add(total: Any, part: tuple[jax.Array, Batch]):
        index, batch = part
        (loss, weight), grads = gradient(params, batch, jax.random.fold_in(key, index))
        return jax.tree.map(jnp.add, total, (loss, weight, grads)), None

    # Neighbouring rows go to different parts, so that every part has rows of each device.
    split = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)
    zeros = (jnp.float32(0), jnp.float32(0), jax.tree.map(jnp.zeros_like, params))
    total, _ = jax.lax.scan(add, zeros, (jnp.arange(parts), split))
    return total


def _norms(path: Any, x: jax.Array) -> jax.Array:
    """Compute the norm of an array, or of each layer's part where layers are stacked."""
    stacked = any(getattr(key, "key", None) == "blocks" for key in path)
    axes = tuple(range(1 if stacked else 0, x.ndim))
    return jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=axes))
