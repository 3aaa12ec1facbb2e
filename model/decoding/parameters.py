"""The parameters of a model as a loop over tokens reads them."""

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
    """The parameters of a model, arranged for decoding on the platform of the mesh in force.

    `prepare` makes it once for all texts. It holds each array once: a kernel of which decoding
    reads the transpose is in the collection "decode" and not in "params". Parameters and caches
    whose layers are apart (see `ops.loops.unstack_layers`) are apart between calls only.
    """

    config: ModelConfig = struct.field(pytree_node=False)
    collections: dict[str, Any]

    def apply(self, *args: Any, **options: Any) -> Any:
        """Return what `build(config).apply` returns for the parameters as they were."""
        return build(self.config).apply(restack_layers(self.collections), *args, **options)

    def empty_cache(self, batch: int, length: int) -> Any:
        """Return a cache for `decode`; see `transformer.empty_cache`."""
        return self._arrange(empty_cache(self.config, batch, length))

    def decode(
        self, tokens: Int[Array, "B T"], *args: Any, cache: Any, **options: Any
    ) -> tuple[Float[Array, "B T V"], Any]:
        """Return logits for the token after each of `tokens`, and the cache with them added.

        The other arguments are those of the model's method `decode`.
        """
        cache = restack_layers(cache)
        logits, cache = self.apply(tokens, *args, cache=cache, method="decode", **options)
        return logits, self._arrange(cache)

    def step(
        self, tokens: Int[Array, "R 1"], cache: Any, position: Position, *args: Any
    ) -> tuple[Float[Array, "R V"], Any]:
        """Decode one token a row: the `Step` of `sample` and `beam_search`."""
        logits, cache = self.decode(tokens, *args, cache=cache, offset=position)
        return logits[:, -1], cache

    def _arrange(self, cache: Any) -> Any:
        if layers_are_looped(self.config):
            return cache
        is_block = lambda cache: isinstance(cache, BlockCache)  # noqa: E731
        return jax.tree.map(unstack_layers, cache, is_leaf=is_block)


def prepare(config: ModelConfig, params: Any) -> DecodeParams:
    """Return parameters as decoding reads them: to be called in a program of its own."""
    if layers_are_looped(config):
        return DecodeParams(config, {"params": params})
    kept, transposed = dict(params), {}
    for name in (name for name, part in params.items() if "blocks" in part):
        blocks, kernels = map(unstack_layers, split_kernels(params[name]["blocks"]))
        kept[name] = params[name] | {"blocks": blocks}
        transposed[name] = {"blocks": kernels}
    return DecodeParams(config, {"params": kept, "decode": transposed})


def layers_are_looped(config: ModelConfig) -> bool:
    """Tell if the layers that a token passes are a loop in the compiled program."""
    depth = max(config.layers, config.encoder_layers or 0)
    is_remat = config.remat != "none"
    return layers_per_iteration(config.unroll, remat=is_remat, decodes=True) < depth
