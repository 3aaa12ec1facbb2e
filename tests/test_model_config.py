"""Test that invalid values of a model config are refused in one line with field and value."""

from collections.abc import Callable

import pytest
from tiny import POSITIONS, tiny

from heedful.model.attention import choose
from heedful.model.config import (
    AttentionConfig,
    FeedForwardConfig,
    HeadConfig,
    LayerConfig,
    ModelConfig,
    ModelError,
    NormConfig,
    RotaryConfig,
)
from heedful.model.transformer import build

NAN = float("nan")


def rotary(scaling, name: str) -> RotaryConfig:
    """Return a config in which a field that only llama3 has is 3."""
    return RotaryConfig(scaling=scaling, factor=1 if scaling == "none" else 2, **{name: 3})


def classifier(name: str) -> HeadConfig:
    """Return a classifier's config in which a field that only language models have is True."""
    return HeadConfig(kind="classifier", **{name: True})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "field", "value"),
    [
        (lambda: tiny(attention_heads=0), "attention.heads", "0"),
        (
            lambda: tiny(attention_window=1, attention_global_tokens=100_001),
            "attention.global_tokens",
            "100001",
        ),
        (lambda: tiny(width=14), "model.attention.heads = 6", "model.width = 14"),
        (lambda: tiny(attention_kv_heads=4), "attention.kv_heads = 4", "attention.heads = 6"),
        (lambda: tiny(attention_kv_heads=0), "attention.kv_heads", "0"),
        (lambda: tiny(attention_head_dim=0), "attention.head_dim", "0"),
        (lambda: tiny(attention_key_dim=0), "attention.key_dim", "0"),
        (lambda: tiny(attention_key_dim=99), "attention.key_dim = 99", "at most the head size"),
        (lambda: tiny(attention_dropout=1.0), "attention.dropout", "1.0"),
        (lambda: tiny(feed_forward_width=-1), "feed_forward.width", "-1"),
        (lambda: tiny(feed_forward_dropout=-0.1), "feed_forward.dropout", "-0.1"),
        (lambda: tiny(feed_forward_activation="swiglu"), "feed_forward.activation", "swiglu"),
        (lambda: tiny(norm_epsilon=0.0), "norm.epsilon", "0.0"),
        (lambda: tiny(remat="some"), "model.remat", "some"),
        (lambda: tiny(norm_kind="batchnorm"), "norm.kind", "batchnorm"),
        (lambda: tiny(norm_position="sandwich"), "norm.position", "sandwich"),
        (lambda: tiny(positions_kind="rope"), "positions.kind", "rope"),
        (lambda: tiny(positions_max_length=0), "positions.max_length", "0"),
        (lambda: tiny(positions_buckets=0), "positions.buckets", "0"),
        (lambda: tiny(positions_buckets=6), "positions.buckets = 6", "multiple of 4"),
        (lambda: tiny(positions_max_distance=-1), "positions.max_distance", "-1"),
        (lambda: tiny(positions_max_distance=16), "positions.max_distance = 16", "half"),
        (lambda: tiny(positions_rotary=RotaryConfig(base=7)), "positions.rotary", "sinusoidal"),
        (lambda: tiny(width=18, positions_kind="rotary"), "size 3 of a key", "even"),
        (lambda: RotaryConfig(base=0), "rotary.base", "0"),
        (lambda: RotaryConfig(scaling="yarn"), "rotary.scaling", "yarn"),  # type: ignore
        (lambda: RotaryConfig(scaling="linear", factor=-2), "rotary.factor", "-2"),
        (lambda: RotaryConfig(factor=2), "rotary.factor = 2", "rotary.scaling"),
        (lambda: RotaryConfig(low_frequency_factor=0), "rotary.low_frequency_factor", "0"),
        (lambda: RotaryConfig(original_length=0), "rotary.original_length", "0"),
        (lambda: RotaryConfig(high_frequency_factor=1), "high_frequency_factor = 1", "= 1.0"),
        (lambda: RotaryConfig(scaling="linear"), "rotary.scaling = linear", "factor other than 1"),
        (lambda: RotaryConfig(scaling="llama3"), "rotary.scaling = llama3", "factor other than 1"),
        *(
            (lambda scaling=scaling, name=name: rotary(scaling, name), f"{name} = 3", "llama3, not")
            for scaling in ("none", "linear")
            for name in ("low_frequency_factor", "high_frequency_factor", "original_length")
        ),
        (lambda: tiny(positions_buckets=8), "positions.buckets = 8", "kind relative, not sinus"),
        (lambda: tiny(positions_max_distance=99), "positions.max_distance = 99", "kind relative"),
        (lambda: tiny(head_outputs=3), "head.outputs = 3", "head.kind classifier, not language"),
        (lambda: tiny(head_pooling="mean"), "head.pooling = mean", "head.kind classifier"),
        (lambda: tiny(head_pooler=False), "head.pooler = False", "head.kind classifier"),
        *(
            (lambda name=name: classifier(name), f"head.{name} = True", "language_model, not class")
            for name in ("transform", "bias", "scale")
        ),
        (
            lambda: HeadConfig(kind="classifier", pooler=False, pooler_activation="relu"),
            "head.pooler_activation = relu",
            "head.pooler True",
        ),
        (lambda: tiny(positions_learned=True), "positions.learned = True", "kind relative"),
        (lambda: tiny(embedding_width=0), "model.embedding_width", "0"),
        (lambda: tiny(embedding_width=7), "model.embedding_width = 7", "must be even"),
        (lambda: tiny(embedding_width=8), "model.embedding_width = 8", "model.head.transform"),
        (lambda: tiny(lora_alpha=3.0), "lora.alpha = 3.0", "lora.rank above 0"),
        (lambda: tiny(lora_targets=("query",)), "lora.targets = ('query',)", "lora.rank above 0"),
        (lambda: tiny(head_kind="span"), "head.kind", "span"),
        (lambda: tiny(head_pooling="max"), "head.pooling", "max"),
        (lambda: tiny(head_outputs=0), "head.outputs", "0"),
        (lambda: tiny(head_dropout=1.0), "head.dropout", "1.0"),
        (lambda: tiny(head_kind="classifier"), "model.head.kind", "encoder_only"),
        (lambda: tiny("decoder_only", head_kind="classifier"), "model.head.pooling", "first"),
        (lambda: tiny(lora_rank=-1), "lora.rank", "-1"),
        (lambda: tiny(lora_alpha=0), "lora.alpha", "0"),
        (lambda: tiny(lora_targets=("query", "querry")), "lora.targets", "'querry'"),
        (lambda: tiny(lora_targets=()), "lora.targets", "empty"),
        (
            lambda: tiny(lora_rank=2, lora_targets=("gate",)),
            "lora.targets",
            "feed_forward.gated is False",
        ),
        (lambda: tiny("encoder_only", type_vocab_size=-1), "model.type_vocab_size", "-1"),
        (lambda: tiny(type_vocab_size=2), "model.type_vocab_size = 2", "encoder_only"),
        (lambda: tiny(init="xavier"), "model.init", "xavier"),
        (lambda: tiny("encoder"), "model.architecture", "not encoder"),
        (lambda: tiny(dtype="float16"), "model.dtype", "float16"),
        (lambda: tiny(width=0), "model.width", "0"),
        (lambda: tiny(layers=-2), "model.layers", "-2"),
        (lambda: tiny(unroll=0), "model.unroll", "0"),
        (lambda: tiny(vocab_size=0), "model.vocab_size", "0"),
        (lambda: tiny(width=15, attention_head_dim=2), "model.width = 15", "sinusoidal"),
        (lambda: tiny(encoder_layers=0), "model.encoder_layers", "0"),
        (lambda: tiny("decoder_only", encoder_layers=2), "model.encoder_layers", "2"),
        (lambda: tiny(dropout=1.5), "model.dropout", "1.5"),
        (lambda: LayerConfig(window=-1), "pattern.window", "-1"),
        (lambda: LayerConfig(positions=False, rotary=RotaryConfig()), "pattern.rotary", "False"),
        (
            lambda: tiny(layers=2, pattern=(LayerConfig(),) * 3),
            "model.pattern has 3 layers",
            "has 2 at most",
        ),
        (
            lambda: tiny(pattern=(LayerConfig(rotary=RotaryConfig()),)),
            "model.pattern[0].rotary",
            "sinusoidal",
        ),
        (
            lambda: tiny(pattern=(LayerConfig(), LayerConfig(positions=False))),
            "model.pattern[1].positions = False",
            "sinusoidal",
        ),
        (
            lambda: tiny(
                attention_window=1,
                attention_global_tokens=1,
                pattern=(LayerConfig(window="all"),),
            ),
            "model.pattern[0].window = all",
            "attention.global_tokens",
        ),
        (lambda: tiny(dropout=NAN), "model.dropout", "nan"),
        (lambda: choose("flesh", "cpu", 7), "model.attention.core", "flesh"),
    ],
)
def test_refused(make: Callable, field: str, value: str):
    with pytest.raises(ModelError) as error:
        make()
    message = str(error.value)
    assert field in message
    assert value in message
    assert "\n" not in message


