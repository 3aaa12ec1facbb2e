"""Test the core cudnn: XLA gets the same arguments on a CPU, and the call is lowered for a GPU."""

import re
from functools import partial

import jax
import jax._src.cudnn.fused_attention_stablehlo as stablehlo
import jax.numpy as jnp
import numpy as np
import pytest

from heedful.model import masks
from heedful.model.attention import AttentionCall
from heedful.model.attention.cudnn import attend, cudnn, refusal
from heedful.model.attention.dense import dense
from heedful.model.config import ModelError
from heedful.model.masks import MaskNotSupported
from heedful.model.positions import PositionBias, alibi_slopes

B, T, S, N, K, H = 3, 7, 11, 6, 3, 8

LENGTHS = masks.padding(jnp.array([5, 0, 7]), T)
MASKS = {
    "full": (masks.full(), S),
    "causal": (masks.causal(), T),
    "causal, more queries than keys": (masks.causal(), 5),
    "window that looks back": (masks.sliding(2, 0), S),
    "causal and window": (masks.causal() & masks.sliding(1, 3), T),
    "a window of self alone": (masks.causal() & masks.sliding(0, None), T),
    "padding": (LENGTHS, T),
    "causal and padding": (masks.causal() & LENGTHS, T),
    "causal, window and padding": (masks.causal() & masks.sliding(3, 3) & LENGTHS, T),
    "cross, some source empty": (
        masks.cross(LENGTHS.q_segment_ids, masks.padding(jnp.array([2, 4, 0]), S).q_segment_ids),
        S,
    ),
    "a segment of any name": (masks.packed(jnp.array([[4] * T, [7] * 3 + [0] * 4, [0] * T])), T),
}


def inputs(keys: int, dtype=jnp.float32, seed: int = 0) -> list[jax.Array]:
    rng = np.random.default_rng(seed)
    shapes = (B, T, N, H), (B, keys, K, H), (B, keys, K, H), (B, T, N, H)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def through_xla(call: AttentionCall) -> jax.Array:
    """Compute attention with XLA from the arguments that cuDNN would get."""
    assert refusal(call) is None
    return attend(call, "xla")


@pytest.mark.parametrize("name", MASKS)
def test_the_arguments_mean_the_mask(name: str):
    mask, keys = MASKS[name]
    *arrays, g = inputs(keys)

    @partial(jax.jit, static_argnums=0)
    def run(core, *arrays):
        out, pull = jax.vjp(lambda *x: core(AttentionCall(*x, mask, scale=0.3)), *arrays)
        return (out, *pull(g))

    ours, wanted = run(through_xla, *arrays), run(dense, *arrays)
    for x, y in zip(ours, wanted, strict=True):
        np.testing.assert_allclose(x, y, atol=3e-6)
    empty = ~np.broadcast_to(np.asarray(mask.to_bool(T, keys)).any(-1)[:, 0], (B, T))
    assert empty.any() == (mask.q_segment_ids is not None)
    assert not np.asarray(ours[0])[empty].any()
    assert not np.asarray(ours[1])[empty].any()


def test_what_a_kernel_leaves_in_padding_does_not_come_out(monkeypatch):
    """NaN that a kernel writes to padding reaches neither values nor gradients.

    The kernel itself never gets NaN.
    """
    mask = masks.causal() & LENGTHS
    real = np.asarray(LENGTHS.q_segment_ids) != 0
    filled = np.pad(real, [(0, 0), (0, 128 - T)])

    @jax.custom_vjp
    def poisoned(q, k, v):
        return jnp.where(filled[..., None, None], q, jnp.nan)

    poisoned.defvjp(
        lambda *x: (poisoned(*x), None),
        lambda _, g: tuple(
            jnp.where(filled[..., None, None], g[:, :, :n], jnp.nan) for n in (N, K, K)
        ),
    )

    def substitute(q, k, v, **options):
        assert options["query_seq_lengths"].tolist() == [5, 1, 7]
        return poisoned(q, k, v)

    monkeypatch.setattr(jax.nn, "dot_product_attention", substitute)
    *arrays, g = inputs(T)
    arrays = [jnp.where(real[..., None, None], x, jnp.nan) for x in arrays]
    with jax.disable_jit():
        out, pull = jax.vjp(lambda *x: through_xla(AttentionCall(*x, mask)), *arrays)
    for x in (out, *pull(g)):
        assert np.isfinite(x).all()
        assert not np.asarray(x)[~real].any()


