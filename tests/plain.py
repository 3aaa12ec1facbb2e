"""A second Transformer in float64, which shares only parameters and config with model/.

It is written to be read: it computes one head, one pair or one bucket at a time where that is
shorter. Distances are differences of `positions`, not of row indices.
"""

import math
from functools import partial
from typing import Any

import jax
import numpy as np

from heedful.model.config import LayerConfig, ModelConfig, RotaryConfig

erf = np.vectorize(math.erf)
ACTIVATIONS = {
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: x * (1 + erf(x / math.sqrt(2))) / 2,  # arXiv:1606.08415 §2
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x / (1 + np.exp(-x)),
}


def rotary_frequency(i: int, head_dim: int, config: RotaryConfig) -> float:
    """Return the angle in radians by which pair `i` of features turns per position."""
    frequency = config.base ** (-2 * i / head_dim)
    if config.scaling == "linear":
        return frequency / config.factor
    if config.scaling == "llama3":
        wavelength = 2 * math.pi / frequency
        longest = config.original_length / config.low_frequency_factor
        shortest = config.original_length / config.high_frequency_factor
        if wavelength > longest:
            return frequency / config.factor
        if wavelength > shortest:  # between the bounds: interpolate, linear in 1 / wavelength
            share = (1 / wavelength - 1 / longest) / (1 / shortest - 1 / longest)
            return frequency * (share + (1 - share) / config.factor)
    return frequency


def turn(x: np.ndarray, positions: np.ndarray, config: RotaryConfig) -> np.ndarray:
    """Rotate x [b, t, n, h]; features i and i + h/2 are a complex number (arXiv:2104.09864)."""
    half = x.shape[-1] // 2
    frequencies = [rotary_frequency(i, 2 * half, config) for i in range(half)]
    angles = positions[:, :, None, None] * np.array(frequencies)
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag], -1)


def alibi_slopes(heads: int) -> list[float]:
    """Return the slopes of arXiv:2108.12409 §3: 1/2, 1/4 ... 1/256 for 8 heads.

    N heads have the powers 1 to N of 2^(-8/N). If N is not a power of two, the heads beyond the
    largest power of two have every second slope of the next power of two.
    """
    if heads & (heads - 1) == 0:
        return [2 ** (-8 / heads * (i + 1)) for i in range(heads)]
    power = 1 << (heads.bit_length() - 1)
    return alibi_slopes(power) + alibi_slopes(2 * power)[::2][: heads - power]


def relative_bucket(distance: int, buckets: int, max_distance: int, bidirectional: bool) -> int:
    """Return the bucket of arXiv:1910.10683 §2.1; it compares integers, so nothing is rounded."""
    first = 0
    if bidirectional:
        buckets //= 2
        first = buckets if distance > 0 else 0
        distance = abs(distance)
    else:
        distance = max(-distance, 0)
    exact = buckets // 2
    if distance < exact:
        return first + distance
    far = buckets - exact
    # Bucket j begins where distance / exact = (max_distance / exact)^(j / far).
    held = [distance**far * exact**j >= max_distance**j * exact**far for j in range(far)]
    return first + exact + sum(held) - 1