def test_accepted_at_the_bounds():
    tiny("decoder_only", head_kind="classifier", head_pooling="last")
    tiny(positions_kind="relative", positions_buckets=4, positions_max_distance=3)
    tiny(lora_rank=1, lora_targets=("gate",), feed_forward_gated=True)
    tiny(head_kind="language_model", head_dropout=0.0)
    tiny(**POSITIONS["rotary"])


def test_sizes_that_follow_from_others():
    config = ModelConfig(width=512, attention=AttentionConfig(heads=8))
    assert (config.head_dim, config.kv_heads) == (64, 8)
    config = ModelConfig(width=514, attention=AttentionConfig(heads=6, kv_heads=2, head_dim=7))
    assert (config.head_dim, config.kv_heads) == (7, 2)


def test_defaults_are_the_base_model_of_the_paper():
    config = ModelConfig()  # arXiv:1706.03762 table 3, row "base"
    assert (config.layers, config.width, config.feed_forward.width) == (6, 512, 2048)
    assert (config.attention.heads, config.head_dim, config.dropout) == (8, 64, 0.1)
    assert (config.norm.position, config.feed_forward.activation) == ("post", "relu")


def test_values_cannot_change():
    for config in (ModelConfig(), FeedForwardConfig(), NormConfig()):
        with pytest.raises(AttributeError):
            config.width = 3  # type: ignore[misc, union-attr]


def test_a_model_without_vocabulary_says_where_it_comes_from():
    import jax
    import jax.numpy as jnp

    model = build(tiny("decoder_only", vocab_size=None))
    with pytest.raises(ValueError, match="vocab_size is not set"):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))


def test_remat_was_once_a_bool():
    assert (tiny(remat=True).remat, tiny(remat=False).remat) == ("full", "none")
