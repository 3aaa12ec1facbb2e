"""Weights out and in again, to the bit; every file and config that is refused, by name."""

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import B, S, T, V, random_params

from model import pretrained
from model.config import (
    AttentionConfig,
    FeedForwardConfig,
    HeadConfig,
    LoraConfig,
    ModelConfig,
    ModelError,
    NormConfig,
    PositionConfig,
    RotaryConfig,
)
from model.pretrained import Pretrained, read, write
from model.pretrained import tensors as tensors_module
from model.transformer import build

TOKENS, SOURCE = jnp.zeros((B, T), jnp.int32), jnp.zeros((B, S), jnp.int32)
SPECIAL = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 3}

BERT = ModelConfig(
    architecture="encoder_only",
    vocab_size=V,
    width=15,
    layers=2,
    attention=AttentionConfig(heads=3),
    feed_forward=FeedForwardConfig(width=13, activation="gelu"),
    norm=NormConfig(epsilon=1e-12, embeddings=True),
    positions=PositionConfig(kind="learned", max_length=17),
    head=HeadConfig(transform=True, bias=True),
    types=2,
    scale_embeddings=False,
    init="normal",
)
GPT2 = ModelConfig(
    architecture="decoder_only",
    vocab_size=V,
    width=15,
    layers=3,
    attention=AttentionConfig(heads=3, dropout=0.2),
    feed_forward=FeedForwardConfig(width=13, activation="gelu_tanh"),
    norm=NormConfig(position="pre", epsilon=1e-5),
    positions=PositionConfig(kind="learned", max_length=17),
    scale_embeddings=False,
    init="scaled_normal",
)
LLAMA = ModelConfig(
    architecture="decoder_only",
    vocab_size=V,
    width=12,
    layers=2,
    attention=AttentionConfig(heads=6, kv_heads=3, head_dim=4, bias=False),
    feed_forward=FeedForwardConfig(width=13, activation="silu", gated=True, bias=False),
    norm=NormConfig(kind="rmsnorm", position="pre", epsilon=1e-5),
    positions=PositionConfig(kind="rotary", max_length=19, rotary=RotaryConfig(base=500.0)),
    dropout=0.0,
    tie_embeddings=False,
    scale_embeddings=False,
    init="normal",
)
T5 = ModelConfig(
    vocab_size=V,
    width=10,
    layers=2,
    encoder_layers=3,
    attention=AttentionConfig(heads=3, head_dim=7, bias=False, scaled=False, dropout=0.1),
    feed_forward=FeedForwardConfig(width=13, bias=False, dropout=0.1),
    norm=NormConfig(kind="rmsnorm", position="pre"),
    positions=PositionConfig(kind="relative", buckets=8, max_distance=5),
    head=HeadConfig(scale=True),
    scale_embeddings=False,
)
MARIAN = ModelConfig(
    vocab_size=V,
    width=10,
    layers=2,
    encoder_layers=3,
    attention=AttentionConfig(heads=5, dropout=0.3),
    feed_forward=FeedForwardConfig(width=13, activation="silu", dropout=0.4),
    norm=NormConfig(epsilon=1e-5),
    head=HeadConfig(bias=True),
)
CLASSIFIER = HeadConfig(kind="classifier", outputs=7)
LLAMA3 = RotaryConfig(
    base=500.0,
    scaling="llama3",
    factor=3.0,
    low_frequency_factor=2.0,
    high_frequency_factor=5.0,
    original_length=40,
)
MODELS = {
    "BertForMaskedLM": BERT,
    "BertForSequenceClassification": replace(BERT, head=CLASSIFIER),
    "BertModel": replace(BERT, head=HeadConfig(kind="classifier")),
    "GPT2LMHeadModel": GPT2,
    "GPT2LMHeadModel untied": replace(
        GPT2, tie_embeddings=False, attention=replace(GPT2.attention, scaled=False)
    ),
    "LlamaForCausalLM": LLAMA,
    "LlamaForCausalLM tied": replace(
        LLAMA, tie_embeddings=True, positions=replace(LLAMA.positions, rotary=LLAMA3)
    ),
    "LlamaModel": replace(
        LLAMA,
        tie_embeddings=True,
        head=HeadConfig(kind="classifier", pooling="last", pooler=False),
    ),
    "T5ForConditionalGeneration": T5,
    "T5ForConditionalGeneration 1.1": replace(
        T5,
        feed_forward=replace(T5.feed_forward, activation="gelu_tanh", gated=True),
        head=HeadConfig(),
        tie_embeddings=False,
    ),
    "MarianMTModel": MARIAN,
    "MarianMTModel without bias": replace(MARIAN, head=HeadConfig(), scale_embeddings=False),
}


