"""Test attention to projected keys and values against loops over the formula in float64."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from tiny import SOURCE, SOURCE_SEGMENTS, TOKENS, init, tiny

from heedful.data.config import DataConfig
from heedful.model import masks
from heedful.model.attention import CORES, AttentionCall
from heedful.model.attention.linformer import Linformer
from heedful.model.config import LinformerConfig, ModelError
from heedful.model.masks import MaskNotSupported
from heedful.model.ops.dropout import keep
from heedful.model.positions import PositionBias
from heedful.train.config import TrainConfig
from heedful.train.errors import TrainError
from heedful.train.inspection.attention_weights import attention_weights
from heedful.train.start import require_fit

B, T, S, N, K, H, R, LONGEST = 3, 5, 7, 6, 3, 11, 2, 13
SHARING = ("none", "heads", "key_value", "layers")
Q_IDS = jnp.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [3, 3, 3, 3, 3]])
KV_IDS = jnp.array([[1, 1, 1, 1, 1, 0, 0], [1, 0, 1, 1, 1, 1, 1], [0] * 7])


def inputs() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.normal(size=shape) for shape in ((B, T, N, H), (B, S, K, H), (B, S, K, H))]


def linformer(sharing: str):
    """Return a core, random parameters, and the projection that its stack would provide."""
    rng = np.random.default_rng(1)
    given = rng.normal(size=(LONGEST, R)) if sharing == "layers" else None
    config = LinformerConfig(rank=R, max_length=LONGEST, sharing=sharing)  # type: ignore[arg-type]
    core = Linformer(config, None if given is None else jnp.float32(given))
    call = AttentionCall(*map(jnp.float32, inputs()), masks.full())
    shapes = nn.unbox(jax.eval_shape(core.init, jax.random.key(0), call))
    params = jax.tree.map(lambda x: rng.normal(size=x.shape), shapes.get("params", {}))
    return core, params, given


def naive(q, k, v, params, given, q_ids, kv_ids, scale, dropped=None):
    out = np.zeros(q.shape)
    first = given if given is not None else params.get("both", params.get("keys"))
    last = given if given is not None else params.get("both", params.get("values"))
    for b, t, n in np.ndindex(*q.shape[:3]):
        head = n // (N // K)
        e, f = (p[:, head] if p.ndim == 3 else p for p in (first, last))
        real = [s for s in range(S) if kv_ids[b, s] == 1]
        keys = sum((np.outer(e[s], k[b, s, head]) for s in real), np.zeros((R, H)))
        values = sum((np.outer(f[s], v[b, s, head]) for s in real), np.zeros((R, H)))
        weights = np.exp(scale * keys @ q[b, t, n])
        weights /= weights.sum()
        if dropped is not None:
            weights = weights * dropped[b, head, n % (N // K), t]
        out[b, t, n] = weights @ values * (q_ids[b, t] == 1)
    return out


@pytest.mark.parametrize("block", [2, 256])
@pytest.mark.parametrize("sharing", SHARING)
def test_it_is_the_formula(sharing: str, block: int, monkeypatch):
    monkeypatch.setattr("heedful.model.attention.linformer.BLOCK", block)
    core, params, given = linformer(sharing)
    q, k, v = inputs()
    params32 = {"params": jax.tree.map(jnp.float32, params)}
    run = jax.jit(lambda *x: core.apply(params32, AttentionCall(*x)))
    arrays = [*map(jnp.float32, (q, k, v))]
    ones = np.ones((B, T)), np.ones((B, S))
    expected = naive(q, k, v, params, given, *ones, H**-0.5)
    np.testing.assert_allclose(run(*arrays, masks.full()), expected, atol=2e-5, rtol=1e-5)
    q_ids, kv_ids = Q_IDS.at[2].set(1), KV_IDS
    expected = naive(q, k, v, params, given, q_ids, kv_ids, 1 / np.sqrt(H))
    out = run(*arrays, masks.cross(q_ids, kv_ids))
    np.testing.assert_allclose(out, expected, atol=2e-5, rtol=1e-5)
    assert not np.asarray(out[2]).any()  # All keys of row 2 are padding.
    # Dropout depends on the index of a weight in [B, K, G, T, R].
    key = jax.random.key(3)
    kept = np.asarray(keep(jax.random.key_data(key), (B, K, N // K, T, R), 0.3)) / 0.7
    call = AttentionCall(*arrays, masks.full(), dropout_rate=0.3, dropout_key=key)
    dropped = core.apply(params32, call)
    expected = naive(q, k, v, params, given, *ones, H**-0.5, kept)
    np.testing.assert_allclose(dropped, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_padding_gives_and_gets_zero(dtype):
    core, params, _ = linformer("none")
    q, k, v = (jnp.asarray(x, dtype) for x in inputs())
    mask = masks.cross(Q_IDS, KV_IDS)
    params = {"params": jax.tree.map(jnp.float32, params)}
    out, pull = jax.vjp(lambda *x: core.apply(params, AttentionCall(*x, mask)), q, k, v)
    dq, dk, dv = pull(jnp.ones_like(out))
    for x in (out, dq, dk, dv):
        assert x.dtype == dtype
        assert np.isfinite(np.float32(x)).all()
    empty = np.asarray((Q_IDS == 0) | ~(KV_IDS != 0).any(1, keepdims=True))
    assert not np.asarray(out)[empty].any()
    assert not np.asarray(dq)[empty].any()
    assert not np.asarray(dk)[np.asarray(KV_IDS == 0)].any()
    assert not np.asarray(dv)[np.asarray(KV_IDS == 0)].any()
    assert np.asarray(out)[~empty].all()


def test_what_it_cannot_do_is_refused(unchecked):
    core, params, _ = linformer("heads")
    q, k, v = map(jnp.float32, inputs())

    def apply(*given, **options):
        return core.apply({"params": params}, AttentionCall(*given, **options))

    with pytest.raises(MaskNotSupported, match=r"model\.attention\.decoder_core"):
        apply(q, k, v, masks.causal())
    with pytest.raises(MaskNotSupported, match=r"model\.attention\.decoder_core"):
        apply(q, k, v, masks.prefix(jnp.ones(B, jnp.int32)))
    with pytest.raises(MaskNotSupported, match=r"no window \(1, 1\)"):
        apply(q, k, v, masks.sliding(1, 1))
    with pytest.raises(MaskNotSupported, match="no distance"):
        apply(q, k, v, masks.full(), bias=PositionBias(jnp.ones(N)))
    with pytest.raises(ValueError, match="shapes do not fit"):
        apply(q, k[:, :5], v, masks.full())
    long = jnp.ones((B, LONGEST + 1, K, H))
    with pytest.raises(ModelError, match=r"14 tokens.*linformer\.max_length = 13"):
        apply(q, long, long, masks.full())
    stack = Linformer(LinformerConfig(rank=R, max_length=LONGEST, sharing="layers"))
    with pytest.raises(ModelError, match="projection of the stack"):
        stack.init(jax.random.key(0), AttentionCall(q, k, v, masks.full()))


def test_several_documents_become_nan_and_packed_data_is_refused():
    core, params, _ = linformer("heads")
    q, k, v = map(jnp.float32, inputs())
    params = {"params": jax.tree.map(jnp.float32, params)}
    two = KV_IDS.at[0, 2].set(2)
    call = AttentionCall(q, k, v, masks.cross(Q_IDS, two))
    out = np.asarray(jax.jit(core.apply)(params, call))
    assert np.isnan(out).all((1, 2, 3)).tolist() == [True, False, False]
    data = DataConfig(source="files", train=("x",), objective="masked_lm", packing=True)
    for name in (name for name, spec in CORES.items() if "self" in spec.one_document_at):
        model = tiny("encoder_only", attention_core=name)
        with pytest.raises(TrainError, match=rf"model\.attention\.core {name}.*data\.no-packing"):
            require_fit(model, data, TrainConfig(label_smoothing=0.0))


@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize(
    "architecture", quick.only(["encoder_only"], ["encoder_only", "encoder_decoder"])
)
def test_each_sharing_has_the_parameters_that_it_says(architecture, sharing: str):
    core = LinformerConfig(rank=R, max_length=8, sharing=sharing)  # type: ignore[arg-type]
    changes = {"attention_decoder_core": "dense"} if architecture == "encoder_decoder" else {}
    config = tiny(architecture, attention_core="linformer", attention_linformer=core, **changes)
    model, params = init(config)
    encoder = params["encoder"]
    own = encoder["blocks"]["self_attention"].get("linformer", {})
    shapes = {name: x.shape for name, x in own.items()}
    assert (
        shapes
        == {
            "none": dict.fromkeys(("keys", "values"), (2, 8, 3, R)),
            "heads": dict.fromkeys(("keys", "values"), (2, 8, R)),
            "key_value": {"both": (2, 8, R)},
            "layers": {},
        }[sharing]
    )
    assert ("projection" in encoder) == (sharing == "layers")
    if architecture == "encoder_decoder":
        assert ("projection" in params["decoder"]) == (sharing == "layers")
        args, real = (
            (TOKENS, SOURCE),
            {"encoder_segment_ids": jnp.array(np.minimum(SOURCE_SEGMENTS, 1))},
        )
    else:
        args, real = (TOKENS,), {}
    loss = jax.jit(lambda p: jnp.sum(model.apply({"params": p}, *args, **real) ** 2))
    grads = jax.grad(loss)(params)
    assert all(np.isfinite(g).all() and np.any(g) for g in jax.tree.leaves(grads["encoder"]))


@pytest.mark.parametrize("core", ["linformer", "performer"])
def test_there_are_no_weights_to_show(core: str):
    model, params = init(tiny("encoder_only", attention_core=core))
    with pytest.raises(ModelError, match=f"{core}: this core has no attention weights"):
        attention_weights(model.config, params, {"inputs": TOKENS})  # type: ignore[attr-defined]
