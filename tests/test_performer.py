"""Test attention by random features: formula in float64, estimate of the softmax, and cache."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from test_generate import PROMPTS, Plain, small
from test_generate import make as make_generator
from test_translate import TEXTS
from test_translate import make as make_translator
from test_translate import plain as translate_plainly
from tiny import POSITIONS, SEGMENTS, TOKENS, B, init, random_params, tiny

from heedful.model import masks
from heedful.model.attention import AttentionCall
from heedful.model.attention.dense import dense
from heedful.model.attention.kernel_sums import FeatureState
from heedful.model.attention.performer import Performer
from heedful.model.attention.random_features import EPSILON, draw_features, fixed_features
from heedful.model.config import PerformerConfig
from heedful.model.masks import AttentionMask, MaskNotSupported
from heedful.model.positions import PositionBias
from heedful.model.transformer import build, empty_cache
from heedful.train.inference import generate

T, N, K, H, R = 13, 6, 3, 5, 11
IDS = jnp.array(
    [[1] * 4 + [2] * 6 + [3] * 3, [1] * 7 + [0] * 6, [0, 0, 1, 1, 0, 1, 2, 2, 2, 0, 2, 5, 5]]
)
ONE = jnp.minimum(IDS, 1)
LENGTHS = jnp.array([2, 5, 8])
MASKS = {
    "full": masks.full(),
    "padding": masks.packed(ONE),
    "packed": masks.packed(IDS),
    "padding before a source": masks.cross(
        jnp.ones_like(IDS).at[1].set(IDS[0]),
        ONE.at[0, :2].set(0).at[1].set(IDS[0]),
    ),
    "causal": masks.causal(),
    "causal packed": masks.causal() & masks.packed(IDS),
    "prefix": masks.prefix(LENGTHS),
    "prefix and padding": masks.prefix(LENGTHS) & masks.packed(ONE),
}
CROSS = masks.cross(ONE[:, :7], ONE)


def inputs(length: int = T, seed: int = 0, size: float = 1.0) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    shapes = (3, length, N, H), (3, T, K, H), (3, T, K, H)
    return tuple(size * rng.normal(size=shape) for shape in shapes)


def performer(**values) -> Performer:
    return Performer(PerformerConfig(**{"features": R, "chunk": 4} | values))


def naive(core: Performer, q, k, v, allowed, scale: float = H**-0.5):
    """Compute attention from phi(q) phi(k) of each pair, in the type of the inputs."""
    numpy = np if isinstance(q, np.ndarray) else jnp
    w = fixed_features(core.config, H).astype(q.dtype)

    def phi(x):
        x = x * scale**0.5
        if core.config.kernel == "relu":
            return numpy.maximum(x @ w.T, 0) + EPSILON
        return numpy.exp(x @ w.T - (x**2).sum(-1, keepdims=True) / 2)

    grouped = phi(q).reshape(*q.shape[:2], K, N // K, R)
    weights = numpy.einsum("btkgr,bskr->bkgts", grouped, phi(k)) * allowed[:, :, None]
    total = weights.sum(-1, keepdims=True)
    weights = weights / numpy.where(total > 0, total, 1)
    return numpy.einsum("bkgts,bskh->btkgh", weights, v).reshape(q.shape)


def allowed_by(mask: AttentionMask, length: int = T) -> np.ndarray:
    return np.asarray(mask.to_bool(length, T))


# The formula ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", quick.only(["softmax"], ["softmax", "relu"]))
@pytest.mark.parametrize("name", [*MASKS, "cross"])
def test_values_and_gradients_are_those_of_the_formula(name: str, kernel: str):
    mask, length = (CROSS, 7) if name == "cross" else (MASKS[name], T)
    allowed, arrays = allowed_by(mask, length), inputs(length)
    core = performer(kernel=kernel)  # 13 tokens: 3 chunks of 4 tokens, and 1 token

    @jax.jit
    def both(*arrays):
        out, pull = jax.vjp(lambda *x: core.apply({}, AttentionCall(*x, mask, scale=0.7)), *arrays)
        plain, plain_pull = jax.vjp(lambda *x: naive(core, *x, allowed, 0.7), *arrays)
        g = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
        return (out, *pull(g)), (plain, *plain_pull(g))

    found, expected = both(*map(jnp.float32, arrays))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(found[0], naive(core, *arrays, allowed, 0.7), atol=2e-6)


@pytest.mark.parametrize("name", ["causal packed", "packed", "prefix"])
def test_chunks_change_nothing(name: str):
    arrays = tuple(map(jnp.float32, inputs()))
    call = AttentionCall(*arrays, MASKS[name])
    outs = [jax.jit(performer(chunk=c).apply)({}, call) for c in (3, 13, 128)]
    np.testing.assert_allclose(outs[0], outs[1], atol=1e-6)
    np.testing.assert_array_equal(outs[1], outs[2])


@pytest.mark.parametrize("dtype", quick.only([jnp.float32], [jnp.float32, jnp.bfloat16]))
@pytest.mark.parametrize("name", ["padding", "packed", "causal packed", "cross"])
def test_a_query_that_sees_nothing_gives_zero_and_gets_zero(name: str, dtype):
    mask, length = (CROSS, 7) if name == "cross" else (MASKS[name], T)
    if name == "cross":  # The source of row 1 is all padding.
        mask = masks.cross(ONE[:, :7], ONE.at[1].set(0))
    allowed = allowed_by(mask, length)[:, 0]
    q, k, v = (jnp.asarray(x, dtype) for x in inputs(length))

    @jax.jit
    def run(q, k, v):
        out, pull = jax.vjp(lambda *x: performer().apply({}, AttentionCall(*x, mask)), q, k, v)
        return out, *pull(3 * jnp.ones_like(out))

    out, dq, dk, dv = run(q, k, v)
    for x in (out, dq, dk, dv):
        assert x.dtype == dtype
        assert np.isfinite(np.float32(x)).all()
    empty, unseen = ~allowed.any(2), ~allowed.any(1)
    assert empty.any()
    assert not np.asarray(out[empty]).any()
    assert not np.asarray(dq[empty]).any()
    assert not np.asarray(dk[unseen]).any()
    assert not np.asarray(dv[unseen]).any()
    assert np.asarray(out[~empty]).all()
    assert np.asarray(dv[~unseen]).all()


def test_causality_is_exact():
    core, (q, k, v) = performer(chunk=8), map(jnp.float32, inputs())
    run = jax.jit(lambda k, v: core.apply({}, AttentionCall(q, k, v, masks.causal())))
    # Later keys in the same chunk do not even change the rounding of the first 5 outputs.
    later = run(k.at[:, 5:].multiply(3.0), v.at[:, 5:].add(7.0))
    np.testing.assert_array_equal(later[:, :5], run(k, v)[:, :5])
    assert (later[:, 5:] != run(k, v)[:, 5:]).all()


@pytest.mark.parametrize("name", ["full", "causal", "packed", "prefix"])
def test_large_keys_and_queries_neither_overflow_nor_vanish(name: str):
    core, mask, allowed = performer(), MASKS[name], allowed_by(MASKS[name])

    @jax.jit
    def run(q, k, v):
        out, pull = jax.vjp(lambda *x: core.apply({}, AttentionCall(*x, mask)), q, k, v)
        return out, *pull(jnp.ones_like(out))

    # Norms are up to 20, so that the features of keys differ by factors of e^100 and more.
    sizes = np.linspace(0.1, 9, T)
    for order in (sizes, sizes[::-1]):
        q, k, v = inputs()
        k = k * order[:, None, None]
        found = run(*map(jnp.float32, (q, k, v)))
        assert all(np.isfinite(x).all() for x in found)
        np.testing.assert_allclose(found[0], naive(core, q, k, v, allowed), atol=1e-4)
    q, k, v = inputs(size=1e4)
    for x in run(*map(jnp.float32, (q, k, v))):
        assert np.isfinite(x).all()


def test_bfloat16_computes_features_and_sums_in_float32():
    q, k, v = (jnp.asarray(2 * x, jnp.bfloat16) for x in inputs())
    expected = naive(performer(), *(np.float64(x) for x in (q, k, v)), allowed_by(masks.causal()))
    for core in (performer(), performer(chunk=13)):
        out = core.apply({}, AttentionCall(q, k, v, masks.causal()))
        assert out.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.float64(out), expected, rtol=2**-8, atol=1e-6)


# Refused calls ----------------------------------------------------------------------------------


def test_what_cannot_be_expressed_is_refused(unchecked):
    q, k, v = map(jnp.float32, inputs())

    def apply(*given, **options):
        return performer().apply({}, AttentionCall(*given, **options))

    with pytest.raises(MaskNotSupported, match=r"no window \(2, 3\).*model\.attention\.window"):
        apply(q, k, v, masks.sliding(2, 3))
    with pytest.raises(MaskNotSupported, match=r"model\.positions\.kind other than alibi"):
        apply(q, k, v, masks.full(), bias=PositionBias(jnp.ones(N)))
    with pytest.raises(MaskNotSupported, match=r"model\.attention\.dropout to 0, not 0\.1"):
        apply(q, k, v, masks.full(), dropout_rate=0.1, dropout_key=jax.random.key(0))
    with pytest.raises(MaskNotSupported, match=r"not 7 queries and 13 keys"):
        apply(q[:, :7], k, v, masks.causal())
    with pytest.raises(MaskNotSupported, match=r"model\.cache\.new_cache"):
        apply(q, k, v, masks.causal().at(2))
    with pytest.raises(ValueError, match="describes 7 q positions, there are 13"):
        apply(q, k, v, CROSS)
    with pytest.raises(ValueError, match="shapes do not fit"):
        apply(q[:, :, :5], k, v, masks.full())
    state = FeatureState.zeros(3, K, R, H)
    with pytest.raises(MaskNotSupported, match="one causal document"):
        performer().apply({}, state, AttentionCall(q, k, v, masks.full()), method="extend")
    with pytest.raises(ValueError, match="no cache for"):
        state.attend(dense, AttentionCall(q, k, v, masks.causal()))


def test_rows_that_are_not_known_to_be_wrong_while_tracing_become_nan():
    q, k, v = map(jnp.float32, inputs())
    descending = jnp.array([[1] * 6 + [2] * 7, [2] * 6 + [1] * 7, [1, 2, 1] + [0] * 10])
    wrong = {
        "causal": (masks.causal() & masks.packed(descending), [False, True, True]),
        "both": (masks.packed(descending), [False, True, True]),
        "prefix": (masks.prefix(LENGTHS) & masks.packed(IDS), [True, False, True]),
        "cross": (masks.cross(ONE, IDS), [True, False, True]),
    }
    for mask, is_wrong in wrong.values():
        out = np.asarray(jax.jit(performer().apply)({}, AttentionCall(q, k, v, mask)))
        assert np.isnan(out).all((1, 2, 3)).tolist() == is_wrong
        right = ~np.array(is_wrong)
        expected = naive(performer(), *inputs(), allowed_by(mask))
        np.testing.assert_allclose(out[right], expected[right], atol=1e-5)
    # Cross-attention to several documents gives NaN too.
    mask = masks.cross(IDS[:, :7], IDS)
    out = performer().apply({}, AttentionCall(q[:, :7], k, v, mask))
    assert np.isnan(out).all((1, 2, 3)).tolist() == [True, False, True]


# The estimate -----------------------------------------------------------------------------------


def rows_of(features: int, orthogonal: bool, seeds: int, head_dim: int = 8) -> jax.Array:
    config = PerformerConfig(features=features, orthogonal=orthogonal)
    draw = partial(draw_features, config, head_dim)
    return jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(features), seeds))


@pytest.mark.parametrize("orthogonal", [True, False])
def test_products_of_features_are_unbiased(orthogonal: bool):
    rng = np.random.default_rng(0)
    q, k = rng.normal(0, 0.5, (2, 8))
    # 12 features are one and a half orthogonal blocks.
    w = np.asarray(rows_of(12, orthogonal, 20_000))
    products = np.exp(w @ (q + k) - (q @ q + k @ k) / 2)
    error = products.mean(1).std() / np.sqrt(len(w))
    assert abs(products.mean() - np.exp(q @ k)) < 4 * error < 0.03
    # Each single feature must be unbiased; QR alone would not give this.
    deviation = (products.mean(0) - np.exp(q @ k)) / (products.std(0) / np.sqrt(len(w)))
    assert abs(deviation).max() < 4
    fixed = fixed_features(PerformerConfig(features=12, orthogonal=orthogonal), 8)
    for rows in (fixed, w[0]):
        inner = rows[:8] @ rows[:8].T
        off = abs(inner - np.diag(np.diag(inner))).max()
        assert off < 1e-4 if orthogonal else off > 1


@pytest.mark.slow
def test_the_error_falls_with_the_root_of_the_features_and_is_less_if_orthogonal():
    rng = np.random.default_rng(0)
    # For scaled q and k the relative variance of a weight is (exp(|q + k|^2) - 1) / R. The law
    # holds if this variance is below 1 even for the fewest features. With a deviation of 0.8
    # instead of 0.4 the variance is larger, and the exponent over these counts is -0.19.
    q, k, v = (jnp.float32(rng.normal(0, s, (1, 31, 1, 8))) for s in (0.4, 0.4, 1))
    call = AttentionCall(q, k, v, masks.full())
    exact = dense(call)
    counts = np.array([16, 32, 64, 128, 256, 512, 1024])

    def error(features: int, orthogonal: bool) -> float:
        config = PerformerConfig(features=features, orthogonal=orthogonal)

        @jax.jit
        @jax.vmap
        def squared(key):
            out = Performer(config).apply({}, call, rngs={"features": key})
            return jnp.mean((out - exact) ** 2)

        return float(jnp.sqrt(jnp.mean(squared(jax.random.split(jax.random.key(7), 200)))))

    errors = {o: np.array([error(int(n), o) for n in counts]) for o in (True, False)}
    for of in errors.values():
        exponent = np.polyfit(np.log(counts), np.log(of), 1)[0]
        assert -0.6 < exponent < -0.4
    assert (errors[True] < errors[False]).all()


def test_a_stream_of_keys_draws_and_no_stream_is_one_draw():
    arrays = tuple(map(jnp.float32, inputs()))
    call = AttentionCall(*arrays, masks.full())
    run = jax.jit(lambda rngs: performer().apply({}, call, rngs=rngs))
    first, second = run({"features": jax.random.key(0)}), run({"features": jax.random.key(1)})
    assert (first != second).any()
    np.testing.assert_array_equal(first, run({"features": jax.random.key(0)}))
    np.testing.assert_array_equal(run({}), run({"dropout": jax.random.key(1)}))
    assert (run({}) != first).any()


# The cache --------------------------------------------------------------------------------------

CORE = {"attention_core": "performer", "attention_performer": PerformerConfig(features=7, chunk=2)}
UNBIASED = [kind for kind in POSITIONS if kind not in ("alibi", "relative")]


@pytest.mark.parametrize("kind", quick.only(["rotary"], UNBIASED))
def test_a_decoder_decodes_with_sums_as_it_was_taught(kind: str):
    config = tiny("decoder_only", **POSITIONS[kind] | CORE)
    model, params = init(config)

    @jax.jit
    def run(params):
        decode = partial(model.apply, {"params": params}, method="decode")
        real = jnp.array([[True, True, True], [True, False, False], [True, True, False]])
        options = {"cache": empty_cache(config, B, 13), "cache_write_mask": real, "offset": 0}
        first, cache = decode(TOKENS[:, :3], **options)
        rest = []
        for step in range(2):  # Each row continues at its own position.
            at = jnp.sum(real, 1) + step
            token = TOKENS[jnp.arange(B), at][:, None]
            logits, cache = decode(token, cache=cache, offset=at)
            rest.append((at, logits[:, 0]))
        return model.apply({"params": params}, TOKENS), first, rest, cache

    whole, first, rest, cache = run(params)
    np.testing.assert_allclose(first[0], whole[0, :3], atol=1e-5)
    for at, logits in rest:
        np.testing.assert_allclose(logits, whole[np.arange(B), at], atol=1e-5, rtol=1e-5)
    # The size of the cache does not depend on the length.
    assert jax.tree.map(jnp.shape, cache) == jax.tree.map(jnp.shape, empty_cache(config, B, 1))


@pytest.mark.parametrize("kind", quick.only(["rotary"], UNBIASED))
def test_a_batch_of_texts_is_what_each_alone_gives(kind: str, monkeypatch):
    monkeypatch.setattr(generate, "CHUNK", 6)  # The last chunk overlaps the one before.
    config = small(positions=kind, positions_max_length=25, **CORE)
    generator = make_generator(config, temperature=3.0, seed=3)
    assert generator(PROMPTS) == Plain(generator)(PROMPTS)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"temperature": 3.0, "prefix": True}, {"beam": 2}])
def test_so_are_those_after_a_prefix_and_of_a_search(options: dict):
    generator = make_generator(small(**CORE), **options)
    together = generator(PROMPTS)
    if "prefix" in options:
        assert together == Plain(generator)(PROMPTS)
    else:
        assert together == [generator([prompt])[0] for prompt in PROMPTS]
    assert len(set(together)) > 3


@pytest.mark.slow
def test_a_translation_reads_its_begin_token_once():
    translator = make_translator(positions="rotary", temperature=2.0)
    attention = dataclasses.replace(
        translator.model.attention, core="performer", performer=CORE["attention_performer"]
    )
    model = dataclasses.replace(translator.model, attention=attention)
    params = random_params(build(model), TOKENS, TOKENS, scale=0.7)
    translator = type(translator)(
        model, translator.decode, translator.tokenizer, params, translator.mesh
    )
    expected = translate_plainly(translator, TEXTS)
    decode = translator.tokenizer.decode
    texts = [decode(expected[i][0]) if i in expected else "" for i in range(len(TEXTS))]
    assert translator(TEXTS) == texts


@pytest.mark.slow
def test_a_prefix_after_other_tokens_becomes_nan():
    config = tiny("decoder_only", **CORE)
    model, params = init(config)
    decode = partial(model.apply, {"params": params}, method="decode")
    cache = empty_cache(config, B, 9)
    options = {"prefix_len": jnp.array([2, 2, 2])}
    logits, cache = decode(TOKENS[:, :2], cache=cache, offset=0, **options)
    whole = model.apply({"params": params}, TOKENS, **options)
    np.testing.assert_allclose(logits, whole[:, :2], atol=1e-5)
    assert np.isnan(decode(TOKENS[:, 2:], cache=cache, offset=2, **options)[0]).all()


# In a model -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("dtype", quick.only(["float32"], ["float32", "bfloat16"]))
@pytest.mark.parametrize("kernel", quick.only(["softmax"], ["softmax", "relu"]))
def test_it_learns_to_copy(kernel: str, dtype: str):
    core = PerformerConfig(features=16, kernel=kernel, chunk=4)
    config = tiny("encoder_only", dtype=dtype, attention_core="performer", attention_performer=core)
    model, params = init(config)
    real = jnp.array(np.minimum(SEGMENTS, 1))
    first = jnp.broadcast_to(TOKENS[:, :1], TOKENS.shape)

    @jax.jit
    def step(params, key):
        def loss(params):
            rngs = {"features": key}
            logits = model.apply({"params": params}, TOKENS, segment_ids=real, rngs=rngs)
            log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
            return -jnp.mean(jnp.take_along_axis(log_probs, first[..., None], -1))

        value, grads = jax.value_and_grad(loss)(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), value

    losses = []
    for i in range(60):
        params, value = step(params, jax.random.key(i // 20))
        losses.append(float(value))
    assert np.isfinite(losses).all()
    assert np.mean(losses[-5:]) < losses[0] / 2
