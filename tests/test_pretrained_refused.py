"""Test refusals: models that transformers' files cannot express, and files that hold no model."""

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import V
from tiny_pretrained import (
    BERT,
    CLASSIFIER,
    GPT2,
    LLAMA,
    LONGFORMER,
    MARIAN,
    MODELS,
    SPECIAL,
    T5,
    assert_equal,
    change,
    change_tensors,
    export,
    random,
    refused,
)

from heedful.model import pretrained
from heedful.model.config import (
    FeedForwardConfig,
    HeadConfig,
    LinformerConfig,
    LoraConfig,
    ModelConfig,
    NormConfig,
    PerformerConfig,
    PositionConfig,
)
from heedful.model.pretrained import read, read_config, write
from heedful.model.pretrained import tensors as tensors_module

# Models that no architecture expresses ----------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        (replace(GPT2, positions=PositionConfig(kind="alibi")), ("model.positions.kind = alibi",)),
        (replace(GPT2, norm=NormConfig(position="post")), ("model.norm.epsilon = 1e-06", "opt")),
        (replace(GPT2, head=HeadConfig(bias=True)), ("model.head.bias = True", "gpt2")),
        (replace(GPT2, type_vocab_size=2), ("model.type_vocab_size = 2", "gpt2")),
        (
            replace(LLAMA, feed_forward=replace(LLAMA.feed_forward, gated=False)),
            ("model.feed_forward.gated = False", "llama"),
        ),
        (replace(BERT, head=HeadConfig()), ("model.head.transform = False", "bert")),
        (
            replace(BERT, type_vocab_size=0, norm=replace(BERT.norm, epsilon=1e-5)),
            ("model.norm.epsilon = 1e-05", "distilbert has 1e-12"),
        ),
        (
            replace(BERT, head=replace(CLASSIFIER, pooling="mean")),
            ("model.head.pooling = mean", "bert"),
        ),
        (replace(BERT, head=replace(CLASSIFIER, pooler=False)), ("model.head.pooler = False",)),
        (
            replace(BERT, attention=replace(BERT.attention, window=3)),
            ("model.attention.window = 3", "bert has None"),
        ),
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
        *(
            (
                replace(model, attention=replace(model.attention, **{name: core, core: tuned})),
                (f"model.attention.{name} = {core} cannot be exported",),
            )
            for model, name, core, tuned in (
                (GPT2, "core", "performer", PerformerConfig()),
                (GPT2, "core", "performer", PerformerConfig(features=7)),
                (BERT, "core", "linformer", LinformerConfig(rank=3)),
                (MARIAN, "decoder_core", "performer", PerformerConfig(features=7)),
                (MARIAN, "cross_core", "linformer", LinformerConfig(rank=3)),
            )
        ),
        (replace(GPT2, vocab_size=None), ("model.vocab_size is not set",)),
        (replace(GPT2, head=replace(CLASSIFIER, pooling="last")), ("model.head.",)),
    ],
)
def test_configs_that_cannot_be_exported(config: ModelConfig, parts: tuple[str, ...], tmp_path):
    refused(lambda: pretrained.config_to_hf(config), *parts)
    refused(lambda: write(tmp_path / "x", config, {}, special=SPECIAL), *parts)
    assert not (tmp_path / "x").exists()


def test_positions_of_longformer_begin_after_its_padding(tmp_path):
    params = random(LONGFORMER)
    refused(
        lambda: write(tmp_path / "x", LONGFORMER, params, special={"pad_token_id": 0}),
        "pad_token_id = 0",
        "in longformer it is 1",
    )


def test_what_only_training_knows_does_not_hinder():
    config = replace(LLAMA, dropout=0.3, remat="full", unroll=2, dtype="bfloat16", init="glorot")
    assert pretrained.config_to_hf(config) == pretrained.config_to_hf(LLAMA)


def test_exact_cores_are_one_function():
    cores = {"core": "flash", "decoder_core": "ring", "cross_core": "dense"}
    config = replace(MARIAN, attention=replace(MARIAN.attention, **cores))
    assert pretrained.config_to_hf(config) == pretrained.config_to_hf(MARIAN)


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        ({"special": {"eos": 1}}, ("'eos'", "eos_token_id")),
        ({"special": {"eos_token_id": V}}, (f"eos_token_id = {V}", f"vocab_size = {V}")),
        ({"special": {"eos_token_id": [1, -1]}}, ("eos_token_id = -1",)),
        ({"special": {}}, ("decoder_start_token_id", "marian")),
        ({"labels": ["a", "b"]}, ("2 labels", "0 classes")),
    ],
)
def test_ids_and_labels_that_do_not_fit(more: Any, parts: tuple[str, ...], tmp_path: Path):
    refused(lambda: export(tmp_path, "MarianMTModel", **more), *parts)


