"""Random parameters of a model."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from heedful.model.config import ModelConfig, ModelError


def init(model: nn.Module, key: jax.Array) -> dict[str, Any]:
    """Return random parameters of a model as a plain tree of float32 arrays, without metadata.

    The layers of a stack are stacked: their arrays begin with an axis of layers. Raises ModelError
    for a model without a size of the vocabulary, or for a classifier without a number of outputs.

    Example:
        >>> import jax, heedful as hf
        >>> config = hf.ModelConfig(architecture="decoder_only", vocab_size=64, width=32, layers=2)
        >>> params = hf.init(hf.build(config), jax.random.key(0))
        >>> params["embedding"]["table"].shape
        (64, 32)
    """
    config: ModelConfig = model.config  # type: ignore[attr-defined]
    if config.vocab_size is None:
        raise ModelError("model.vocab_size = None: give the vocab_size of the tokenizer")
    if config.head.kind == "classifier" and config.head.outputs is None:
        raise ModelError("model.head.outputs = None: give the number of classes")
    return jax.jit(lambda key: nn.unbox(boxed_params(model, key)))(key)


def boxed_params(model: nn.Module, key: jax.Array) -> Any:
    """Return random parameters of a model, each in a box with the names of its axes."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    is_pair = model.config.architecture == "encoder_decoder"  # type: ignore[attr-defined]
    return model.init(key, *[tokens] * (2 if is_pair else 1))["params"]
