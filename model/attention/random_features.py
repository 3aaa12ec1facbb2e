"""Positive random features, whose products approximate exp(q k) (arXiv:2009.14794)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from heedful.model.config import PerformerConfig

EPSILON = 1e-3  # smallest ReLU feature, as in the authors' code


@dataclass(frozen=True)
class Features:
    """The map phi from queries or keys to the logarithms of their features, in float32."""

    matrix: Float[Array, "R H"]
    factor: float
    """Factor of queries and of keys, the square root of the scale of attention scores."""
    kernel: str

    def __call__(self, x: Float[Array, "*n H"]) -> Float[Array, "*n R"]:
        """Return logarithms of features, up to a constant that all features of all x share.

        softmax: phi(x) = exp(w x - |x|^2 / 2) for each row w of the matrix (arXiv:2009.14794
        §2.3); for normal w, E[phi(q) phi(k)] = exp(q k). relu: phi(x) = max(w x, 0), one of the
        generalised attentions of arXiv:2009.14794 §4.
        """
        x = x.astype(jnp.float32) * self.factor
        # Errors in an exponent do not average out: no matrix unit may round these products.
        projected = jnp.einsum("...H,RH->...R", x, self.matrix, precision="highest")
        if self.kernel == "relu":
            return jnp.log(jax.nn.relu(projected) + EPSILON)
        return projected - jnp.sum(jnp.square(x), -1, keepdims=True) / 2


def draw_features(config: PerformerConfig, head_dim: int, key: jax.Array) -> Float[Array, "R H"]:
    """Draw R normal vectors.

    With config.orthogonal, each block of H vectors is orthogonal (arXiv:2009.14794 §2.4).
    """
    keys = iter(jax.random.split(key))
    return _draw(config, head_dim, lambda *shape: jax.random.normal(next(keys), shape), jnp)


@lru_cache
def fixed_features(config: PerformerConfig, head_dim: int) -> np.ndarray:
    """Return features of `draw_features` from a fixed seed, the same on every machine."""
    rng = np.random.default_rng(0)
    return _draw(config, head_dim, lambda *shape: rng.normal(size=shape), np).astype(np.float32)


def _draw(config: PerformerConfig, head_dim: int, normal: Callable, numpy: Any) -> Any:
    rows = normal(config.features, head_dim)
    if not config.orthogonal:
        return rows
    q, r = numpy.linalg.qr(normal(-(-config.features // head_dim), head_dim, head_dim))
    # QR chooses signs by a fixed rule; undone, all rotations are equally likely.
    q = q * numpy.sign(numpy.diagonal(r, axis1=-2, axis2=-1))[:, None]
    lengths = numpy.linalg.norm(rows, axis=-1, keepdims=True)
    return lengths * q.reshape(-1, head_dim)[: config.features]
