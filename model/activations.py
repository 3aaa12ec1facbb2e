"""Activations of the feed-forward layer.

Both forms of gelu are computed in float32, whatever the type of x: for negative x, 1 + erf(x) would
lose most of its digits in bfloat16.
"""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.custom_vjp
def gelu(x: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """Return x * Phi(x); Phi is the cumulative normal distribution (arXiv:1606.08415 §2).

    The backward pass needs only x. `erf` is faster than the `erfc` of flax.
    """
    y = x.astype(jnp.float32)
    return (y * _normal_cdf(y)).astype(x.dtype)


def _normal_cdf(x: jax.Array) -> jax.Array:
    return 0.5 * (1 + jax.lax.erf(x * 0.5**0.5))


def _gelu_backward(x: jax.Array, g: jax.Array) -> tuple[jax.Array]:
    x = jax.lax.optimization_barrier(x)  # Otherwise XLA stores `erf` of the forward pass.
    y, g = x.astype(jnp.float32), g.astype(jnp.float32)
    density = jnp.exp(-0.5 * jnp.square(y)) * (2 * math.pi) ** -0.5
    return ((g * (_normal_cdf(y) + y * density)).astype(x.dtype),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


@jax.custom_vjp
def gelu_tanh(x: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """Return GPT-2's approximation of gelu (arXiv:1606.08415 §2).

    The backward pass needs only x.
    """
    y = x.astype(jnp.float32)
    return (0.5 * y * (1 + jnp.tanh(_inner(y)))).astype(x.dtype)


def _inner(x: jax.Array) -> jax.Array:
    return (2 / math.pi) ** 0.5 * (x + 0.044715 * x * x * x)


def _gelu_tanh_backward(x: jax.Array, g: jax.Array) -> tuple[jax.Array]:
    x = jax.lax.optimization_barrier(x)
    y, g = x.astype(jnp.float32), g.astype(jnp.float32)
    tanh = jnp.tanh(_inner(y))
    slope = (2 / math.pi) ** 0.5 * (1 + 3 * 0.044715 * y * y)
    return ((0.5 * g * (1 + tanh + y * (1 - tanh * tanh) * slope)).astype(x.dtype),)


gelu_tanh.defvjp(lambda x: (gelu_tanh(x), x), _gelu_tanh_backward)

ACTIVATIONS: dict[str, Callable] = {
    "relu": nn.relu,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "silu": nn.silu,
}
