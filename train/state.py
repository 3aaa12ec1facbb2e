"""What training changes: step, parameters, optimizer state; born sharded."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh

from heedful.model.config import ModelConfig
from heedful.model.transformer import build
from heedful.train.config import TrainConfig
from heedful.train.optimizer import make_optimizer
from heedful.train.sharding import make_mesh, parameter_shardings, replicated
from heedful.train.trainable import rate_factors, split


@struct.dataclass
class TrainState:
    """Everything that a checkpoint must hold to go on, but for the data iterator."""

    step: jax.Array
    params: Any
    opt_state: Any
    """Of the parameters that train."""


def abstract_params(config: ModelConfig, mesh: Mesh) -> Any:
    """Shapes, types and shardings of the parameters; nothing is computed."""
    boxed = jax.eval_shape(lambda: _init_params(config, jax.random.key(0)))
    return _placed(nn.unbox(boxed), parameter_shardings(boxed, mesh))


class Setup(NamedTuple):
    """What follows from the configs before anything is computed."""

    mesh: Mesh
    factors: Any
    """Of the learning rate, by parameter: `trainable.rate_factors`."""
    optimizer: optax.GradientTransformation
    abstract: TrainState
    """Shapes, types and shardings of the state."""


def set_up(model: ModelConfig, config: TrainConfig, mesh: Mesh | None = None) -> Setup:
    """The setup of a training run, on all devices unless `mesh` says on which."""
    mesh = make_mesh(config.mesh) if mesh is None else mesh
    params = abstract_params(model, mesh)
    factors = rate_factors(params, model, config.optimizer)
    optimizer = make_optimizer(config.optimizer, config.steps, factors)
    trainable, _ = split(params, factors)
    opt_state = jax.eval_shape(optimizer.init, trainable)
    specs = jax.tree.map(lambda x: x.sharding, trainable)
    opt_specs = optax.tree.map_params(
        optimizer,
        lambda _, spec: spec,
        opt_state,
        specs,
        transform_non_params=lambda _: replicated(mesh),
    )
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(mesh))
    state = TrainState(step, params, _placed(opt_state, opt_specs))  # type: ignore[arg-type]
    return Setup(mesh, factors, optimizer, state)


def init_params(config: ModelConfig, mesh: Mesh, seed: int) -> Any:
    """Fresh parameters, every array made where it stays; the same values on every mesh."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract_params(config, mesh))
    make = lambda: nn.unbox(_init_params(config, jax.random.key(seed)))  # noqa: E731
    with jax.set_mesh(mesh):
        return jax.jit(make, out_shardings=shardings)()


def first_state(setup: Setup, params: Any) -> TrainState:
    """The state before the first step, from parameters that are random or were trained before."""
    shardings = jax.tree.map(lambda x: x.sharding, setup.abstract.opt_state)
    with jax.set_mesh(setup.mesh):
        init = jax.jit(setup.optimizer.init, out_shardings=shardings)
        opt_state = init(split(params, setup.factors)[0])
    step = jax.device_put(jnp.int32(0), setup.abstract.step.sharding)
    return TrainState(step, params, opt_state)  # type: ignore[arg-type]


def parameter_count(params: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _placed(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def _init_params(config: ModelConfig, key: jax.Array) -> Any:
    tokens = jnp.zeros((1, 1), jnp.int32)
    sides = 2 if config.architecture == "encoder_decoder" else 1
    return build(config).init(key, *[tokens] * sides)["params"]
