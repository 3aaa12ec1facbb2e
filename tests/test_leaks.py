"""Test that no information flows where masks forbid it, by gradients and by bits.

Each position of each row holds a different token. Therefore the gradient for a row of the embedding
table is the gradient for one position; the head has its own matrix.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from tiny import POSITIONS, random_params, tiny

from heedful.model.transformer import build

B, T, S = 2, 5, 7
V = B * (T + S)
TARGETS = np.arange(B * T).reshape(B, T)
SOURCES = B * T + np.arange(B * S).reshape(B, S)
SEGMENTS = np.array([[1, 1, 2, 2, 0], [3, 3, 3, 0, 0]])
SOURCE_SEGMENTS = np.array([[1, 1, 1, 2, 2, 0, 0], [3, 3, 3, 3, 3, 3, 0]])
PREFIX = np.array([4, 2])


def reachable(architecture: str, segments: np.ndarray, prefix: np.ndarray) -> np.ndarray:
    """Return [b, t, token], True where the logits at row b, position t may depend on the token."""
    allowed = np.zeros((B, T, V), bool)
    for b, t in np.ndindex(B, T):
        # The residual connection carries a token to its own position, in padding too.
        allowed[b, t, TARGETS[b, t]] = True
        own = segments[b, t]
        if own == 0:
            continue
        for j in range(T):
            visible = j <= t or j < prefix[b] or architecture == "encoder_only"
            if visible and segments[b, j] == own:
                allowed[b, t, TARGETS[b, j]] = True
        for j in range(S):
            if architecture == "encoder_decoder" and SOURCE_SEGMENTS[b, j] == own:
                allowed[b, t, SOURCES[b, j]] = True
    return allowed


@pytest.mark.parametrize(
    ("architecture", "changes", "has_segments"),
    [
        ("encoder_decoder", {"norm_position": "pre", "remat": "full"}, True),
        ("decoder_only", {}, True),
        ("prefix", POSITIONS["rotary"], False),
        ("prefix", {"attention_core": "flash", **POSITIONS["relative"]}, True),
        ("prefix", POSITIONS["relative"], True),
        ("encoder_only", POSITIONS["alibi"], True),
    ],
)
def test_gradients_are_zero_exactly_where_nothing_may_be_seen(architecture, changes, has_segments):
    has_prefix = architecture == "prefix"
    architecture = "decoder_only" if has_prefix else architecture
    model = build(tiny(architecture, vocab_size=V, tie_embeddings=False, **changes))
    arrays: list[Any] = [jnp.array(TARGETS)]
    segments: dict[str, Any] = {"segment_ids": jnp.array(SEGMENTS)} if has_segments else {}
    if architecture == "encoder_decoder":
        arrays.append(jnp.array(SOURCES))
        segments["encoder_segment_ids"] = jnp.array(SOURCE_SEGMENTS)
    prefix = PREFIX if has_prefix else np.zeros(B)
    if has_prefix:
        segments["prefix_len"] = jnp.array(PREFIX)
    params = random_params(model, *arrays)
    direction = jnp.array(np.random.default_rng(0).normal(size=V))

    @jax.jit
    @jax.jacrev
    def jacobian(table):
        changed = params | {"embedding": {"table": table}}
        logits: Any = model.apply({"params": changed}, *arrays, **segments)
        return logits @ direction

    gradient = np.asarray(jacobian(params["embedding"]["table"]))  # [b, t, token, feature]
    own = SEGMENTS if has_segments else np.ones_like(SEGMENTS)
    np.testing.assert_array_equal((gradient != 0).any(-1), reachable(architecture, own, prefix))


@pytest.mark.parametrize("dtype", quick.only(["float32"], ["float32", "bfloat16"]))
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
    # Real tokens change the logits; otherwise the checks above would prove nothing.
    sources = np.where(np.arange(S) == 0, (SOURCES + 3) % V, SOURCES)
    assert (np.asarray(run(TARGETS, sources)) != logits).any(-1)[real].all()


@pytest.mark.parametrize(
    ("architecture", "kind", "core"),
    [(name, kind, "dense") for name in ("encoder_only", "decoder_only") for kind in POSITIONS]
    # The stacks of an encoder_decoder are tested above, but its inputs differ.
    + [("encoder_decoder", kind, "dense") for kind in ("sinusoidal", "rotary", "relative")]
    + [("encoder_decoder", "relative", "flash"), ("decoder_only", "alibi", "flash")],
)
def test_packed_documents_give_what_they_give_alone(architecture: str, kind: str, core: str):
    """Compare three documents in one row with each document alone, in place and at column 0.

    In place, with padding instead of the other documents, the arithmetic is the same, and so are
    the bits. At column 0 sums run over other columns, which rounds differently.
    """
    names = ("encoder_", "") if architecture == "encoder_decoder" else ("",)
    lengths = {"": [3, 1, 2], "encoder_": [2, 4, 3]}
    rng = np.random.default_rng(0)
    packed: dict[str, Any] = {}
    for name in names:
        packed[f"{name}inputs"] = rng.integers(0, V, sum(lengths[name]))[None]
        packed[f"{name}segment_ids"] = np.repeat([5, 2, 3], lengths[name])[None]
        packed[f"{name}positions"] = np.concatenate([np.arange(n) for n in lengths[name]])[None]
    model = build(tiny(architecture, vocab_size=V, attention_core=core, **POSITIONS[kind]))
    params = random_params(model, *(jnp.array(packed[f"{name}inputs"]) for name in names[::-1]))
    run = jax.jit(lambda params, batch: model.apply({"params": params}, **batch))
    together = np.asarray(run(params, packed))
    scale = np.abs(together).max()

    for document, segment in enumerate((5, 2, 3)):
        own = packed["segment_ids"] == segment
        in_place, from_start = {}, {}
        for name in names:
            tokens, ids = packed[f"{name}inputs"], packed[f"{name}segment_ids"]
            here, length = ids == segment, lengths[name][document]
            columns = np.arange(tokens.shape[1])[None]
            in_place[f"{name}inputs"] = np.where(here, tokens, (tokens + 3) % V)
            in_place[f"{name}segment_ids"] = np.where(here, ids, 0)
            in_place[f"{name}positions"] = packed[f"{name}positions"]
            from_start[f"{name}inputs"] = np.zeros_like(tokens)
            from_start[f"{name}inputs"][:, :length] = tokens[here]
            from_start[f"{name}segment_ids"] = (columns < length).astype(int)
            from_start[f"{name}positions"] = columns
        np.testing.assert_array_equal(run(params, in_place)[own], together[own])
        alone = run(params, from_start)[:, : lengths[""][document]]
        np.testing.assert_allclose(alone[0] / scale, together[own] / scale, atol=1e-5)
