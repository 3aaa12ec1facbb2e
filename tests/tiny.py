"""The smallest model that has every part; sizes are distinct so that a swapped axis fails."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from model.config import (
    AttentionConfig,
    FeedForwardConfig,
    ModelConfig,
    NormConfig,
    PositionConfig,
)

B, T, S, V = 3, 5, 7, 11
WIDTH, HEADS, KV_HEADS, HEAD_DIM, INNER, LAYERS = 12, 6, 3, 2, 13, 2


def tiny(architecture: Any = "encoder_decoder", **changes: Any) -> ModelConfig:
    """A ModelConfig; keywords as `norm_position` reach the part `norm`."""
    parts: dict[str, Any] = {
        "attention": (AttentionConfig, {"heads": HEADS, "kv_heads": KV_HEADS}),
        "feed_forward": (FeedForwardConfig, {"width": INNER}),
        "norm": (NormConfig, {}),
        "positions": (PositionConfig, {}),
    }
    own: dict[str, Any] = {"vocab_size": V, "width": WIDTH, "layers": LAYERS, "dropout": 0.0}
    for name, value in changes.items():
        for part, (_, values) in parts.items():
            if name.startswith(f"{part}_"):
                values[name.removeprefix(f"{part}_")] = value
                break
        else:
            own[name] = value
    made = {part: make(**values) for part, (make, values) in parts.items()}
    return ModelConfig(architecture=architecture, **made, **own)


def random_params(model: nn.Module, *args: Any, scale: float = 0.5) -> dict:
    """Parameters without their axis names, all drawn at random: no bias is 0, no scale is 1."""
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), *args))["params"]
    leaves, tree = jax.tree.flatten(shapes)
    rng = np.random.default_rng(0)
    return jax.tree.unflatten(
        tree, [jnp.asarray(scale * rng.normal(size=x.shape), x.dtype) for x in leaves]
    )