def test_labels_that_are_not_distinct(tmp_path: Path):
    labels = ["good", *"bcdef", "good"]
    write_it = lambda: export(tmp_path, "BertForSequenceClassification", labels=labels)  # noqa: E731
    refused(write_it, "a class twice", "good")


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
    refused(lambda: write(directory, untied, params, special={}), "params have no head/kernel")
    more = params | {"head": {"bias": np.zeros(V)}}
    refused(lambda: write(directory, GPT2, more, special={}), "params have head/bias")
    assert not directory.exists()


# Files that are not overwritten -------------------------------------------------------------------


def test_an_export_is_not_overwritten_by_another(tmp_path: Path):
    directory = export(tmp_path, "GPT2LMHeadModel")
    (directory / "tokenizer.json").write_text("{}")
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    export(tmp_path, "GPT2LMHeadModel")  # The same files are accepted.
    for other in (lambda: export(tmp_path, "LlamaForCausalLM"), lambda: other_values(directory)):
        refused(other, str(directory), "of another export")
    many = lambda: export(tmp_path, "GPT2LMHeadModel", max_shard_bytes=3000)  # noqa: E731
    refused(many, "has model.safetensors of another export")
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


def write_config(content: str) -> Callable[[Path], object]:
    return lambda directory: (directory / "config.json").write_text(content)


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
        (
            shard_missing,
            ("index.json", "model-00001-of-00002.safetensors", "not in the same"),
        ),
        (tensor_not_in_shard, ("a.safetensors has no tensor other",)),
        (no_map, ("index.json", "weight_map")),
        (lambda d: (d / "config.json").unlink(), ("config.json does not exist",)),
        (write_config("{"), ("config.json is not JSON",)),
        (write_config("[]"), ("config.json is JSON, but not an object",)),
    ],
)
def test_files_that_are_refused(spoil: Callable, parts: tuple[str, ...], tmp_path: Path):
    directory = export(tmp_path, "GPT2LMHeadModel")
    spoil(directory)
    refused(lambda: read(directory), str(directory), *parts)


def test_tensors_of_another_model(tmp_path: Path):
    """A tensor of the body or the head is refused if our model has no parameter for it."""
    cases = {
        "LlamaForCausalLM": ["model.layers.0.self_attn.q_proj.bias", "model.norm.bias",
                             "lm_head.bias"],
        "LlamaForCausalLM tied": ["model.layers.2.mlp.up_proj.weight", "lm_head.bias"],
        "LlamaModel": ["layers.1.self_attn.q_norm.weight"],
        "BertForMaskedLM": ["bert.encoder.layer.2.output.dense.weight",
                            "bert.embeddings.norm.weight", "cls.predictions.scale"],
        "BertForSequenceClassification": ["bert.encoder.embed.weight", "classifier.scale"],
        "GPT2LMHeadModel": ["transformer.h.0.ln_cross_attn.weight", "h.0.crossattention.bias"],
        "T5ForConditionalGeneration": ["encoder.block.0.layer.0.SelfAttention.q.bias",
                                       "decoder.block.1.layer.2.DenseReluDense.wi_0.weight"],
        "MarianMTModel": ["model.encoder.layernorm_embedding.weight", "lm_head.bias",
                          "model.decoder.layers.0.fc3.weight"],
    }  # fmt: skip
    for name, tensors in cases.items():
        directory = export(tmp_path / name, name)
        whole = load_file(directory / "model.safetensors")
        for tensor in tensors:
            save_file(whole | {tensor: np.ones(3, np.float32)}, directory / "model.safetensors")
            for reads in (read, pretrained.read_config):
                refused(lambda r=reads, d=directory: r(d), f"has {tensor}, for which", "no place")