@cache
def random(config: ModelConfig, scale: float = 0.5) -> dict[str, Any]:
    """Random parameters; for a bare body without the classes."""
    is_body = config.head.kind == "classifier" and config.head.outputs is None
    full = replace(config, head=replace(config.head, outputs=1)) if is_body else config
    inputs = (TOKENS, SOURCE) if config.architecture == "encoder_decoder" else (TOKENS,)
    params = jax.tree.map(np.asarray, random_params(build(full), *inputs, scale=scale))
    if is_body:
        del params["head"]["classes"]
        params = {name: part for name, part in params.items() if part}
    return params


def export(folder: Path, name: str, **more: Any) -> Path:
    directory = folder / "export"
    write(directory, MODELS[name], random(MODELS[name]), **({"special": SPECIAL} | more))
    return directory


def assert_equal(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {np.dtype("float32")}


def refused(call: Callable[[], object], *parts: str) -> None:
    with pytest.raises(ModelError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def change(directory: Path, **values: Any) -> None:
    """Changes config.json; a value of None takes the key out."""
    path = directory / "config.json"
    changed = json.loads(path.read_text()) | values
    path.write_text(json.dumps({k: v for k, v in changed.items() if v is not None}))


def change_tensors(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


# There and back ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(MODELS))
def test_round_trip_to_the_bit(name: str, tmp_path: Path):
    config, params = MODELS[name], random(MODELS[name])
    write(tmp_path / "one", config, params, special=SPECIAL)
    found = read(tmp_path / "one")
    assert found.architecture == name.split()[0]
    assert found.unused == []
    assert found.special == SPECIAL
    assert_equal(found.params, params)
    wanted = config
    if config.head.kind == "language_model":  # what a file does not hold comes back as defaults
        wanted = replace(config, head=replace(config.head, dropout=HeadConfig().dropout))
    if "Marian" in name or "T5" in name:
        wanted = replace(wanted, init="glorot")
    assert found.config == wanted
    assert pretrained.read_config(tmp_path / "one") == wanted
    write(tmp_path / "two", found.config, found.params, special=found.special)
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_config_without_names_of_defaults():
    # The facts of bert-base-uncased, from what config.json says and from what it leaves out.
    config = pretrained.config_from_hf({"model_type": "bert", "architectures": ["BertForMaskedLM"]})
    assert (config.vocab_size, config.width, config.layers, config.types) == (30522, 768, 12, 2)
    assert (config.attention.heads, config.feed_forward.width) == (12, 3072)
    assert config.feed_forward.activation == "gelu"


def test_ropes_before_and_after_transformers_5(tmp_path: Path):
    directory = export(tmp_path, "LlamaForCausalLM tied")
    old = json.loads((directory / "config.json").read_text())
    new = {"rope_theta": old["rope_theta"], **old["rope_scaling"]}
    legacy = {"type" if k == "rope_type" else k: v for k, v in old["rope_scaling"].items()}
    config = read(directory).config
    assert config.positions.rotary == LLAMA3
    change(directory, rope_theta=None, rope_scaling=None, rope_parameters=new)
    assert read(directory).config == config
    change(directory, rope_theta=500, rope_scaling=legacy, rope_parameters=None)
    (directory / "config.json").write_text(json.dumps(old | {"rope_scaling": legacy}))
    assert read(directory).config == config


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_widened(dtype: Any, tmp_path: Path):
    directory = export(tmp_path, "LlamaForCausalLM")
    exact = read(directory).params
    change_tensors(directory, lambda t: t.update({k: v.astype(dtype) for k, v in t.items()}))
    found = read(directory).params
    assert_equal(found, jax.tree.map(lambda x: x.astype(dtype).astype(np.float32), exact))


def test_shards(tmp_path: Path):
    whole = read(export(tmp_path, "GPT2LMHeadModel"))
    limit, directory = 3000, tmp_path / "shards"
    write(directory, whole.config, whole.params, special={}, max_shard_bytes=limit)
    files = sorted(directory.glob("*.safetensors"))
    assert len(files) > 3
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    assert_equal(read(directory).params, whole.params)
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    held = [load_file(path) for path in files]
    assert index["metadata"]["total_size"] == sum(
        x.nbytes for shard in held for x in shard.values()
    )
    for path, shard in zip(files, held, strict=True):
        assert sum(x.nbytes for x in shard.values()) <= limit or len(shard) == 1
        assert {name for name, file in index["weight_map"].items() if file == path.name} == set(
            shard
        )


def test_names_that_other_files_use(tmp_path: Path):
    """The bare body's names, TensorFlow's names of norms, buffers, and copies of tied tensors."""
    directory = export(tmp_path, "BertForMaskedLM")
    expected = read(directory)

    def rename(tensors: dict[str, Any]) -> None:
        embedding = tensors["bert.embeddings.word_embeddings.weight"]
        extra = {
            "embeddings.position_ids": np.arange(17)[None],
            "cls.predictions.decoder.weight": embedding,
            "cls.seq_relationship.bias": np.zeros(2, np.float32),
            "pooler.dense.bias": np.zeros(15, np.float32),
        }
        for name in list(tensors):
            new = name.removeprefix("bert.").replace("LayerNorm.weight", "LayerNorm.gamma")
            tensors[new.replace("LayerNorm.bias", "LayerNorm.beta")] = tensors.pop(name)
        tensors |= extra

    change_tensors(directory, rename)
    found = read(directory)
    assert_equal(found.params, expected.params)
    assert found.unused == ["cls.seq_relationship.bias", "pooler.dense.bias"]


def test_the_first_release_of_gpt2_and_of_llama(tmp_path: Path):
    for name, prefix, buffer in (
        ("GPT2LMHeadModel", "transformer.", "h.0.attn.bias"),
        ("LlamaForCausalLM", "", "model.layers.1.self_attn.rotary_emb.inv_freq"),
    ):
        directory = export(tmp_path / name, name)
        expected = read(directory)

        def old(tensors: dict[str, Any], prefix=prefix, buffer=buffer) -> None:
            for key in list(tensors):
                tensors[key.removeprefix(prefix)] = tensors.pop(key)
            tensors[buffer] = np.zeros((1, 2), np.float32)

        change_tensors(directory, old)
        found = read(directory)
        assert_equal(found.params, expected.params)
        assert found.unused == []


def test_tied_tensors_under_one_of_their_names(tmp_path: Path):
    directory = export(tmp_path, "T5ForConditionalGeneration")
    expected = read(directory)
    names = ("shared.weight", "lm_head.weight", "encoder.embed_tokens.weight")
    for name in names[1:]:
        change_tensors(directory, lambda t, name=name: t.update({name: t["shared.weight"]}))
        assert_equal(read(directory).params, expected.params)
    change_tensors(directory, lambda t: t.pop("shared.weight"))
    assert_equal(read(directory).params, expected.params)


def test_an_output_that_differs_from_the_embedding_is_not_tied(tmp_path: Path):
    for name in ("T5ForConditionalGeneration", "GPT2LMHeadModel"):
        directory = export(tmp_path / name, name)
        other = np.random.default_rng(1).normal(size=(V, MODELS[name].width)).astype(np.float32)
        change_tensors(directory, lambda t, other=other: t.update({"lm_head.weight": other}))
        found = read(directory)
        assert not found.config.tie_embeddings
        np.testing.assert_array_equal(found.params["head"]["kernel"], other.T)


def test_labels_and_lists_of_ids(tmp_path: Path):
    labels = ["a", "b", "c", "d", "e", "f", "g"]
    special: Any = {"eos_token_id": [1, 2]}
    found = read(export(tmp_path, "BertForSequenceClassification", labels=labels, special=special))
    assert found.labels == labels
    assert found.special == special
    directory = export(tmp_path / "unnamed", "BertForSequenceClassification")
    assert read(directory).labels == []


# What no architecture expresses -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        (replace(GPT2, positions=PositionConfig(kind="alibi")), ("model.positions.kind = alibi",)),
        (replace(GPT2, norm=NormConfig(position="post")), ("model.norm.position = post", "gpt2")),
        (replace(GPT2, head=HeadConfig(bias=True)), ("model.head.bias = True", "gpt2")),
        (replace(GPT2, types=2), ("model.types = 2", "gpt2")),
        (
            replace(LLAMA, feed_forward=replace(LLAMA.feed_forward, gated=False)),
            ("model.feed_forward.gated = False", "llama"),
        ),
        (replace(LLAMA, width=14), ("model.attention.heads = 6", "14")),
        (replace(BERT, head=HeadConfig()), ("model.head.transform = False", "bert")),
        (replace(BERT, types=0), ("model.types = 0", "bert has 1")),
        (
            replace(BERT, head=replace(CLASSIFIER, pooling="mean")),
            ("model.head.pooling = mean", "bert"),
        ),
        (replace(BERT, head=replace(CLASSIFIER, pooler=False)), ("model.head.pooler = False",)),
        (replace(MARIAN, norm=NormConfig()), ("model.norm.epsilon = 1e-06", "marian has 1e-05")),
        (
            replace(
                T5,
                feed_forward=FeedForwardConfig(width=13, activation="gelu", gated=True, bias=False),
            ),
            ("model.feed_forward.activation = gelu", "t5 has gelu_tanh"),
        ),
        (
            replace(T5, attention=replace(T5.attention, kv_heads=1)),
            ("model.attention.kv_heads = 1", "t5 has 3"),
        ),
        (replace(GPT2, lora=LoraConfig(rank=2)), ("model.lora.rank = 2", "merge_lora")),
        (replace(GPT2, vocab_size=None), ("model.vocab_size is not set",)),
        (replace(GPT2, head=replace(CLASSIFIER, pooling="last")), ("model.head.",)),
    ],
)
def test_configs_that_cannot_be_exported(config: ModelConfig, parts: tuple[str, ...], tmp_path):
    refused(lambda: pretrained.config_to_hf(config), *parts)
    refused(lambda: write(tmp_path / "x", config, {}, special=SPECIAL), *parts)
    assert not (tmp_path / "x").exists()


def test_what_only_training_knows_does_not_hinder():
    config = replace(LLAMA, dropout=0.3, remat=True, unroll=2, dtype="bfloat16", init="glorot")
    assert pretrained.config_to_hf(config) == pretrained.config_to_hf(LLAMA)


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        ({"special": {"eos": 1}}, ("'eos'", "eos_token_id")),
        ({"special": {"eos_token_id": V}}, (f"eos_token_id = {V}", f"vocab_size is {V}")),
        ({"special": {"eos_token_id": [1, -1]}}, ("eos_token_id = -1",)),
        ({"special": {}}, ("decoder_start_token_id", "marian")),
        ({"labels": ["a", "b"]}, ("2 labels", "0 classes")),
    ],
)
def test_ids_and_labels_that_do_not_fit(more: Any, parts: tuple[str, ...], tmp_path: Path):
    refused(lambda: export(tmp_path, "MarianMTModel", **more), *parts)


