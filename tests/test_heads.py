"""Test classifier heads: pooling without padding (language models: test_transformer)."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import TOKENS, WIDTH, B, T, V, init, tiny

from heedful.model.heads import Classifier, pool
from heedful.model.layers import Embedding

CLASSES = 4
X = np.random.default_rng(0).normal(size=(B, T, WIDTH))
SEGMENTS = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])
LENGTHS = SEGMENTS.sum(1)
POOLED = {
    "first": X[:, 0],
    "mean": np.stack([X[b, :n].mean(0) for b, n in enumerate(LENGTHS)]),
    "last": np.stack([X[b, n - 1] for b, n in enumerate(LENGTHS)]),
}


def classifier(architecture: str = "encoder_only", outputs: int | None = CLASSES, **changes: Any):
    return tiny(architecture, head_kind="classifier", head_outputs=outputs, **changes)


@pytest.mark.parametrize("pooling", POOLED)
def test_what_is_pooled(pooling: str):
    x, segments = jnp.float32(X), jnp.array(SEGMENTS)
    np.testing.assert_allclose(pool(x, segments, pooling), POOLED[pooling], rtol=1e-5, atol=1e-6)
    whole = {"first": X[:, 0], "mean": X.mean(1), "last": X[:, -1]}[pooling]
    np.testing.assert_allclose(pool(x, None, pooling), whole, rtol=1e-5, atol=1e-6)
    # NaN in padding does not change the result, and padding gets no gradient.
    padded = jnp.where(segments[..., None] > 0, x, jnp.nan)
    np.testing.assert_array_equal(pool(padded, segments, pooling), pool(x, segments, pooling))
    gradient = jax.grad(lambda x: jnp.sum(jnp.sin(pool(x, segments, pooling))))(padded)
    assert not np.asarray(gradient)[SEGMENTS == 0].any()
    # The result for a row of padding, as at the end of a dataset, is finite.
    assert np.isfinite(pool(x, jnp.zeros_like(segments), pooling)).all()


def test_a_mean_of_bfloat16_is_summed_up_in_float32():
    x = jnp.ones((1, 1000, 1), jnp.bfloat16).at[0, 0].set(300)
    mean = pool(x, None, "mean")
    assert mean.dtype == jnp.bfloat16
    assert float(mean[0, 0]) == pytest.approx(1.299, rel=4e-3)  # In bfloat16, 256 + 1 is 256.


@pytest.mark.parametrize(
    ("outputs", "pooler", "pooling"), [(CLASSES, True, "first"), (1, False, "last")]
)
def test_scores_of_classes(outputs: int, pooler: bool, pooling: str):
    config = classifier(outputs=outputs, head_pooler=pooler, head_pooling=pooling, head_dropout=0.5)
    module, params = Classifier(config), init(config)[1]["head"]
    arrays = jnp.float32(X), Embedding(config), jnp.array(SEGMENTS)
    assert params.keys() == ({"pooler", "classes"} if pooler else {"classes"})
    expected = POOLED[pooling]
    for name in ("pooler", "classes") if pooler else ("classes",):
        expected = expected @ np.float64(params[name]["kernel"]) + params[name]["bias"]
        expected = np.tanh(expected) if name == "pooler" else expected
    scores: Any = module.apply({"params": params}, *arrays)
    assert scores.shape == (B, outputs)
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-5)
    # The scores are linear in the pooled features, of which training drops about half.
    rngs = {"dropout": jax.random.key(0)}
    loud: Any = module.apply({"params": params}, *arrays, deterministic=False, rngs=rngs)
    assert (np.abs(loud - scores) > 1e-4).all()


def test_scores_are_float32_whatever_the_compute_type():
    model, params = init(classifier(dtype="bfloat16", vocab_size=V))
    scores = jax.jit(model.apply)({"params": params}, TOKENS)
    assert (scores.shape, scores.dtype) == ((B, CLASSES), jnp.float32)
    rounded = scores.astype(jnp.bfloat16).astype(jnp.float32)
    assert (rounded != scores).mean() > 0.9  # The scores were computed in float32.


@pytest.mark.parametrize(
    ("architecture", "pooling"),
    [("encoder_only", "first"), ("encoder_only", "mean"), ("decoder_only", "last")],
)
def test_padding_changes_no_bit_of_a_class_and_what_is_real_does(architecture, pooling):
    model, params = init(classifier(architecture, head_pooling=pooling, dtype="bfloat16"))

    @jax.jit
    def run(tokens):
        return model.apply({"params": params}, tokens, segment_ids=jnp.array(SEGMENTS))

    scores = run(TOKENS)
    others = (TOKENS + 3) % V
    np.testing.assert_array_equal(run(jnp.where(SEGMENTS > 0, TOKENS, others)), scores)
    for t in range(T):
        changed = np.asarray(run(jnp.where(np.arange(T) == t, others, TOKENS)) != scores)
        np.testing.assert_array_equal(changed.any(-1), t < LENGTHS)


def test_a_classifier_without_outputs_says_where_they_come_from():
    with pytest.raises(ValueError, match=r"model\.head\.outputs is not set"):
        init(classifier(outputs=None))
