"""What is between the two matrices of a feed-forward layer, or at its gate."""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.custom_vjp
def gelu(x: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """x Phi(x), Phi the normal distribution (arXiv:1606.08415 §2).

    It keeps x alone for its derivative, and takes `erf`, which is faster than flax's `erfc`.
    """
    return x * _normal_cdf(x)


def _normal_cdf(x: jax.Array) -> jax.Array:
    return 0.5 * (1 + jax.lax.erf(x * 0.5**0.5))


def _gelu_backward(x: jax.Array, g: jax.Array) -> tuple[jax.Array]:
    x = jax.lax.optimization_barrier(x)  # Otherwise the forward pass stores its `erf` for this.
    density = jnp.exp(-0.5 * jnp.square(x)) * (2 * math.pi) ** -0.5
    return (g * (_normal_cdf(x) + x * density),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


@jax.custom_vjp
def gelu_tanh(x: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """GPT-2's approximation of gelu (arXiv:1606.08415 §2), which keeps x alone as well."""
    return 0.5 * x * (1 + jnp.tanh(_inner(x)))


def _inner(x: jax.Array) -> jax.Array:
    return (2 / math.pi) ** 0.5 * (x + 0.044715 * x * x * x)


def _gelu_tanh_backward(x: jax.Array, g: jax.Array) -> tuple[jax.Array]:
    x = jax.lax.optimization_barrier(x)
    tanh = jnp.tanh(_inner(x))
    slope = (2 / math.pi) ** 0.5 * (1 + 3 * 0.044715 * x * x)
    return (0.5 * g * (1 + tanh + x * (1 - tanh * tanh) * slope),)


gelu_tanh.defvjp(lambda x: (gelu_tanh(x), x), _gelu_tanh_backward)

ACTIVATIONS: dict[str, Callable] = {
    "relu": nn.relu,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "silu": nn.silu,
}
