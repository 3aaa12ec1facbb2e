"""The config of a model: frozen values, checked when they are made. No jax is imported here."""

from heedful.model.config.attention import (
    AttentionConfig,
    AttentionSite,
    LinformerConfig,
    PerformerConfig,
)
from heedful.model.config.checks import ModelError, require, require_choices
from heedful.model.config.model import Architecture, ModelConfig
from heedful.model.config.parts import FeedForwardConfig, HeadConfig, LoraConfig, NormConfig
from heedful.model.config.pattern import LayerConfig
from heedful.model.config.positions import PositionConfig, RotaryConfig

__all__ = [
    "Architecture",
    "AttentionConfig",
    "AttentionSite",
    "FeedForwardConfig",
    "HeadConfig",
    "LayerConfig",
    "LinformerConfig",
    "LoraConfig",
    "ModelConfig",
    "ModelError",
    "NormConfig",
    "PerformerConfig",
    "PositionConfig",
    "RotaryConfig",
    "require",
    "require_choices",
]