class Plain:
    """A whole model: `Plain(config, params)(tokens, segments, positions, ...)` returns logits."""

    def __init__(self, config: ModelConfig, params: dict):
        self.config = config
        self.params = jax.tree.map(np.float64, params)

    def linear(self, p: dict, x: np.ndarray, axes: int = 1) -> np.ndarray:
        return np.tensordot(x, p["kernel"], axes) + p.get("bias", 0)

    def norm(self, p: dict, x: np.ndarray) -> np.ndarray:
        norm = self.config.norm
        if norm.kind == "none":
            return x
        assert ("bias" in p) == (norm.kind == "layernorm" and norm.bias)
        if norm.kind == "layernorm":
            x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + norm.epsilon)
        return x * p["scale"] + p.get("bias", 0)

    def bias(self, p: dict, positions: np.ndarray, bidirectional: bool) -> np.ndarray | float:
        """Return the bias [b, n, t, s] of attention scores in a stack with parameters `p`."""
        config = self.config.positions
        distances = positions[:, None, :] - positions[:, :, None]
        if config.kind == "alibi":
            slopes = np.array(alibi_slopes(self.config.attention.heads))
            return -slopes[:, None, None] * np.abs(distances)[:, None]
        if config.kind == "relative":
            bucket = partial(
                relative_bucket,
                buckets=config.buckets,
                max_distance=config.max_distance,
                bidirectional=bidirectional,
            )
            table = p["relative_bias"]["table"]
            return np.moveaxis(table[np.vectorize(bucket)(distances)], -1, 1)
        return 0.0

    def attention(
        self, p: dict, x, context, allowed, bias: Any = 0.0, positions: Any = None, rotary=None
    ) -> np.ndarray:
        q, k, v = (
            self.linear(p[name], z)
            for name, z in (("query", x), ("key", context), ("value", context))
        )
        if self.config.positions.kind == "rotary" and rotary is not None:
            q, k = (turn(z, positions, rotary) for z in (q, k))
        k, v = (np.repeat(z, q.shape[2] // k.shape[2], axis=2) for z in (k, v))
        scores = np.einsum("btnh,bsnh->bnts", q, k)
        scores = scores / (math.sqrt(q.shape[-1]) if self.config.attention.scaled else 1) + bias
        scores = np.where(allowed[:, None], scores, -1e300)
        weights = np.exp(scores - scores.max(-1, keepdims=True)) * allowed[:, None]
        total = weights.sum(-1, keepdims=True)
        weights = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
        return self.linear(p["out"], np.einsum("bnts,bsnh->btnh", weights, v), 2)

    def feed_forward(self, p: dict, x: np.ndarray) -> np.ndarray:
        config = self.config.feed_forward
        activation = ACTIVATIONS[config.activation]
        h = self.linear(p["up"], x)
        h = h * activation(self.linear(p["gate"], x)) if config.gated else activation(h)
        return self.linear(p["down"], h)

    def layer(self, index: int, length: int) -> tuple[np.ndarray, RotaryConfig, bool]:
        """Return a layer's window as pairs [t, t], its rotary config, and if it has positions."""
        pattern, attention = self.config.pattern, self.config.attention
        own = pattern[index % len(pattern)] if pattern else LayerConfig()
        window = attention.window if own.window is None else own.window
        rows = np.arange(length)
        near = np.abs(rows[:, None] - rows) <= (np.inf if window in (None, "all") else window)
        return near, own.rotary or self.config.positions.rotary, own.positions

    def attend_self(self, p: dict, x, allowed, signals: tuple) -> np.ndarray:
        return self.attention(p, x, x, allowed, *signals)

    def stack(self, p: dict, x, allowed, positions, bidirectional, context=None, cross=None):
        bias = self.bias(p, positions, bidirectional)
        for layer in range(p["blocks"]["self_attention"]["out"]["kernel"].shape[0]):
            block = jax.tree.map(lambda z: z[layer], p["blocks"])  # noqa: B023
            near, rotary, has_positions = self.layer(layer, x.shape[1])
            seen = allowed & near
            signals = (bias, positions, rotary) if has_positions else ()
            sublayers: dict[str, Any] = {
                "self_attention": partial(self.attend_self, allowed=seen, signals=signals),
                "cross_attention": lambda p, x: self.attention(p, x, context, cross),
                "feed_forward": self.feed_forward,
            }
            for name, sublayer in sublayers.items():
                if name not in block:
                    continue
                norm = partial(self.norm, block.get(f"{name}_norm"))
                kept = x if self.config.residuals else 0
                if self.config.norm.position == "pre":
                    x = kept + sublayer(block[name], norm(x))
                else:
                    x = norm(kept + sublayer(block[name], x))
        return self.norm(p["norm"], x) if "norm" in p else x

    def embed(self, name: str, tokens, positions, types=None) -> np.ndarray:
        p, kind = self.params.get(name, {}), self.config.positions.kind
        x = self.params["embedding"]["table"][tokens]
        if self.config.scale_embeddings:
            x = x * math.sqrt(x.shape[-1])
        if kind == "learned" or self.config.positions.learned:
            x = x + p["positions"]["table"][positions]
        if kind == "sinusoidal":
            half = np.arange(x.shape[-1] // 2)
            angles = positions[..., None] / 10000 ** (2 * half / x.shape[-1])
            x = x + np.concatenate([np.sin(angles), np.cos(angles)], -1)
        if self.config.type_vocab_size:
            x = x + p["types"][np.zeros_like(tokens) if types is None else types]
        x = self.norm(p.get("norm"), x) if self.config.norm.embeddings else x
        assert ("projection" in p) == (self.config.embedding_width is not None)
        return self.linear(p["projection"], x) if "projection" in p else x

    def logits(self, x: np.ndarray) -> np.ndarray:
        p, head = self.params.get("head", {}), self.config.head
        if head.transform:
            activation = ACTIVATIONS[self.config.feed_forward.activation]
            x = self.norm(p.get("norm"), activation(self.linear(p["transform"], x)))
        if head.scale:
            x = x / math.sqrt(x.shape[-1])
        kernel = self.params["embedding"]["table"].T if self.config.tie_embeddings else p["kernel"]
        assert ("bias" in p) == head.bias
        return x @ kernel + p.get("bias", 0)

    def __call__(
        self, tokens, segments, positions, *, types=None, prefix=None, source=None
    ) -> np.ndarray:
        """Return the logits.

        `prefix` holds lengths [b]; `source` holds tokens, segments and positions of the encoder.
        """

        def meet(a, b):
            return (a[:, :, None] == b[:, None, :]) & (b[:, None, :] != 0)

        p, allowed = self.params, meet(segments, segments)
        if self.config.architecture == "encoder_only":
            x = self.embed("inputs", tokens, positions, types)
            return self.logits(self.stack(p["encoder"], x, allowed, positions, True))
        past = np.tri(tokens.shape[1], dtype=bool)[None]
        if prefix is not None:
            past = past | (np.arange(tokens.shape[1]) < prefix[:, None, None])
        if self.config.architecture == "decoder_only":
            x = self.embed("inputs", tokens, positions, types)
            return self.logits(self.stack(p["decoder"], x, allowed & past, positions, False))
        assert source is not None
        source_tokens, source_segments, places = source
        x = self.embed("encoder_inputs", source_tokens, places)
        encoded = self.stack(p["encoder"], x, meet(source_segments, source_segments), places, True)
        x = self.embed("decoder_inputs", tokens, positions)
        cross = meet(segments, source_segments)
        x = self.stack(p["decoder"], x, allowed & past, positions, False, encoded, cross)
        return self.logits(x)
