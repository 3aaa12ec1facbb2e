"""What training changes: step, parameters, optimizer state; born sharded."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from model.config import ModelConfig
from model.transformer import build
from train.sharding import parameter_shardings


@struct.dataclass
class TrainState:
    """Everything that a checkpoint must hold to go on, but for the data iterator."""

    step: jax.Array
    params: Any
    opt_state: Any


def abstract_state(
    config: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Shapes, types and shardings of the state; nothing is computed."""
    boxed = jax.eval_shape(lambda: _init_params(config, jax.random.key(0)))
    params = nn.unbox(boxed)
    opt_state = jax.eval_shape(optimizer.init, params)
    specs = parameter_shardings(boxed, mesh)
    whole = NamedSharding(mesh, PartitionSpec())
    opt_specs = optax.tree.map_params(
        optimizer, lambda _, spec: spec, opt_state, specs, transform_non_params=lambda _: whole
    )
    state = TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, opt_state)  # type: ignore[arg-type]
    shardings = TrainState(whole, specs, opt_specs)  # type: ignore[arg-type]
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        state,
        shardings,
    )


def init_state(
    config: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh, seed: int
) -> TrainState:
    """A fresh state, every array made where it stays; the same values on every mesh."""

    def make() -> TrainState:
        params = nn.unbox(_init_params(config, jax.random.key(seed)))
        return TrainState(jnp.int32(0), params, optimizer.init(params))

    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(config, optimizer, mesh))
    with jax.set_mesh(mesh):
        return jax.jit(make, out_shardings=shardings)()


def parameter_count(params: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _init_params(config: ModelConfig, key: jax.Array) -> Any:
    tokens = jnp.zeros((1, 1), jnp.int32)
    sides = 2 if config.architecture == "encoder_decoder" else 1
    return build(config).init(key, *[tokens] * sides)["params"]
