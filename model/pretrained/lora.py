"""Merge low-rank updates (LoRA) into the matrices that they adapt."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from heedful.model.config import LoraConfig, ModelConfig


def merge_lora(config: ModelConfig, params: Any) -> tuple[ModelConfig, dict[str, Any]]:
    """Return config and parameters without adapters: W becomes W + alpha / rank * A @ B.

    arXiv:2106.09685 §4.1. The sum is computed in float32 on the host; logits change by rounding
    only.
    """
    flat = {path: np.asarray(leaf) for path, leaf in flatten_dict(params, sep="/").items()}
    merged = {path: leaf for path, leaf in flat.items() if "/lora_" not in path}
    for path, a in flat.items():
        if path.endswith("/lora_a"):
            module = path.removesuffix("/lora_a")
            b, kernel = flat[f"{module}/lora_b"], flat[f"{module}/kernel"]
            layers = a.shape[:1] if "/blocks/" in path else ()
            rank, fan_in = a.shape[-1], math.prod(a.shape[len(layers) : -1])
            update = a.reshape(*layers, fan_in, rank) @ b.reshape(*layers, rank, -1)
            strength = np.float32(config.lora.alpha / rank)
            merged[f"{module}/kernel"] = kernel + strength * update.reshape(kernel.shape)
    return replace(config, lora=LoraConfig()), unflatten_dict(merged, sep="/")