def test_one_tensor_under_two_names(tmp_path: Path):
    directory = export(tmp_path, "GPT2LMHeadModel")
    change_tensors(directory, lambda t: t.update({"wpe.weight": t["transformer.wpe.weight"] + 1}))
    refused(lambda: read(directory), "has transformer.wpe.weight and wpe.weight", "one tensor")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_weights_that_are_not_finite(value: float, dtype: Any, tmp_path: Path):
    directory = export(tmp_path, "GPT2LMHeadModel")
    name = "transformer.h.1.mlp.c_fc.bias"

    def spoil(tensors: dict[str, Any]) -> None:
        tensors[name] = tensors[name].astype(dtype)
        tensors[name][3] = value

    change_tensors(directory, spoil)
    refused(lambda: read(directory), "model.safetensors", name, "NaN or infinite")


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
        ("BertForMaskedLM", "model_type", "deberta"),
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
        ("BertForSequenceClassification", "id2label", {f"class {i}": "x" for i in range(7)}),
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
        ("MarianMTModel", "num_attention_heads", 2),
        ("GPT2LMHeadModel", "is_causal", False),
        ("LlamaForCausalLM", "is_causal", False),
        ("T5ForConditionalGeneration", "is_causal", False),
        ("MarianMTModel", "is_causal", False),
        ("GPT2LMHeadModel", "tie_encoder_decoder", True),
        ("BertForMaskedLM", "pruned_heads", {"0": [1]}),
        ("LongformerForMaskedLM", "ignore_attention_mask", True),
        ("LlamaForCausalLM", "layer_types", ["full_attention", "sliding_attention"]),
        ("LlamaForCausalLM", "partial_rotary_factor", 0.5),
        ("LlamaForCausalLM", "rms_norm_eps", float("inf")),
        ("T5ForConditionalGeneration", "dense_act_fn", "tanh"),
        ("T5ForConditionalGeneration", "num_hidden_layers", 2),
        ("BertForSequenceClassification", "problem_type", "multi_label_classification"),
        ("BertForSequenceClassification", "problem_type", "regression"),
        ("BertForSequenceClassification", "num_labels", 2),
        ("LongformerForSequenceClassification", "problem_type", "multi_label_classification"),
        ("GPT2LMHeadModel", "n_layer", 2**31),
    ],
)
def test_values_in_config_json_that_are_refused(name: str, key: str, value: Any, tmp_path: Path):
    directory = export(tmp_path, name)
    change(directory, **{key: value})
    refused(lambda: read(directory), f'config.json has "{key}": {value!r}', "supports only")


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("LlamaForCausalLM", "per_layer_config", {"1": {"num_key_value_heads": 1}}),
        ("LlamaForCausalLM", "sliding_window", 4),
        ("BertForMaskedLM", "auto_map", {"AutoModel": "own.Model"}),
        ("BertForMaskedLM", "transformers_weights", "other.safetensors"),
        ("GPT2LMHeadModel", "kind_of_attention", 0),
    ],
)
def test_keys_that_are_not_known_are_refused(name: str, key: str, value: Any, tmp_path: Path):
    directory = export(tmp_path, name)
    change(directory, **{key: value})
    refused(lambda: read(directory), f'config.json has "{key}": {value!r}', "an unknown key")
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: None}))
    read(directory)


HUGE = 2_000_000_000


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("GPT2LMHeadModel", {"n_embd": 1_500_000_000}),
        ("GPT2LMHeadModel", {"n_inner": HUGE}),
        ("GPT2LMHeadModel", {"n_layer": 9_999}),
        ("LlamaForCausalLM", {"num_hidden_layers": 9_999}),
        ("BertForMaskedLM", {"vocab_size": HUGE}),
        (
            "T5ForConditionalGeneration",
            {
                "relative_attention_num_buckets": HUGE,
                "relative_attention_max_distance": HUGE,
            },
        ),
    ],
)
def test_sizes_are_compared_before_memory_is_taken(
    name: str, sizes: dict[str, int], tmp_path: Path
):
    directory = export(tmp_path, name)
    change(directory, **sizes)
    for call in (read, read_config):
        refused(lambda call=call: call(directory), str(directory / "model.safetensors"))


@pytest.mark.parametrize(
    ("name", "changes", "part"),
    [
        (
            "T5ForConditionalGeneration",
            {"relative_attention_num_buckets": 6},
            '"relative_attention_num_buckets" = 6 must be a multiple of 4, and '
            '"relative_attention_max_distance" = 5 must be above half of the buckets, 3',
        ),
        (
            "GPT2LMHeadModel",
            {"n_head": 4},
            '"n_head" = 4 does not divide "n_embd" = 15',
        ),
        (
            "GPT2LMHeadModel",
            {"num_attention_heads": 4},
            '"num_attention_heads" = 4 does not divide "n_embd" = 15',
        ),
        ("GPT2LMHeadModel", {"n_inner": 0}, '"n_inner" must be positive, not 0'),
        ("T5ForConditionalGeneration", {"num_decoder_layers": 0}, '"num_decoder_layers" must be'),
        ("LlamaForCausalLM", {"num_key_value_heads": 4}, '"num_key_value_heads" = 4 must divide'),
        ("BertForMaskedLM", {"layer_norm_eps": 0}, '"layer_norm_eps" must be positive, not 0'),
        ("MarianMTModel", {"dropout": 1.5}, '"dropout" must lie in [0, 1), not 1.5'),
    ],
)
def test_values_that_make_no_model_are_named_as_in_the_file(
    name: str, changes: dict[str, Any], part: str, tmp_path: Path
):
    directory = export(tmp_path, name)
    change(directory, **changes)
    refused(lambda: read(directory), f"{directory / 'config.json'}: {part}")


@pytest.mark.parametrize(
    ("scaling", "part"),
    [
        ({"rope_type": "yarn", "factor": 2.0}, "\"rope_type\": 'yarn'"),
        ({"rope_type": "linear"}, 'has no "factor"'),
        ({"rope_type": "linear", "factor": 2.0, "beta_fast": 3}, '"beta_fast": 3'),
        ({"partial_rotary_factor": 0.5}, '"partial_rotary_factor": 0.5'),
    ],
)
def test_scalings_that_are_refused(scaling: dict, part: str, tmp_path: Path):
    directory = export(tmp_path, "LlamaForCausalLM")
    change(directory, rope_scaling=scaling)
    refused(lambda: read(directory), "rope_scaling in", "config.json", part)
