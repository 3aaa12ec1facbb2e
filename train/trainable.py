"""Learning rates of parameters: freezing, low-rank updates, factors by layer and of the head."""

import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from heedful.model.config import ModelConfig
from heedful.train.config import OptimizerConfig
from heedful.train.errors import TrainError

STACKED = "blocks"  # The first axis of arrays below this name is the layer.


def named(params: Any) -> list[tuple[str, Any]]:
    """Return (dotted name, leaf) of every parameter, in the order of the tree's leaves."""
    return [
        (jax.tree_util.keystr(path, simple=True, separator="."), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    ]


def layer_names(name: str, shape: tuple[int, ...]) -> list[str]:
    """Return the names of the layers in a stacked array (encoder.blocks.3.NAME), else [name]."""
    stack, found, rest = name.partition(f".{STACKED}.")
    if not found:
        return [name]
    return [f"{stack}{found}{layer}.{rest}" for layer in range(shape[0])]


def rate_factors(params: Any, model: ModelConfig, config: OptimizerConfig) -> Any:
    """Return the factor of each parameter's learning rate, float or [layers, 1, ...]; 0: frozen.

    Raises TrainError for a pattern of `config.freeze` that matches no parameter, for a
    `head_lr_multiplier` if the head has no parameters, and if all parameters are frozen.
    """
    if config.head_lr_multiplier != 1 and not any(
        name.startswith("head.") for name, _ in named(params)
    ):
        raise TrainError(
            f"train.optimizer.head_lr_multiplier = {config.head_lr_multiplier}: the head has no "
            "parameters of its own; set train.optimizer.head_lr_multiplier to 1"
        )
    unused = set(config.freeze)
    factors = []
    for name, leaf in named(params):
        names = layer_names(name, leaf.shape)
        values = [
            _factor(part, len(names), layer, model, config) * _query_factor(part, model)
            for layer, part in enumerate(names)
        ]
        for layer, part in enumerate(names):
            fitting = [pattern for pattern in config.freeze if re.search(pattern, part)]
            unused.difference_update(fitting)
            if fitting:
                values[layer] = 0.0
        same = len(set(values)) == 1
        shape = (-1, *[1] * (len(leaf.shape) - 1))
        factors.append(values[0] if same else np.array(values, np.float32).reshape(shape))
    _require_fit("train.optimizer.freeze", unused, params)
    if not any(np.any(factor) for factor in factors):
        raise TrainError(
            "train.optimizer.freeze leaves nothing to train: give patterns that match fewer "
            "parameters"
        )
    return jax.tree.unflatten(jax.tree.structure(params), factors)


def _factor(  # Layers as in arXiv:2106.08254 §3.1: the top block is one layer below the head.
    name: str, layers: int, layer: int, model: ModelConfig, config: OptimizerConfig
) -> float:
    if name.startswith("head."):
        return config.head_lr_multiplier
    if model.lora.rank and "lora_" not in name:
        return 0.0
    if f".{STACKED}." in name:
        return config.layer_decay ** (layers - layer)
    is_last_norm = re.fullmatch(r"(encoder|decoder)\.norm\.\w+", name)
    deepest = max(model.layers, model.encoder_layers or 0)
    return 1.0 if is_last_norm else config.layer_decay ** (deepest + 1)


def _query_factor(name: str, model: ModelConfig) -> float:
    """Return the factor of queries in attention without a scale; 1 for all other parameters.

    In attention without a scale, queries are smaller by sqrt(H), H the size of a head, but the
    updates of Adam are not. With the factor H^-0.5, queries learn as in attention with a scale. T5
    needs no factor: the updates of AdaFactor are relative to the size of the parameter
    (arXiv:1804.04235 §8).
    """
    is_small = re.search(r"attention\.query\.(kernel|bias|lora_b)$", name)
    return model.key_dim**-0.5 if is_small and not model.attention.scaled else 1.0


def split(params: Any, factors: Any) -> tuple[Any, Any]:
    """Return two trees (trainable, frozen): each has None where the other has the parameter."""
    trains = jax.tree.map(lambda factor: bool(np.any(factor)), factors)
    return (
        jax.tree.map(lambda p, t: p if t else None, params, trains),
        jax.tree.map(lambda p, t: None if t else p, params, trains),
    )


def join(trainable: Any, frozen: Any) -> Any:
    """Return the parameters of both trees: the inverse of `split`."""
    return jax.tree.map(
        lambda t, f: f if t is None else t, trainable, frozen, is_leaf=lambda x: x is None
    )


def _require_fit(field: str, unused: set[str], params: Any) -> None:
    if unused:
        names: Sequence[str] = [name for name, _ in named(params)]
        raise TrainError(
            f"{field} has {sorted(unused)[0]!r}, which matches no parameter: give a pattern for "
            f"names such as {', '.join(names[:3])} (heedful inspect --names lists all)"
        )
