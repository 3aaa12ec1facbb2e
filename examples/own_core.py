"""Write an attention core, compare it with dense attention, and test that it follows the masks.

python examples/own_core.py; a config names this core by `--model.attention.core own_core:SPEC`.
"""

import jax
import jax.numpy as jnp

import heedful as hf
from heedful.model.attention.core import AttentionCall, CoreSpec


def chunked(call: AttentionCall, size: int = 8) -> jax.Array:
    """Compute softmax attention for `size` queries at a time: the scores need little memory."""
    SPEC.require(call)
    (B, T, N, H), (S, K) = call.q.shape, call.k.shape[1:3]
    queries = call.q.reshape(B, T, K, N // K, H)

    def some(index: jax.Array) -> jax.Array:
        allowed = call.mask.tile(index, jnp.arange(S))[:, :, None]  # [b, n, 1, t, S]
        scores = jnp.einsum("BTKGH,BSKH->BKGTS", queries[:, index], call.k) * call.factor
        scores = jnp.where(allowed, scores, jnp.finfo(scores.dtype).min)
        weights = jax.nn.softmax(scores) * allowed  # A query without keys gives 0.
        return jnp.einsum("BKGTS,BSKH->BTKGH", weights, call.v)

    parts = [some(jnp.arange(start, min(start + size, T))) for start in range(0, T, size)]
    return jnp.concatenate(parts, axis=1).reshape(B, T, N, H)


def refusal(call: AttentionCall) -> str | None:
    """Name what this core does not support, and the fix."""
    if call.bias is not None or call.dropout_rate or call.mask.dilation is not None:
        return "it has no bias, dropout or dilation: leave them out"
    return None


SPEC = CoreSpec(name="chunked", make=lambda config, shared: chunked, refusal=refusal)


def main() -> None:
    q, k, v = (jax.random.normal(jax.random.key(i), (2, 20, 4, 16)) for i in range(3))
    mask = hf.masks.causal() & hf.masks.sliding(5, 0)
    # An import path makes Python import this file once more, under the name own_core.
    own, dense = (hf.attention(q, k, v, mask, core=core) for core in ("own_core:SPEC", "dense"))
    print(f"largest difference from dense: {jnp.abs(own - dense).max():.1e}")

    attention = hf.AttentionConfig(heads=2, core="own_core:SPEC")
    config = hf.ModelConfig(
        architecture="decoder_only", vocab_size=64, width=32, layers=2, attention=attention
    )
    findings = hf.audit(hf.build(config), hf.init(hf.build(config), jax.random.key(0)))
    print(f"leaks and blind positions: {findings or 'none'}")


if __name__ == "__main__":
    main()