def test_parameters_of_another_config(tmp_path: Path):
    params = random(GPT2)
    directory = tmp_path / "export"
    wider = replace(GPT2, width=18)
    refused(
        lambda: write(directory, wider, params, special={}),
        "decoder/blocks/feed_forward/down/bias has shape (3, 15)",
        "(3, 18)",
    )
    untied = replace(GPT2, tie_embeddings=False)
    refused(lambda: write(directory, untied, params, special={}), "the config have head/kernel")
    more = params | {"head": {"bias": np.zeros(V)}}
    refused(lambda: write(directory, GPT2, more, special={}), "the parameters have head/bias")
    assert not directory.exists()


# Files that stay ---------------------------------------------------------------------------------


def test_an_export_is_not_overwritten_by_another(tmp_path: Path):
    directory = export(tmp_path, "GPT2LMHeadModel")
    (directory / "tokenizer.json").write_text("{}")
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    export(tmp_path, "GPT2LMHeadModel")  # the same: nothing to do
    for other in (lambda: export(tmp_path, "LlamaForCausalLM"), lambda: other_values(directory)):
        refused(other, str(directory), "belongs to another export")
    many = lambda: export(tmp_path, "GPT2LMHeadModel", max_shard_bytes=3000)  # noqa: E731
    refused(many, "model.safetensors belongs to another export")
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before


