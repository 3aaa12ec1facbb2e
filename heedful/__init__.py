"""Transformers in JAX and Flax that are right, fast and reproducible, from one CPU to a TPU pod.

Names are imported when they are first used: `import heedful` alone does not import jax.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from heedful.data.config import DataConfig, TokenizerConfig
    from heedful.data.errors import DataError
    from heedful.data.objectives import Objective
    from heedful.data.pipeline import Dataset
    from heedful.data.sources.source import Source
    from heedful.data.tokenizer import Tokenizer
    from heedful.errors import HeedfulError
    from heedful.model import masks
    from heedful.model.attention.core import AttentionCall, CoreSpec
    from heedful.model.attention.function import attention
    from heedful.model.config import (
        AttentionConfig,
        FeedForwardConfig,
        HeadConfig,
        LayerConfig,
        LinformerConfig,
        LoraConfig,
        ModelConfig,
        ModelError,
        NormConfig,
        PerformerConfig,
        PositionConfig,
        RotaryConfig,
    )
    from heedful.model.init import init
    from heedful.model.mask_picture import MaskPicture, show
    from heedful.model.masks import AttentionMask, MaskNotSupported
    from heedful.model.transformer import build
    from heedful.train.audit.findings import Finding
    from heedful.train.audit.of_model import audit
    from heedful.train.checkpoint import CorruptCheckpoint
    from heedful.train.config import DecodeConfig, MeshConfig, OptimizerConfig, TrainConfig
    from heedful.train.conversion.pretrained import from_pretrained, save_pretrained
    from heedful.train.errors import Interrupted, TrainError
    from heedful.train.experiment import Experiment
    from heedful.train.fit import fit
    from heedful.train.inference.classify import Prediction
    from heedful.train.inspection.attention_picture import AttentionWeights
    from heedful.train.metrics import NonFiniteLoss
    from heedful.train.observers import Observer
    from heedful.train.own_loop import make_eval_step, make_train_step
    from heedful.train.state import TrainState
    from heedful.train.tasks import Task
    from heedful.train.trained_run import TrainedRun, load

__version__ = "0.1.0"

_HOMES = {
    "heedful.data.config": ("DataConfig", "TokenizerConfig"),
    "heedful.data.errors": ("DataError",),
    "heedful.data.objectives": ("Objective",),
    "heedful.data.pipeline": ("Dataset",),
    "heedful.data.sources.source": ("Source",),
    "heedful.data.tokenizer": ("Tokenizer",),
    "heedful.errors": ("HeedfulError",),
    "heedful.model": ("masks",),
    "heedful.model.attention.core": ("AttentionCall", "CoreSpec"),
    "heedful.model.attention.function": ("attention",),
    "heedful.model.config": (
        "AttentionConfig", "FeedForwardConfig", "HeadConfig", "LayerConfig", "LinformerConfig",
        "LoraConfig", "ModelConfig", "ModelError", "NormConfig", "PerformerConfig",
        "PositionConfig", "RotaryConfig",
    ),
    "heedful.model.init": ("init",),
    "heedful.model.mask_picture": ("MaskPicture", "show"),
    "heedful.model.masks": ("AttentionMask", "MaskNotSupported"),
    "heedful.model.transformer": ("build",),
    "heedful.train.audit.findings": ("Finding",),
    "heedful.train.audit.of_model": ("audit",),
    "heedful.train.checkpoint": ("CorruptCheckpoint",),
    "heedful.train.config": ("DecodeConfig", "MeshConfig", "OptimizerConfig", "TrainConfig"),
    "heedful.train.conversion.pretrained": ("from_pretrained", "save_pretrained"),
    "heedful.train.errors": ("Interrupted", "TrainError"),
    "heedful.train.experiment": ("Experiment",),
    "heedful.train.fit": ("fit",),
    "heedful.train.inference.classify": ("Prediction",),
    "heedful.train.inspection.attention_picture": ("AttentionWeights",),
    "heedful.train.metrics": ("NonFiniteLoss",),
    "heedful.train.observers": ("Observer",),
    "heedful.train.own_loop": ("make_eval_step", "make_train_step"),
    "heedful.train.state": ("TrainState",),
    "heedful.train.tasks": ("Task",),
    "heedful.train.trained_run": ("TrainedRun", "load"),
}  # fmt: skip
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "AttentionCall", "AttentionConfig", "AttentionMask", "AttentionWeights", "CoreSpec",
    "CorruptCheckpoint", "DataConfig", "DataError", "Dataset", "DecodeConfig", "Experiment",
    "FeedForwardConfig", "Finding", "HeadConfig", "HeedfulError", "Interrupted", "LayerConfig",
    "LinformerConfig", "LoraConfig", "MaskNotSupported", "MaskPicture", "MeshConfig",
    "ModelConfig", "ModelError", "NonFiniteLoss", "NormConfig", "Objective", "Observer",
    "OptimizerConfig", "PerformerConfig", "PositionConfig", "Prediction", "RotaryConfig", "Source",
    "Task", "Tokenizer", "TokenizerConfig", "TrainConfig", "TrainError", "TrainState",
    "TrainedRun", "attention", "audit", "build", "fit", "from_pretrained", "init", "load",
    "make_eval_step", "make_train_step", "masks", "save_pretrained", "show",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'heedful' has no attribute '{name}'")
    value = getattr(importlib.import_module(_HOME_OF[name]), name, None)
    if value is None:  # A module.
        value = importlib.import_module(f"{_HOME_OF[name]}.{name}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
