"""T5 (arXiv:1910.10683), and T5 1.1 with a gated feed-forward and an untied output."""

from collections.abc import Set
from typing import Any

from heedful.model.config import (
    AttentionConfig,
    FeedForwardConfig,
    HeadConfig,
    ModelConfig,
    NormConfig,
    PositionConfig,
)
from heedful.model.pretrained.family import Family, vocab_size
from heedful.model.pretrained.keys import ACTIVATION_NAMES, ACTIVATIONS, Keys


def table(config: ModelConfig) -> dict[str, str]:
    """Return {path of our module or parameter: its name in the file}."""
    table = {"embedding": "shared", "head/kernel": "lm_head.weight"}
    for stack in ("encoder", "decoder"):
        bias = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias"
        table[f"{stack}/relative_bias"] = bias
        sublayers = {"self_attention": "SelfAttention"}
        if stack == "decoder":
            sublayers["cross_attention"] = "EncDecAttention"
        for i, (sublayer, module) in enumerate(sublayers.items()):
            layer = f"{stack}.block.{{}}.layer.{i}"
            table[f"{stack}/blocks/{sublayer}_norm"] = f"{layer}.layer_norm"
            for name in ("query", "key", "value", "out"):
                table[f"{stack}/blocks/{sublayer}/{name}"] = f"{layer}.{module}.{name[0]}"
        layer, block = f"{stack}.block.{{}}.layer.{len(sublayers)}", f"{stack}/blocks/feed_forward"
        up = "wi_1" if config.feed_forward.gated else "wi"
        table[f"{block}_norm"] = f"{layer}.layer_norm"
        table[f"{block}/gate"] = f"{layer}.DenseReluDense.wi_0"
        table[f"{block}/up"] = f"{layer}.DenseReluDense.{up}"
        table[f"{block}/down"] = f"{layer}.DenseReluDense.wo"
        table[f"{stack}/norm"] = f"{stack}.final_layer_norm"
    return table


def from_hf(keys: Keys, name: str, names: Set[str]) -> ModelConfig:
    """Translate the config of a T5 checkpoint; `names` are the names of its tensors."""
    keys.only("is_encoder_decoder", True)
    keys.only("is_decoder", False)
    encoder_layers = keys.get("num_layers", 6)
    keys.only("num_hidden_layers", encoder_layers)
    layers = keys.optional("num_decoder_layers", int)
    layers = encoder_layers if layers is None else layers
    heads, width = keys.get("num_heads", 8), keys.get("d_model", 512)
    head_dim, dropout = keys.get("d_kv", 64), keys.get("dropout_rate", 0.1)
    projection = keys.get("feed_forward_proj", "relu")
    activation = projection.removeprefix("gated-")
    if activation not in ACTIVATIONS:
        choices = f"{', '.join(ACTIVATIONS)}, each with or without gated-"
        raise keys.unsupported("feed_forward_proj", projection, choices)
    if projection == "gated-gelu":  # In T5 1.1 this is the tanh approximation.
        activation = "gelu_new"
    # These two keys override feed_forward_proj.
    gated = keys.get("is_gated_act", projection.startswith("gated-"))
    activation = keys.activation("dense_act_fn", activation)
    return ModelConfig(
        architecture="encoder_decoder",
        vocab_size=keys.get("vocab_size", 32128),
        width=width,
        layers=layers,
        encoder_layers=None if encoder_layers == layers else encoder_layers,
        attention=AttentionConfig(
            heads=heads,
            head_dim=None if head_dim * heads == width else head_dim,
            bias=False,
            scaled=False,
            dropout=dropout,
        ),
        feed_forward=FeedForwardConfig(
            width=keys.get("d_ff", 2048),
            activation=activation,
            gated=gated,
            bias=False,
            dropout=dropout,
        ),
        norm=NormConfig(
            kind="rmsnorm", position="pre", epsilon=keys.get("layer_norm_epsilon", 1e-6)
        ),
        positions=PositionConfig(
            kind="relative",
            buckets=keys.get("relative_attention_num_buckets", 32),
            max_distance=keys.get("relative_attention_max_distance", 128),
        ),
        # The original T5 scales the decoder's output, T5 1.1 does not: the key tells the version.
        head=HeadConfig(
            scale=keys.get("scale_decoder_outputs", keys.get("tie_word_embeddings", True))
        ),
        dropout=dropout,
        tie_embeddings="lm_head.weight" not in names,
        scale_embeddings=False,
    )


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Translate a config to the config.json of a T5 checkpoint."""
    projection = ACTIVATION_NAMES[config.feed_forward.activation]
    if config.feed_forward.gated:
        projection = "gated-" + projection.removesuffix("_new")
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "is_encoder_decoder": True,
        "vocab_size": vocab_size(config),
        "d_model": config.width,
        "d_kv": config.head_dim,
        "d_ff": config.feed_forward.width,
        "num_layers": config.encoder_layers or config.layers,
        "num_decoder_layers": config.layers,
        "num_heads": config.attention.heads,
        "feed_forward_proj": projection,
        "relative_attention_num_buckets": config.positions.buckets,
        "relative_attention_max_distance": config.positions.max_distance,
        "layer_norm_epsilon": config.norm.epsilon,
        "dropout_rate": config.dropout,
        # transformers before 5 reads the first key, which also ties; later versions the second.
        "tie_word_embeddings": config.head.scale,
        "scale_decoder_outputs": config.head.scale,
    }


T5 = Family(
    model_type="t5",
    architecture="encoder_decoder",
    classes=("T5ForConditionalGeneration",),
    from_hf=from_hf,
    to_hf=to_hf,
    table=table,
    body_modules=("shared", "encoder", "decoder"),
    tied={
        "shared.weight": (
            "encoder.embed_tokens.weight",
            "decoder.embed_tokens.weight",
            "lm_head.weight",
        )
    },
    aliases={"hidden_size": "d_model", "num_attention_heads": "num_heads", "head_dim": "d_kv"},
    ignored_keys=frozenset({"classifier_dropout", "n_positions"}),
    keys_of_fields={
        "model.vocab_size": "vocab_size",
        "model.width": "d_model",
        "model.layers": "num_decoder_layers",
        "model.encoder_layers": "num_layers",
        "model.dropout": "dropout_rate",
        "attention.heads": "num_heads",
        "attention.head_dim": "d_kv",
        "attention.dropout": "dropout_rate",
        "feed_forward.width": "d_ff",
        "feed_forward.dropout": "dropout_rate",
        "norm.epsilon": "layer_norm_epsilon",
        "positions.buckets": "relative_attention_num_buckets",
        "positions.max_distance": "relative_attention_max_distance",
    },
    # A table in the files of the first release that no version of the model reads.
    unused=r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
    special_ids=("pad_token_id", "eos_token_id", "decoder_start_token_id"),
)
