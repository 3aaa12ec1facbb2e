"""Test export and import of weights: same bits, and the names and shapes of transformers' files."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny import B, T, V
from tiny_pretrained import (
    LLAMA,
    LLAMA3,
    MODELS,
    SPECIAL,
    assert_equal,
    change,
    change_tensors,
    export,
    random,
    refused,
)

from heedful.model import pretrained
from heedful.model.config import HeadConfig, LoraConfig
from heedful.model.pretrained import read, write
from heedful.model.transformer import build

SAVED = {"transformers_version": "4.9.0", "use_cache": True, "task_specific_params": None}
FOUND: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert-base-uncased": (
        "bert",
        "BertForMaskedLM",
        {"gradient_checkpointing": False, "initializer_range": 0.02, "pad_token_id": 0}
        | {"position_embedding_type": "absolute", **SAVED},
    ),
    "bert-base-chinese": (
        "bert",
        "BertForMaskedLM",
        {"directionality": "bidi", "pooler_fc_size": 768, "pooler_num_attention_heads": 12}
        | {"pooler_num_fc_layers": 3, "pooler_size_per_head": 128}
        | {"pooler_type": "first_token_transform", "output_past": True},
    ),
    "ms-marco-MiniLM": (
        "bert",
        "BertForSequenceClassification",
        {"_name_or_path": "nreimers/MiniLM", "torch_dtype": "float32", "_num_labels": 2}
        | {"sentence_transformers": {"activation_fn": "torch.nn.Identity"}}
        | {"finetuning_task": "mrpc", "problem_type": "single_label_classification"},
    ),
    "longformer": (
        "longformer",
        "LongformerForMaskedLM",
        {"attention_mode": "longformer", "ignore_attention_mask": False, "sep_token_id": 2},
    ),
    "gpt2": (
        "gpt2",
        "GPT2LMHeadModel",
        {"n_ctx": 1024, "summary_type": "cls_index", "summary_use_proj": True}
        | {"summary_activation": None, "summary_first_dropout": 0.1, "bos_token_id": 50256}
        | {"summary_proj_to_labels": True, "hidden_size": 768}
        | {"task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}},
    ),
    "Llama-2": (
        "llama",
        "LlamaForCausalLM",
        {"pretraining_tp": 1, "max_sequence_length": 2048, "rope_scaling": None, **SAVED}
        | {"dtype": "bfloat16", "attention_bias": False, "eos_token_id": [128001, 128009]},
    ),
    "flan-t5": (
        "t5",
        "T5ForConditionalGeneration",
        {"n_positions": 512, "output_past": True, "dense_act_fn": "relu", "is_gated_act": False}
        | {"classifier_dropout": 0.0, "num_hidden_layers": 6, "is_encoder_decoder": True}
        | {"task_specific_params": {"translation_en_to_de": {"prefix": "translate: "}}},
    ),
    "opus-mt": (
        "marian",
        "MarianMTModel",
        {"_num_labels": 3, "add_bias_logits": False, "add_final_layer_norm": False}
        | {"bad_words_ids": [[58100]], "classif_dropout": 0.0, "classifier_dropout": 0.0}
        | {"decoder_vocab_size": 58101, "extra_pos_embeddings": 58101, "num_hidden_layers": 12}
        | {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "max_length": 512}
        | {"num_beams": 6, "forced_eos_token_id": 0, "init_std": 0.02, **SAVED}
        | {"force_bos_token_to_be_generated": False, "static_position_embeddings": True},
    ),
}
"""Keys of config.json in known models, besides sizes."""


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
    if config.head.kind == "language_model":  # Files lack this value: the default returns.
        wanted = replace(config, head=replace(config.head, dropout=HeadConfig().dropout))
    if "Marian" in name or "T5" in name:
        wanted = replace(wanted, init="glorot")
    assert found.config == wanted
    assert pretrained.read_config(tmp_path / "one") == wanted
    modes = {path.stat().st_mode for path in (tmp_path / "one").iterdir()}
    assert len(modes) == 1  # All files have the permissions of config.json.
    write(tmp_path / "two", found.config, found.params, special=found.special)
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_config_without_names_of_defaults():
    # The values of bert-base-uncased come from config.json and, for missing keys, from defaults.
    config = pretrained.config_from_hf({"model_type": "bert", "architectures": ["BertForMaskedLM"]})
    assert (config.vocab_size, config.width, config.layers, config.type_vocab_size) == (
        30522,
        768,
        12,
        2,
    )
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


def test_ropes_in_two_places(tmp_path: Path):
    """rope_scaling wins, as in transformers; an original length outside it wins over its own."""
    directory = export(tmp_path, "LlamaForCausalLM tied")
    change(directory, rope_parameters={"rope_type": "linear", "factor": 7.0})
    assert read(directory).config.positions.rotary == LLAMA3
    change(directory, original_max_position_embeddings=50)
    assert read(directory).config.positions.rotary == replace(LLAMA3, original_length=50)
    scaling = json.loads((directory / "config.json").read_text())["rope_scaling"]
    del scaling["original_max_position_embeddings"]
    change(directory, rope_scaling=scaling, original_max_position_embeddings=None)
    assert read(directory).config.positions.rotary == replace(LLAMA3, original_length=19)


def test_keys_under_other_names(tmp_path: Path):
    """A key's common name wins over the name in its architecture, as in transformers."""
    directory = export(tmp_path, "GPT2LMHeadModel")
    change(directory, num_attention_heads=5, max_position_embeddings=17, n_positions=None)
    config = read(directory).config
    assert (config.attention.heads, config.positions.max_length) == (5, 17)
    directory = export(tmp_path / "marian", "MarianMTModel")
    change(directory, num_hidden_layers=3, encoder_layers=2)
    assert read(directory).config.encoder_layers == 3