@pytest.mark.parametrize(
    "ids",
    [
        ([1, 1, 2, 2, 2, 2, 2], [1, 1, 2, 2, 2, 2, 2]),  # two documents
        ([1, 1, 0, 1, 1, 1, 1], [1] * T),  # a gap
        ([0, 1, 1, 1, 1, 1, 1], [1] * T),  # padding first
        ([1] * T, [2] * T),  # no common document
        ([1] * T, [1, 1, 1, 0, 0, 1, 1]),
    ],
    ids=str,
)
def test_rows_that_lengths_cannot_describe_are_nan(ids):
    q_ids, kv_ids = (jnp.array([row, [1] * T, [3] * 5 + [0] * 2]) for row in ids)
    *arrays, _ = inputs(T)
    out = np.asarray(through_xla(AttentionCall(*arrays, masks.cross(q_ids, kv_ids))))
    assert np.isnan(out[0]).all()
    assert np.isfinite(out[1:]).all()


def test_a_window_needs_a_key_for_each_query():
    ids = masks.padding(jnp.array([5, 7, 3]), T).q_segment_ids
    less = masks.padding(jnp.array([4, 7, 6]), T).q_segment_ids
    *arrays, _ = inputs(T)
    mask = masks.cross(ids, less) & masks.sliding(1, 0)
    out = np.asarray(through_xla(AttentionCall(*arrays, mask)))
    assert np.isnan(out[0]).all()
    assert np.isfinite(out[1:]).all()


ALIBI = PositionBias(jnp.asarray(alibi_slopes(N)))
REFUSED = {
    "bias": (masks.full(), {"bias": ALIBI}),
    "drop": (masks.full(), {"dropout_rate": 0.1, "dropout_key": jax.random.key(0)}),
    "prefix": (masks.prefix(jnp.array([1, 2, 3])), {}),
    "dilation": (masks.sliding(2, 0, [1, 1, 1, 2, 2, 2]), {}),
    "global": (masks.longformer(2, jnp.array([[0]])), {}),
    "position 0": (masks.causal().at(3), {}),
    r"look back only, not \(2, 2\)": (masks.sliding(2, 2), {}),
    r"look back only, not \(2, None\)": (masks.sliding(2, None), {}),
    "not 5 for 7": (masks.sliding(2, 0), {"keys": 5}),
}


@pytest.mark.parametrize("words", REFUSED)
def test_other_masks_are_refused(words: str):
    mask, options = REFUSED[words]
    *arrays, _ = inputs(options.get("keys", T), jnp.bfloat16)
    with pytest.raises(MaskNotSupported, match=f"core 'cudnn' .*{words}"):
        given = {name: x for name, x in options.items() if name != "keys"}
        cudnn(AttentionCall(*arrays, mask, **given))


def test_types_heads_and_platform_are_refused_with_the_fix():
    *arrays, _ = inputs(T)
    with pytest.raises(ModelError, match=r"needs a GPU and model.dtype bfloat16 .* not float32"):
        cudnn(AttentionCall(*arrays, masks.causal()))
    with pytest.raises(
        ModelError, match=r"multiple of 8 up to 128, not model.attention.head_dim = 5"
    ):
        cudnn(AttentionCall(*(x[..., :5] for x in arrays), masks.causal()))
    with pytest.raises(ModelError, match=r"core cudnn needs a GPU, not cpu"):
        cudnn(AttentionCall(*(x.astype(jnp.bfloat16) for x in arrays), masks.causal()))
    with pytest.raises(ValueError, match="describes 7 q positions, there are 5"):
        cudnn(AttentionCall(arrays[0][:, :5], *arrays[1:], LENGTHS))


@pytest.mark.parametrize("name", ["full", "causal and window", "causal and padding"])
def test_lowered_for_a_gpu_it_is_cudnn_without_an_array_of_all_pairs(name: str, monkeypatch):
    monkeypatch.setattr(stablehlo, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    length = 1031
    mask = {**MASKS, "causal and padding": (masks.causal() & masks.padding(
        jnp.array([1031, 7, 0]), length), length)}[name][0]  # fmt: skip
    q, k = (jax.ShapeDtypeStruct((B, length, n, 64), jnp.bfloat16) for n in (N, K))
    loss = lambda *x: cudnn(AttentionCall(*x, mask)).astype(jnp.float32).sum()  # noqa: E731
    traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(q, k, k)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert set(re.findall(r"@(__cudnn\$\w+)", text)) == {
        "__cudnn$fmhaSoftmax",
        "__cudnn$fmhaSoftmaxBackward",
    }
    sizes = r"(1031|1152)"
    assert not re.search(rf"{sizes}x(\w+x)*{sizes}", text)
    has_window = '"sliding_window_length": 2' in text.replace("\\22", '"')
    assert has_window == (name == "causal and window")
