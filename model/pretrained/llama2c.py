"""Read checkpoints of llama2.c (github.com/karpathy/llama2.c), version 0 of its format.

A file holds seven int32 numbers (dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size,
seq_len), then the float32 tensors in the order of `_tensors`, all little-endian. A negative
vocab_size means that the output projection is not tied to the embedding.
"""

import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from heedful.model.config import (
    AttentionConfig,
    FeedForwardConfig,
    ModelConfig,
    ModelError,
    NormConfig,
    PositionConfig,
    require,
)
from heedful.model.positions import rotation
from heedful.model.pretrained.family import Pretrained

HEADER = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "seq_len")
BLOCKS = "decoder/blocks"


def read_llama2c(path: Path, *, following: int = 0) -> Pretrained:
    """Read the LLaMA in a llama2.c checkpoint; the last `following` bytes are not read.

    Raises ModelError for a header that llama2.c does not write, a file size that does not follow
    from the header, values that are not finite, and rotary angles of another base than 10,000.
    """
    if not path.is_file():
        raise ModelError(f"{path} does not exist: give the path of a llama2.c checkpoint")
    size = path.stat().st_size
    header = np.fromfile(path, "<i4", len(HEADER)).tolist()
    is_tied = header[5:6] > [0]
    sizes: dict[str, int] = dict(zip(HEADER, map(abs, header), strict=False))
    is_sane = len(sizes) == len(HEADER) and all(0 < value < 1 << 24 for value in sizes.values())
    is_sane = is_sane and min(header[:5] + header[6:]) > 0 and sizes["dim"] % sizes["n_heads"] == 0
    require(
        is_sane,
        f"{path} is not a llama2.c checkpoint of version 0, because its header is {header}: give a "
        "file in this format",
    )
    config = _config(sizes, is_tied)
    tensors = _tensors(config)
    expected = 4 * (len(HEADER) + sum(map(math.prod, tensors.values())))
    require(
        size == expected + following,
        f"{path} has {size - following:,} bytes, but its header {header} implies {expected:,}: "
        "fetch the file again",
    )
    params, offset = {}, 4 * len(HEADER)
    for name, shape in tensors.items():
        values = np.fromfile(path, "<f4", math.prod(shape), offset=offset).reshape(shape)
        offset += values.nbytes
        require(
            bool(np.isfinite(values).all()),
            f"{path}: {name} has NaN or infinite values: fetch the file again",
        )
        params[name] = _to_our_layout(name, values, config)
    rows = jnp.arange(sizes["seq_len"])[None]
    angles = rotation(rows, config.head_dim, config.positions.rotary)
    for name, expected in (("cosines", angles.cos), ("sines", angles.sin)):
        require(
            np.allclose(params[name], expected[0], atol=1e-3),
            f"{path}: its {name} are not those of rotary positions with base 10,000, the only base "
            "of this format: fetch the file again, or use a model with this base",
        )
    params = {name: values for name, values in params.items() if "/" in name}
    return Pretrained(
        config=config,
        params=unflatten_dict(params, sep="/"),
        architecture="LlamaForCausalLM",
        special={"bos_token_id": 1, "eos_token_id": 2},
    )


def _config(sizes: dict[str, int], is_tied: bool) -> ModelConfig:
    heads, kv_heads = sizes["n_heads"], sizes["n_kv_heads"]
    return ModelConfig(
        architecture="decoder_only",
        vocab_size=sizes["vocab_size"],
        width=sizes["dim"],
        layers=sizes["n_layers"],
        attention=AttentionConfig(
            heads=heads, kv_heads=None if kv_heads == heads else kv_heads, bias=False
        ),
        feed_forward=FeedForwardConfig(
            width=sizes["hidden_dim"], activation="silu", gated=True, bias=False
        ),
        norm=NormConfig(kind="rmsnorm", position="pre", epsilon=1e-5),
        positions=PositionConfig(kind="rotary", max_length=sizes["seq_len"]),
        dropout=0.0,
        tie_embeddings=is_tied,
        scale_embeddings=False,
        init="normal",
    )


def _tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return {our path: shape in the file}, in the order of the file, with cosines and sines."""
    D, F, L, V = config.width, config.feed_forward.width, config.layers, config.vocab_size or 0
    N, K, H = config.attention.heads, config.kv_heads, config.head_dim
    angles = (config.positions.max_length, H // 2)
    tensors = {
        "embedding/table": (V, D),
        f"{BLOCKS}/self_attention_norm/scale": (L, D),
        f"{BLOCKS}/self_attention/query/kernel": (L, N, H, D),
        f"{BLOCKS}/self_attention/key/kernel": (L, K, H, D),
        f"{BLOCKS}/self_attention/value/kernel": (L, K, H, D),
        f"{BLOCKS}/self_attention/out/kernel": (L, D, N, H),
        f"{BLOCKS}/feed_forward_norm/scale": (L, D),
        f"{BLOCKS}/feed_forward/gate/kernel": (L, F, D),
        f"{BLOCKS}/feed_forward/down/kernel": (L, D, F),
        f"{BLOCKS}/feed_forward/up/kernel": (L, F, D),
        "decoder/norm/scale": (D,),
        "cosines": angles,
        "sines": angles,
    }
    return tensors if config.tie_embeddings else tensors | {"head/kernel": (V, D)}


def _to_our_layout(name: str, values: np.ndarray, config: ModelConfig) -> np.ndarray:
    """Transpose matrices [out, in] to [in, out], and reorder the rows of query and key.

    llama2.c rotates the pairs (2i, 2i + 1) of a head, we rotate (i, i + H/2).
    """
    if name.endswith(("query/kernel", "key/kernel")):
        L, heads, H, D = values.shape
        halves = values.reshape(L, heads, H // 2, 2, D).swapaxes(2, 3)
        values = halves.reshape(L, heads, H, D)
    if name.endswith("out/kernel"):
        values = np.moveaxis(values, 1, -1)
    elif name.endswith("kernel"):
        values = np.moveaxis(values, -1, 1 if name.startswith(BLOCKS) else 0)
    return np.ascontiguousarray(values, np.float32)
