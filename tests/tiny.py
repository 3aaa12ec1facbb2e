"""The smallest model with all parts, and its inputs; sizes differ, so that a swapped axis fails."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from heedful.model.config import (
    AttentionConfig,
    FeedForwardConfig,
    HeadConfig,
    LoraConfig,
    ModelConfig,
    NormConfig,
    PositionConfig,
    RotaryConfig,
)
from heedful.model.transformer import build

B, T, S, V = 3, 5, 7, 11
WIDTH, HEADS, KV_HEADS, HEAD_DIM, INNER, LAYERS = 12, 6, 3, 2, 13, 2

# Rows hold documents and padding; positions begin at 0 in each document.
RNG = np.random.default_rng(0)
TOKENS = jnp.array(RNG.integers(0, V, (B, T)))
SEGMENTS = np.array([[1, 1, 2, 2, 2], [1, 1, 1, 1, 0], [1, 2, 3, 3, 3]])
PLACES = np.array([[0, 1, 0, 1, 2], [0, 1, 2, 3, 4], [0, 0, 0, 1, 2]])
SOURCE = jnp.array(RNG.integers(0, V, (B, S)))
SOURCE_SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2], [1, 1, 1, 1, 1, 1, 0], [1, 2, 2, 0, 3, 3, 3]])
SOURCE_PLACES = np.array([[0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6], [0, 0, 1, 0, 0, 1, 2]])
PREFIX = np.array([2, 3, 1])

# All kinds of positions; distances and wavelengths are so small that they matter for few tokens.
POSITIONS: dict[str, dict[str, Any]] = {
    "none": {"positions_kind": "none"},
    "sinusoidal": {"positions_kind": "sinusoidal"},
    "learned": {"positions_kind": "learned", "positions_max_length": 13},
    "rotary": {
        "positions_kind": "rotary",
        "positions_rotary": RotaryConfig(
            base=10, scaling="llama3", factor=3, low_frequency_factor=2, original_length=40
        ),
        "attention_head_dim": 6,  # wavelengths 6 (kept), 14 (between) and 29 (scaled)
    },
    "alibi": {"positions_kind": "alibi"},
    "relative": {
        "positions_kind": "relative",
        "positions_buckets": 8,
        "positions_max_distance": 5,
    },
}


def tiny(architecture: Any = "encoder_decoder", **changes: Any) -> ModelConfig:
    """Return a ModelConfig; a keyword such as `norm_position` sets a field of the part `norm`."""
    parts: dict[str, Any] = {
        "attention": (AttentionConfig, {"heads": HEADS, "kv_heads": KV_HEADS}),
        "feed_forward": (FeedForwardConfig, {"width": INNER}),
        "norm": (NormConfig, {}),
        "positions": (PositionConfig, {}),
        "head": (HeadConfig, {}),
        "lora": (LoraConfig, {}),
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
    """Return parameters without axis names, all drawn at random: no bias is 0, no scale is 1."""
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), *args))["params"]
    leaves, tree = jax.tree.flatten(shapes)
    rng = np.random.default_rng(0)
    return jax.tree.unflatten(
        tree, [jnp.asarray(scale * rng.normal(size=x.shape), x.dtype) for x in leaves]
    )


def init(config: ModelConfig) -> tuple[nn.Module, dict]:
    """Return a model and random parameters for it."""
    model = build(config)
    arrays = (TOKENS, SOURCE) if config.architecture == "encoder_decoder" else (TOKENS,)
    return model, random_params(model, *arrays)
