"""Linear maps from the last axes of an array to other axes."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from heedful.model.axes import partitioned
from heedful.model.config import ModelConfig
from heedful.model.ops.products import matmul, transpose_for_decoding, transposed_matmul


class Linear(nn.Module):
    """A linear map from the axes `inputs` to the axes `outputs`, both given as {name: size}.

    Initial values follow `config.init` and are multiplied by `gain`; fan-in and fan-out are the
    products of all input sizes and of all output sizes. If `config.lora` names the map, a low-rank
    update is added. For decoding, the collection "decode" may hold the kernel as a matrix
    `transposed` [out, in]; see `split_kernels`.
    """

    config: ModelConfig
    inputs: Mapping[str, int]
    outputs: Mapping[str, int]
    use_bias: bool
    gain: float = 1.0

    @nn.compact
    def __call__(self, x: Float[Array, "B T *in"]) -> Float[Array, "B T *out"]:
        dtype, lora, rank = self.config.dtype, self.config.lora, len(self.inputs)
        in_shape, out_shape = tuple(self.inputs.values()), tuple(self.outputs.values())
        fan_in = math.prod(in_shape)
        x = x.astype(dtype).reshape(*x.shape[:-rank], fan_in)

        def kernel(name: str, init: Callable, inputs: Mapping, outputs: Mapping) -> jax.Array:
            shape = (*inputs.values(), *outputs.values())
            return jnp.asarray(self.param(name, partitioned(init, *inputs, *outputs), shape))

        init = _initializer(self.config.init, self.gain, rank, len(self.outputs))
        if self.has_variable("decode", "transposed"):
            y: Any = transposed_matmul(x, self.get_variable("decode", "transposed").astype(dtype))
        else:
            y = matmul(x, kernel("kernel", init, self.inputs, self.outputs))
        if lora.rank and self.name in lora.targets:
            inner = {"rank": lora.rank}
            down = kernel("lora_a", nn.initializers.normal(fan_in**-0.5), self.inputs, inner)
            up = kernel("lora_b", nn.initializers.zeros, inner, self.outputs)
            y += lora.alpha / lora.rank * jnp.asarray(matmul(matmul(x, down), up))
        y = y.reshape(*y.shape[:-1], *out_shape)
        if self.use_bias:
            zeros = partitioned(nn.initializers.zeros, *self.outputs)
            # Added in float32, so that its gradient is summed over all rows in float32.
            bias = jnp.asarray(self.param("bias", zeros, out_shape))
            y = (y.astype(jnp.float32) + bias).astype(dtype)
        return checkpoint_name(y, str(self.name))  # model.remat refers to this name


def split_kernels(blocks: Any) -> tuple[Any, Any]:
    """Split the parameters of a stack's blocks into the collections "params" and "decode".

    A kernel [L, *in, *out] of which decoding reads the transpose is only in "decode", as a matrix
    `transposed` [L, out, in]. In a stack, only the map `out` of attention has two input axes.
    """

    def matrix(path: tuple[str, ...], kernel: Any) -> jax.Array:
        inputs = kernel.shape[1:3] if path[-2] == "out" else kernel.shape[1:2]
        return kernel.reshape(len(kernel), math.prod(inputs), -1)

    params = flatten_dict(blocks)
    kernels = {path: matrix(path, x) for path, x in params.items() if path[-1] == "kernel"}
    transposed = transpose_for_decoding(kernels)
    kept = {path: x for path, x in params.items() if path not in transposed}
    decode = {(*path[:-1], "transposed"): x for path, x in transposed.items()}
    return unflatten_dict(kept), unflatten_dict(decode)


def _initializer(kind: str, gain: float, inputs: int, outputs: int) -> Callable:
    """Return the initializer of a kernel with `inputs` input axes, then `outputs` output axes."""
    if kind != "glorot":
        return nn.initializers.normal(0.02 * gain)
    axes = range(inputs), range(inputs, inputs + outputs)
    return nn.initializers.variance_scaling(gain**2, "fan_avg", "uniform", *map(tuple, axes))
