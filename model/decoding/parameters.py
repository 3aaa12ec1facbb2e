"""Parameters of a model, arranged for a loop over tokens."""

from typing import Any

import jax
from flax import struct
from jaxtyping import Array, Float, Int

from heedful.model.config import ModelConfig
from heedful.model.decoding.sampling import Position
from heedful.model.linear import split_kernels
from heedful.model.ops.loops import layers_per_iteration, restack_layers, unstack_layers
from heedful.model.stack_cache import BlockCache
from heedful.model.transformer import build, empty_cache


@struct.dataclass
class DecodeParams:
    """Parameters of a model, arranged for decoding on the platform of the mesh in force.

    Call `prepare` once, for all texts, to make it. Each array is stored once: a kernel of which
    decoding reads the transpose is in the collection "decode" and not in "params". Layers of
    parameters and caches may be unstacked between calls (see `ops.loops.unstack_layers`); each call
    stacks the layers again.
    """

    config: ModelConfig = struct.field(pytree_node=False)
    collections: dict[str, Any]

    def apply(self, *args: Any, **options: Any) -> Any:
        """Call `build(config).apply` with these parameters.

        The result is that of the parameters before `prepare`.
        """
        return build(self.config).apply(restack_layers(self.collections), *args, **options)

    def empty_cache(self, batch: int, length: int) -> Any:
        """Return a cache for `decode`; see `transformer.empty_cache`."""
        return self._arrange(empty_cache(self.config, batch, length))

    def decode(
        self, tokens: Int[Array, "B T"], *args: Any, cache: Any, **options: Any
    ) -> tuple[Float[Array, "B T V"], Any]:
        """Return logits for the token after each of `tokens`, and the cache with `tokens` added.

        The other arguments are those of the model's method `decode`.
        """
        cache = restack_layers(cache)
        logits, cache = self.apply(tokens, *args, cache=cache, method="decode", **options)
        return logits, self._arrange(cache)

    def step(
        self, tokens: Int[Array, "R 1"], cache: Any, position: Position, *args: Any
    ) -> tuple[Float[Array, "R V"], Any]:
        """Decode one token per row: the `step` that `sample` and `beam_search` take."""
        logits, cache = self.decode(tokens, *args, cache=cache, offset=position)
        return logits[:, -1], cache

    def _arrange(self, cache: Any) -> Any:
        if layers_are_looped(self.config):
            return cache
        is_block = lambda cache: isinstance(cache, BlockCache)  # noqa: E731
        return jax.tree.map(unstack_layers, cache, is_leaf=is_block)


def prepare(config: ModelConfig, params: Any) -> DecodeParams:
    """Arrange parameters for decoding; call it once, in a separate jitted program."""
    if layers_are_looped(config):
        return DecodeParams(config, {"params": params})
    kept, transposed = dict(params), {}
    for name in (name for name, part in params.items() if "blocks" in part):
        blocks, kernels = map(unstack_layers, split_kernels(params[name]["blocks"]))
        kept[name] = params[name] | {"blocks": blocks}
        transposed[name] = {"blocks": kernels}
    return DecodeParams(config, {"params": kept, "decode": transposed})


def layers_are_looped(config: ModelConfig) -> bool:
    """Return True if the compiled program runs the layers of a token in a loop."""
    depth = max(config.layers, config.encoder_layers or 0)
    is_remat = config.remat != "none"
    return layers_per_iteration(config.unroll, remat=is_remat, decodes=True) < depth