def other_values(directory: Path) -> None:
    write(directory, GPT2, random(GPT2, scale=0.1), special=SPECIAL)


@pytest.mark.parametrize("exists", [False, True])
def test_an_export_that_fails_leaves_nothing(exists: bool, tmp_path: Path, monkeypatch):
    directory, calls = tmp_path / "export", []
    if exists:
        directory.mkdir()

    def full(*args: Any, **kwargs: Any) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        save_file(*args, **kwargs)

    monkeypatch.setattr(tensors_module, "save_file", full)
    small = lambda: export(tmp_path, "GPT2LMHeadModel", max_shard_bytes=3000)  # noqa: E731
    refused(small, f"cannot write {directory}", "No space left")
    assert list(tmp_path.rglob("*")) == ([directory] if exists else [])


def test_a_directory_in_which_other_files_lie_is_filled(tmp_path: Path):
    directory = tmp_path / "export"
    directory.mkdir()
    (directory / "notes.txt").write_text("mine")
    export(tmp_path, "GPT2LMHeadModel")
    assert (directory / "notes.txt").read_text() == "mine"
    assert_equal(read(directory).params, random(GPT2))


# Files that are no model ------------------------------------------------------------------------

NAME = "transformer.h.1.mlp.c_fc.weight"


def cut(directory: Path, left: int) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:left])