def test_the_activation_of_t5_has_two_names(tmp_path: Path):
    directory = export(tmp_path, "T5ForConditionalGeneration 1.1")
    change(directory, dense_act_fn="silu", is_gated_act=True, feed_forward_proj="relu")
    feed_forward = read(directory).config.feed_forward
    assert (feed_forward.activation, feed_forward.gated) == ("silu", True)


@pytest.mark.parametrize("name", FOUND)
def test_what_else_files_have_changes_nothing(name: str):
    model_type, classes, more = FOUND[name]
    values = {"model_type": model_type, "architectures": [classes]}
    found, plain = (pretrained.config_from_hf(v) for v in (values | more, values))
    assert found == plain


def test_a_rope_that_is_scaled_by_1_is_not_scaled(tmp_path: Path):
    directory = export(tmp_path, "LlamaForCausalLM")
    for scaling in ({"rope_type": "linear"}, {"rope_type": "llama3"}):
        change(directory, rope_scaling={**scaling, "factor": 1.0})
        assert read(directory).config == LLAMA


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
    """Files may have a bare body's or TensorFlow's names, buffers, and copies of tied tensors."""
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


FREQUENCIES = 500.0 ** -np.array([0, 0.5])
ANGLES = np.arange(512)[:, None] / 10_000 ** (np.arange(0, 10, 2) / 10)
BUFFERS: list[tuple[str, str, np.ndarray]] = [
    ("BertModel", "embeddings.position_ids", np.arange(17)[None]),
    ("LongformerModel", "embeddings.position_ids", np.arange(19)[None]),
    ("GPT2LMHeadModel", "h.0.attn.bias", np.tril(np.ones((1, 1, 17, 17), bool))),
    ("GPT2LMHeadModel", "h.2.attn.masked_bias", np.array(-1e4)),
    ("LlamaForCausalLM", "model.layers.1.self_attn.rotary_emb.inv_freq", FREQUENCIES),
    ("LlamaForCausalLM tied", "model.layers.0.self_attn.rotary_emb.inv_freq", FREQUENCIES),
    *(
        (
            "MarianMTModel",
            f"model.{stack}.embed_positions.weight",
            np.concatenate([np.sin(ANGLES), np.cos(ANGLES)], axis=-1),
        )
        for stack in ("encoder", "decoder")
    ),
]


@pytest.mark.parametrize(("name", "buffer", "values"), BUFFERS)
def test_buffers_that_files_have(name: str, buffer: str, values: np.ndarray, tmp_path: Path):
    """Buffers of any precision are compared with the values that the model computes."""
    directory = export(tmp_path, name)
    expected = read(directory)

    def old(tensors: dict[str, Any]) -> None:
        for key in list(tensors):
            tensors[key.removeprefix("transformer.")] = tensors.pop(key)

    if name.startswith("GPT2"):
        change_tensors(directory, old)
    is_float = values.dtype.kind == "f"
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16) if is_float else (values.dtype,):
        change_tensors(directory, lambda t, dtype=dtype: t.update({buffer: values.astype(dtype)}))
        found = read(directory)
        assert_equal(found.params, expected.params)
        assert found.unused == []
    wrong = np.array(values, np.float32)
    wrong.reshape(-1)[-1] += 0.1 if wrong.ndim else 1e4
    for other in (wrong, np.zeros((3, 2), np.float32), np.full_like(wrong, np.nan)):
        change_tensors(directory, lambda t, other=other: t.update({buffer: other}))
        refused(lambda: read(directory), f"{buffer} does not have the values")


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
