"""No information goes where the masks forbid: by gradient, and by bits.

Each position of each row holds a token of its own, so the gradient for a row of the embedding table
is the gradient for one position; the head has its own matrix.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import random_params, tiny

from model.transformer import build

B, T, S = 2, 5, 7
V = B * (T + S)
TARGETS = np.arange(B * T).reshape(B, T)
SOURCES = B * T + np.arange(B * S).reshape(B, S)
SEGMENTS = np.array([[1, 1, 2, 2, 0], [3, 3, 3, 0, 0]])
SOURCE_SEGMENTS = np.array([[1, 1, 1, 2, 2, 0, 0], [3, 3, 3, 3, 3, 3, 0]])


def reachable(architecture: str, segments: np.ndarray) -> np.ndarray:
    """[b, t, token]: whether the scores at row b, position t may depend on it."""
    allowed = np.zeros((B, T, V), bool)
    for b, t in np.ndindex(B, T):
        allowed[b, t, TARGETS[b, t]] = True  # itself, even as padding, through the residual
        own = segments[b, t]
        if own == 0:
            continue
        for j in range(T):
            visible = j <= t or architecture == "encoder_only"
            if visible and segments[b, j] == own:
                allowed[b, t, TARGETS[b, j]] = True
        for j in range(S):
            if architecture == "encoder_decoder" and SOURCE_SEGMENTS[b, j] == own:
                allowed[b, t, SOURCES[b, j]] = True
    return allowed


@pytest.mark.parametrize(
    ("architecture", "changes", "has_segments"),
    [
        ("encoder_decoder", {}, True),
        ("encoder_decoder", {"norm_position": "pre", "remat": True}, True),
        ("decoder_only", {}, True),
        ("decoder_only", {"norm_position": "pre"}, False),
        ("encoder_only", {}, True),
    ],
)
def test_gradients_are_zero_exactly_where_nothing_may_be_seen(architecture, changes, has_segments):
    model = build(tiny(architecture, vocab_size=V, tie_embeddings=False, **changes))
    arrays: list[Any] = [jnp.array(TARGETS)]
    segments: dict[str, Any] = {"segment_ids": jnp.array(SEGMENTS)} if has_segments else {}
    if architecture == "encoder_decoder":
        arrays.append(jnp.array(SOURCES))
        segments["encoder_segment_ids"] = jnp.array(SOURCE_SEGMENTS)
    params = random_params(model, *arrays)
    direction = jnp.array(np.random.default_rng(0).normal(size=V))

    @jax.jit
    @jax.jacrev
    def jacobian(table):
        changed = params | {"embedding": {"table": table}}
        return model.apply({"params": changed}, *arrays, **segments) @ direction

    gradient = np.asarray(jacobian(params["embedding"]["table"]))  # [b, t, token, feature]
    own = SEGMENTS if has_segments else np.ones_like(SEGMENTS)
    np.testing.assert_array_equal((gradient != 0).any(-1), reachable(architecture, own))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_padding_and_the_future_change_no_bit(dtype: str):
    model = build(tiny(vocab_size=V, dtype=dtype))
    params = random_params(model, jnp.array(TARGETS), jnp.array(SOURCES))
    segments = (SEGMENTS != 0).astype(int)
    source_segments = (SOURCE_SEGMENTS != 0).astype(int)

    @jax.jit
    def run(targets, sources):
        return model.apply(
            {"params": params},
            targets,
            sources,
            segment_ids=jnp.array(segments),
            encoder_segment_ids=jnp.array(source_segments),
        )

    logits = np.asarray(run(TARGETS, SOURCES))
    real = segments == 1
    targets = np.where(real, TARGETS, (TARGETS * 7 + 3) % V)
    sources = np.where(source_segments == 1, SOURCES, (SOURCES * 5 + 1) % V)
    np.testing.assert_array_equal(run(targets, sources)[real], logits[real])
    for t in range(1, T):
        later = np.where(np.arange(T) < t, TARGETS, (TARGETS + 13) % V)
        changed = np.asarray(run(later, SOURCES))
        np.testing.assert_array_equal(changed[:, :t][real[:, :t]], logits[:, :t][real[:, :t]])
        assert (changed[:, t] != logits[:, t]).any(-1).all()
    # What is real does matter, or nothing above would mean much.
    sources = np.where(np.arange(S) == 0, (SOURCES + 3) % V, SOURCES)
    assert (np.asarray(run(TARGETS, sources)) != logits).any(-1)[real].all()


@pytest.mark.parametrize("architecture", ["encoder_decoder", "decoder_only"])
def test_packed_documents_give_what_they_give_alone(architecture: str):
    # Three documents, alone in a row with padding, and packed into one row.
    lengths, source_lengths = [3, 1, 2], [2, 4, 3]
    rng = np.random.default_rng(0)
    alone = [rng.integers(0, V, (3, n)) for n in (max(lengths), max(source_lengths))]
    real = [np.arange(max(n)) < np.array(n)[:, None] for n in (lengths, source_lengths)]
    packed = [tokens[mask][None] for tokens, mask in zip(alone, real, strict=True)]
    places = [np.concatenate([np.arange(n) for n in ns])[None] for ns in (lengths, source_lengths)]
    ids = [np.repeat([1, 2, 3], ns)[None] for ns in (lengths, source_lengths)]

    model = build(tiny(architecture, vocab_size=V))
    prefixes = ("", "encoder_") if architecture == "encoder_decoder" else ("",)

    @partial(jax.jit, static_argnums=0)
    def apply(size, params, tokens, segments, positions):
        named: dict[str, Any] = {}
        for i, prefix in enumerate(prefixes):
            named[f"{prefix}segment_ids"] = segments[i]
            named[f"{prefix}positions"] = positions[i]
        return model.apply({"params": params}, *tokens[:size], **named)

    size = len(prefixes)
    params = random_params(model, *(jnp.array(x) for x in alone[:size]))
    together = apply(size, params, packed, ids, places)
    counts = [np.arange(x.shape[1])[None].repeat(3, 0) for x in alone]
    apart = apply(size, params, alone, [mask.astype(int) for mask in real], counts)
    scale = np.abs(together).max()
    np.testing.assert_allclose(together[0] / scale, apart[real[0]] / scale, atol=1e-6)