def replace_weights(directory: Path, content: bytes) -> None:
    (directory / "model.safetensors").write_bytes(content)


def only_pickle(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def shard_missing(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    index = {"weight_map": {NAME: "model-00001-of-00002.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def tensor_not_in_shard(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "a.safetensors")
    index = {"weight_map": {"other": "a.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def no_map(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text("{}")


def write_config(content: str) -> Callable[[Path], None]:
    return lambda directory: (directory / "config.json").write_text(content) and None


def tensor(value: np.ndarray) -> Callable[[Path], None]:
    return lambda directory: change_tensors(directory, lambda t: t.update({NAME: value}))


@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        (lambda d: cut(d, -5), ("model.safetensors", "truncated", "fetch it again")),
        (lambda d: cut(d, 100), ("model.safetensors", "truncated")),
        (lambda d: cut(d, 0), ("model.safetensors", "truncated")),
        (lambda d: replace_weights(d, pickle.dumps({"a": 1})), ("a pickle", "convert")),
        (lambda d: replace_weights(d, b"PK\x03\x04" + bytes(99)), ("zip archive", "torch.save")),
        (
            lambda d: replace_weights(d, b"version https://git-lfs.github.com/spec/v1\n"),
            ("git lfs pull",),
        ),
        (lambda d: replace_weights(d, b"<!doctype html>" + bytes(99)), ("a web page",)),
        (only_pickle, ("pytorch_model.bin", "a pickle", "convert")),
        (lambda d: (d / "model.safetensors").unlink(), ("neither model.safetensors nor",)),
        (
            lambda d: change_tensors(d, lambda t: t.pop(NAME)),
            ("model.safetensors has no tensor", NAME),
        ),
        (tensor(np.zeros((15, 11), np.float32)), (NAME, "(15, 11)", "(15, 13)")),
        (tensor(np.zeros((15, 13), np.int8)), (NAME, "I8", "F32, F16, BF16")),
        (tensor(np.zeros((15, 13))), (NAME, "F64")),
        (shard_missing, ("index.json", "model-00001-of-00002.safetensors", "not beside it")),
        (tensor_not_in_shard, ("a.safetensors has no tensor other",)),
        (no_map, ("index.json", "weight_map")),
        (lambda d: (d / "config.json").unlink(), ("config.json does not exist",)),
        (write_config("{"), ("config.json is not JSON",)),
        (write_config("[]"), ("config.json is JSON, but no object",)),
    ],
)
def test_files_that_are_refused(spoil: Callable, parts: tuple[str, ...], tmp_path: Path):
    directory = export(tmp_path, "GPT2LMHeadModel")
    spoil(directory)
    refused(lambda: read(directory), str(directory), *parts)


def test_no_directory(tmp_path: Path):
    refused(lambda: read(tmp_path / "none"), str(tmp_path / "none" / "config.json"), "not exist")


@pytest.mark.parametrize(
    ("name", "tensor", "other"),
    [
        ("BertForMaskedLM", "cls.predictions.decoder.weight", "word_embeddings"),
        ("MarianMTModel", "model.decoder.embed_tokens.weight", "model.shared.weight"),
        ("MarianMTModel", "lm_head.weight", "model.shared.weight"),
    ],
)
def test_matrices_that_must_be_one(name: str, tensor: str, other: str, tmp_path: Path):
    directory = export(tmp_path, name)
    values = np.zeros((V, MODELS[name].width), np.float32)
    change_tensors(directory, lambda t: t.update({tensor: values}))
    refused(lambda: read(directory), f"{tensor} differs from", other)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("BertForMaskedLM", "model_type", "roberta"),
        ("BertForMaskedLM", "architectures", ["BertForQuestionAnswering"]),
        ("BertForMaskedLM", "architectures", []),
        ("BertForMaskedLM", "quantization_config", {"bits": 4}),
        ("BertForMaskedLM", "position_embedding_type", "relative_key"),
        ("BertForMaskedLM", "is_decoder", True),
        ("BertForMaskedLM", "add_cross_attention", True),
        ("BertForMaskedLM", "tie_word_embeddings", False),
        ("BertForMaskedLM", "hidden_act", "mish"),
        ("BertForMaskedLM", "hidden_size", "15"),
        ("BertForMaskedLM", "num_attention_heads", True),
        ("GPT2LMHeadModel", "scale_attn_by_inverse_layer_idx", True),
        ("GPT2LMHeadModel", "add_cross_attention", True),
        ("GPT2LMHeadModel", "embd_pdrop", 0.5),
        ("GPT2LMHeadModel", "activation_function", "tanh"),
        ("LlamaForCausalLM", "rope_scaling", "linear"),
        ("LlamaForCausalLM", "hidden_act", "relu2"),
        ("T5ForConditionalGeneration", "feed_forward_proj", "gated-elu"),
        ("T5ForConditionalGeneration", "is_encoder_decoder", False),
        ("MarianMTModel", "normalize_before", True),
        ("MarianMTModel", "encoder_attention_heads", 2),
        ("MarianMTModel", "encoder_ffn_dim", 17),
        ("MarianMTModel", "decoder_vocab_size", 17),
        ("MarianMTModel", "share_encoder_decoder_embeddings", False),
        ("MarianMTModel", "encoder_layerdrop", 0.1),
    ],
)
def test_values_in_config_json_that_are_refused(name: str, key: str, value: Any, tmp_path: Path):
    directory = export(tmp_path, name)
    change(directory, **{key: value})
    refused(lambda: read(directory), f'config.json has "{key}": {value!r}', "supported is only")


@pytest.mark.parametrize(
    ("scaling", "part"),
    [
        ({"rope_type": "yarn", "factor": 2.0}, "\"rope_type\": 'yarn'"),
        ({"rope_type": "linear"}, 'has no "factor"'),
        ({"partial_rotary_factor": 0.5}, '"partial_rotary_factor": 0.5'),
    ],
)
def test_scalings_that_are_refused(scaling: dict, part: str, tmp_path: Path):
    directory = export(tmp_path, "LlamaForCausalLM")
    change(directory, rope_scaling=scaling)
    refused(lambda: read(directory), "rope_scaling in", "config.json", part)


# Low-rank adaptation ----------------------------------------------------------------------------


def test_merged_updates_give_the_same_logits():
    adapted = replace(
        LLAMA, lora=LoraConfig(rank=2, alpha=3.0, targets=("query", "value", "out", "down"))
    )
    params = random(adapted, scale=0.3)
    config, merged = pretrained.merge_lora(adapted, params)
    assert config == LLAMA
    assert jax.tree.structure(merged) == jax.tree.structure(random(LLAMA))
    tokens = jnp.array(np.random.default_rng(0).integers(0, V, (B, T)))
    before = jax.jit(build(adapted).apply)({"params": params}, tokens)
    after = jax.jit(build(config).apply)({"params": merged}, tokens)
    np.testing.assert_allclose(np.asarray(after), np.asarray(before), atol=1e-5)
    blocks, old = merged["decoder"]["blocks"], params["decoder"]["blocks"]
    for module in ("query", "key", "value", "out"):
        kernel, before = (b["self_attention"][module]["kernel"] for b in (blocks, old))
        assert (np.abs(kernel - before).max() > 0.1) == (module in adapted.lora.targets)


# llama2.c ---------------------------------------------------------------------------------------

SIZES = {"D": 24, "F": 13, "L": 2, "N": 6, "K": 3, "V": V, "T": 19}


def llama2c(path: Path, is_tied: bool = True) -> dict[str, np.ndarray]:
    """A file in its format, and its tensors as llama2.c names them."""
    D, F, L, N, K, _, length = SIZES.values()
    H, rng = D // N, np.random.default_rng(0)
    shapes = {
        "token_embedding": (V, D),
        "rms_att": (L, D),
        "wq": (L, N * H, D),
        "wk": (L, K * H, D),
        "wv": (L, K * H, D),
        "wo": (L, D, N * H),
        "rms_ffn": (L, D),
        "w1": (L, F, D),
        "w2": (L, D, F),
        "w3": (L, F, D),
        "rms_final": (D,),
        "freq_cos": (length, H // 2),
        "freq_sin": (length, H // 2),
        **({} if is_tied else {"wcls": (V, D)}),
    }
    weights = {n: 0.5 * rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}
    header = [*list(SIZES.values())[:5], V if is_tied else -V, length]
    path.write_bytes(
        np.array(header, "<i4").tobytes() + b"".join(w.tobytes() for w in weights.values())
    )
    return weights


def plain_llama2c(w: dict[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
    """Its forward pass in float64: rotary positions turn neighbours (2i, 2i + 1)."""
    D, _, L, N, K, _, _ = SIZES.values()
    H, length = D // N, len(tokens)
    w = {name: array.astype(np.float64) for name, array in w.items()}
    angles = np.arange(length)[:, None] / 10_000 ** (np.arange(0, H, 2) / H)

    def norm(x, scale):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * scale

    def turn(x):
        pairs = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)[:, None]
        return np.stack([pairs.real, pairs.imag], -1).reshape(x.shape)

    x = w["token_embedding"][tokens]
    for i in range(L):
        y = norm(x, w["rms_att"][i])
        q, k, v = (
            (y @ w[n][i].T).reshape(length, heads, H)
            for n, heads in (("wq", N), ("wk", K), ("wv", K))
        )
        k, v = (np.repeat(z, N // K, axis=1) for z in (turn(k), v))
        scores = np.einsum("tnh,snh->nts", turn(q), k) / np.sqrt(H)
        weights = np.exp(scores) * np.tri(length)
        weights /= weights.sum(-1, keepdims=True)
        x = x + np.einsum("nts,snh->tnh", weights, v).reshape(length, D) @ w["wo"][i].T
        y = norm(x, w["rms_ffn"][i])
        gate = y @ w["w1"][i].T
        x = x + (gate / (1 + np.exp(-gate)) * (y @ w["w3"][i].T)) @ w["w2"][i].T
    return norm(x, w["rms_final"]) @ w.get("wcls", w["token_embedding"]).T


@pytest.mark.parametrize("is_tied", [True, False])
def test_llama2c_logits(is_tied: bool, tmp_path: Path):
    weights = llama2c(tmp_path / "model.bin", is_tied)
    found = pretrained.read_llama2c(tmp_path / "model.bin")
    assert found.config.tie_embeddings == is_tied
    tokens = np.random.default_rng(1).integers(0, V, 7)
    apply = jax.jit(build(found.config).apply)
    logits = apply({"params": found.params}, jnp.asarray(tokens[None]))
    np.testing.assert_allclose(np.asarray(logits)[0], plain_llama2c(weights, tokens), atol=1e-4)
    write(tmp_path / "export", found.config, found.params, special=found.special)
    assert_equal(read(tmp_path / "export").params, found.params)


def test_llama2c_files_that_are_refused(tmp_path: Path):
    path = tmp_path / "model.bin"
    llama2c(path)
    content = path.read_bytes()
    size = f"{len(content):,}"
    for spoiled, parts in (
        (content[:-4], (f"{len(content) - 4:,} bytes", f"asks for {size}")),
        (content + b"0000", (f"{len(content) + 4:,} bytes", f"asks for {size}")),
        (content[:20], ("no llama2.c checkpoint", "[24, 13, 2, 6, 3]")),
        (b"\0" * 200, ("no llama2.c checkpoint",)),
        (np.array([7, *[2] * 6], "<i4").tobytes(), ("no llama2.c checkpoint",)),
    ):
        path.write_bytes(spoiled)
        refused(lambda: pretrained.read_llama2c(path), str(path), *parts)
    path.write_bytes(content + b"tokenizer")
    found: Pretrained = pretrained.read_llama2c(path, following=9)
    assert found.config.vocab_size == V
    refused(lambda: pretrained.read_llama2c(tmp_path / "none"), "does not exist")
