"""Test export to the files of transformers and import: bits, names and tokenizer stay the same."""

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import quick
import tokenizers
import toy
from test_cli import fails
from tiny_pretrained import GPT2, change_tensors

from heedful.data.config import TokenizerConfig
from heedful.data.errors import DataError
from heedful.data.tokenizer import Tokenizer
from heedful.model.config import (
    AttentionConfig,
    FeedForwardConfig,
    HeadConfig,
    LoraConfig,
    ModelConfig,
    NormConfig,
    PositionConfig,
)
from heedful.model.pretrained import merge_lora
from heedful.train import cli
from heedful.train.config import DecodeConfig
from heedful.train.inference.generate import Generator
from heedful.train.load import load
from heedful.train.run import Run
from heedful.train.trainable import named


def bert(head: HeadConfig, **values: Any) -> ModelConfig:
    return ModelConfig(
        architecture="encoder_only",
        width=16,
        layers=2,
        attention=AttentionConfig(heads=2),
        feed_forward=FeedForwardConfig(width=12, activation="gelu"),
        norm=NormConfig(epsilon=1e-12, embeddings=True),
        positions=PositionConfig(kind="learned", max_length=64),
        head=head,
        type_vocab_size=2,
        scale_embeddings=False,
        init="normal",
        **values,
    )


LANGUAGE = HeadConfig(transform=True, bias=True)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Make runs of BERT without training: a language model, a classifier and a regression."""
    folder = tmp_path_factory.mktemp("runs")
    words = TokenizerConfig(kind="wordpiece", vocab_size=99)
    text = toy.data(toy.write_text(folder), "masked_lm", tokenizer=words)
    toy.random_run(folder / "language", bert(LANGUAGE), text)
    adapted = bert(LANGUAGE, lora=LoraConfig(rank=2))
    toy.random_run(folder / "adapted", adapted, text)
    classifier = bert(HeadConfig(kind="classifier"))
    table = toy.data(toy.write_table(folder), "classification", tokenizer=words)
    toy.random_run(folder / "classes", classifier, table)
    table = toy.data(toy.write_table(folder, toy.number), "regression", tokenizer=words)
    toy.random_run(folder / "numbers", classifier, table)
    return folder


def exchanged(runs: Path, name: str, target: Path) -> tuple[Run, dict, Run, dict]:
    """Export and import a run by commands; return both runs, each with its parameters."""
    assert cli.run(["export", str(runs / name), str(target / "hf")]) == 0
    assert cli.run(["import", f"hf:{target / 'hf'}", "--run-dir", str(target / "run")]) == 0
    both = []
    for directory in (runs / name, target / "run"):
        trained = load(directory, toy.QUIET)
        both += [trained.run, dict(named(jax.device_get(trained.params)))]
    return tuple(both)  # type: ignore[return-value]


@pytest.mark.parametrize("name", quick.only(["language"], ["language", "classes", "numbers"]))
def test_there_and_back(runs, name: str, tmp_path, capsys):
    before, given, after, found = exchanged(runs, name, tmp_path)
    assert given.keys() == found.keys()
    for key, value in given.items():
        assert value.tobytes() == found[key].tobytes(), key
    assert after.model == before.model
    texts = ["small red cat", "a <unk> (zebra)", "<eos> [PAD]", ""]
    ids = [run.tokenizer().encode_batch(texts) for run in (before, after)]
    jax.tree.map(np.testing.assert_array_equal, *ids)
    assert [after.tokenizer().decode(row) for row in ids[1]] == [
        before.tokenizer().decode(row) for row in ids[0]
    ]
    assert after.data.objective == before.data.objective
    assert (
        after.data.classes == before.data.classes == (("bad", "good") if name == "classes" else ())
    )
    out = capsys.readouterr().out
    assert f"exported to {tmp_path / 'hf'}: config.json, model.safetensors, tokenizer" in out
    assert "parameters: " in out and f"the run lies in {tmp_path / 'run'}" in out


def test_it_answers_as_before(runs, tmp_path, capsys):
    exchanged(runs, "classes", tmp_path)
    answers = []
    for directory in (runs / "classes", tmp_path / "run"):
        capsys.readouterr()
        assert cli.run(["classify", str(directory), "small red cat"]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] and answers[0].split("\t")[0] in ("bad", "good")


def test_low_rank_updates_are_merged(runs, tmp_path):
    before, _, after, found = exchanged(runs, "adapted", tmp_path)
    params = load(before.directory, toy.QUIET).params
    merged = dict(named(merge_lora(before.model, params)[1]))
    assert after.model.lora == LoraConfig() and merged.keys() == found.keys()
    for key, value in merged.items():
        np.testing.assert_array_equal(value, found[key])


def test_names_of_classes(runs, tmp_path, capsys):
    target = tmp_path / "hf"
    assert cli.run(["export", str(runs / "classes"), str(target)]) == 0
    command = ["import", f"hf:{target}", "--run-dir", str(tmp_path / "named")]
    fails(capsys, [*command, "--data.classes", "a", "b", "c"], "3 classes", "2 outputs")
    assert cli.run([*command, "--data.classes", "no", "yes"]) == 0
    assert Run.open(tmp_path / "named").data.classes == ("no", "yes")
    path = target / "config.json"
    values = json.loads(path.read_text())
    del values["id2label"], values["label2id"]
    path.write_text(json.dumps(values))
    nameless = ["import", f"hf:{target}", "--run-dir", str(tmp_path / "nameless")]
    assert cli.run(nameless) == 0
    assert Run.open(tmp_path / "nameless").data.classes == ("0", "1")


def test_mistakes(runs, tmp_path, capsys):
    target, run = tmp_path / "hf", tmp_path / "run"
    assert cli.run(["export", str(runs / "language"), str(target)]) == 0
    command = ["import", f"hf:{target}", "--run-dir", str(run)]
    fails(capsys, [*command, "--data.objective", "causal_lm"], "causal_lm needs", "decoder_only")
    assert not run.exists()
    assert cli.run(command) == 0
    fails(capsys, command, f"{run} holds a run already")
    fails(capsys, ["import", f"hf:{tmp_path}"], "neither tokenizer.json nor vocab.txt")
    fails(capsys, ["export", str(runs / "language")], "needs an output")
    before = {path: path.read_bytes() for path in target.iterdir()}
    fails(capsys, ["export", str(runs / "classes"), str(target)], f"{target} is not empty")
    assert {path: path.read_bytes() for path in target.iterdir()} == before
    larger = json.loads((target / "tokenizer.json").read_text())
    larger["model"]["vocab"]["zebra"] = 98
    (target / "tokenizer.json").write_text(json.dumps(larger))
    fails(capsys, ["import", f"hf:{target}"], "tokenizer.json has 99 entries", "own tokenizer")


@pytest.mark.slow
def test_what_is_left_out_is_listed(runs, tmp_path, capsys):
    """Import and fine-tuning list unused tensors, and prefixes that wrap the names of tensors."""
    given = dict(named(jax.device_get(load(runs / "language", toy.QUIET).params)))
    target, run = tmp_path / "hf", tmp_path / "run"
    assert cli.run(["export", str(runs / "language"), str(target)]) == 0
    other = {"cls.seq_relationship.bias": np.zeros(2, np.float32)}

    def wrap(tensors: dict[str, Any]) -> None:
        for name in list(tensors):
            tensors[f"module._orig_mod.{name}"] = tensors.pop(name)
        tensors |= other

    change_tensors(target, wrap)
    notes = [
        f"hf:{target}: prefix _orig_mod. removed from names of tensors",
        f"hf:{target}: prefix module. removed from names of tensors",
        f"hf:{target}: left out, not part of the model: cls.seq_relationship.bias",
    ]
    capsys.readouterr()
    assert cli.run(["import", f"hf:{target}", "--run-dir", str(run)]) == 0
    assert set(notes) <= set(capsys.readouterr().out.splitlines())
    found = dict(named(jax.device_get(load(run, toy.QUIET).params)))
    for key, value in given.items():
        assert value.tobytes() == found[key].tobytes(), key
    flags = toy.files(runs / "table.tsv") + toy.training(steps=2, every=2)
    command = ["train", "sentiment_tiny", "--run-dir", str(tmp_path / "tuned"), *flags]
    command += ["--data.max-length", "16", "--data.batch-tokens", "256", "--data.buckets", "1"]
    assert cli.run([*command, "--init-from", f"hf:{target}"]) == 0
    assert set(notes) <= set(capsys.readouterr().out.splitlines())
    change_tensors(target, lambda t: t.update({"bert.encoder.layer.0.attention.bias": np.ones(3)}))
    fails(capsys, ["import", f"hf:{target}"], "layer.0.attention.bias, for which", "no place")


def test_added_tokens_that_the_model_has_no_row_for(runs, tmp_path, capsys):
    target, run = tmp_path / "hf", tmp_path / "run"
    assert cli.run(["export", str(runs / "classes"), str(target)]) == 0
    path = target / "tokenizer.json"
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    size = tokenizer.get_vocab_size()
    tokenizer.add_tokens(["tool"])
    tokenizer.add_special_tokens(["[PAD]"])
    tokenizer.save(str(path))
    capsys.readouterr()
    assert cli.run(["import", f"hf:{target}", "--run-dir", str(run)]) == 0
    assert f"{path} has tool, [PAD], but the model has no embeddings" in capsys.readouterr().out
    for directory in (runs / "classes", run):
        assert cli.run(["classify", str(directory), "small red [PAD] cat"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == lines[1]
    found = Run.open(run).tokenizer()
    assert found.vocab_size == size == Run.open(run).model.vocab_size
    assert found.ordinary.max() < size and len(found.is_special) == size and found.pad == 0
    assert pickle.loads(pickle.dumps(found)).rowless == {"tool": size, "[PAD]": size + 1}
    fails(capsys, ["classify", str(run), "a tool"], "a text has 'tool'", f"only {size} embeddings")
    with pytest.raises(DataError, match=r"a text has '\[PAD\]'"):
        found.encode_batch(["a [PAD]"], special_tokens=True)


# Files of other programs -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def writer(tmp_path_factory) -> Path:
    """Export a GPT-2 with random parameters, whose tokens are characters."""
    folder = tmp_path_factory.mktemp("writer")
    chars = TokenizerConfig(kind="chars", vocab_size=99)
    text = toy.data(toy.write_text(folder), "causal_lm", tokenizer=chars)
    toy.random_run(folder / "run", replace(GPT2, vocab_size=None), text)
    assert cli.run(["export", str(folder / "run"), str(folder / "hf")]) == 0
    return folder / "hf"


def changed(source: Path, target: Path, **files: dict[str, Any]) -> Path:
    """Copy an export and change values in its JSON files; None removes a key."""
    shutil.copytree(source, target)
    for name, values in files.items():
        path = target / f"{name}.json"
        there = json.loads(path.read_text()) if path.exists() else {}
        there = {key: v for key, v in (there | values).items() if v is not None}
        path.write_text(json.dumps(there))
    return target


def imported(source: Path, directory: Path, *flags: str) -> Run:
    assert cli.run(["import", f"hf:{source}", "--run-dir", str(directory), *flags]) == 0
    return Run.open(directory)


def test_special_tokens_are_those_of_the_files(writer, tmp_path):
    """Files give ids in config.json and generation_config.json, which wins, and tokenizer names."""
    plain = imported(writer, tmp_path / "plain").tokenizer()
    a, b = (int(plain.encode_batch([c])[0][0]) for c in "ab")
    files = {
        "config": {"eos_token_id": a, "bos_token_id": b, "pad_token_id": -1},
        "generation_config": {"eos_token_id": [plain.eos, a]},
        "tokenizer_config": {"eos_token": {"content": "a"}, "mask_token": "r"},
    }
    source = changed(writer, tmp_path / "hf", **files)
    run = imported(source, tmp_path / "run")
    found = run.tokenizer()
    assert found.ends == (plain.eos, a) and found.eos == a and found.bos == b
    assert found.name(found.mask) == "r" and found.pad == plain.pad
    assert found.fingerprint != plain.fingerprint
    # A token does not become special because config.json names it: its text is encoded as text.
    assert found.encode_batch(["b"])[0].tolist() == [b] and found.is_special[a]

    assert cli.run(["export", str(run.directory), str(tmp_path / "back")]) == 0
    for name in ("config", "generation_config", "tokenizer_config"):
        before = json.loads((source / f"{name}.json").read_text())
        after = json.loads((tmp_path / "back" / f"{name}.json").read_text())
        same = [key for key in before if "token" in key and before[key] != -1]
        assert len(same) >= 2 or name == "generation_config"
        for key in same:
            expected = before[key]
            expected = expected["content"] if isinstance(expected, dict) else expected
            assert after[key] == expected, (name, key)
    again = imported(tmp_path / "back", tmp_path / "again").tokenizer()
    assert (again.ends, again.bos, again.fingerprint) == (found.ends, b, found.fingerprint)


@pytest.mark.slow
def test_every_end_ends_a_text(writer, tmp_path, capsys):
    tokenizer = Tokenizer.load(writer / "tokenizer.json")
    written, more = [], []
    for number in range(2):
        source = changed(writer, tmp_path / f"hf{number}", config={"eos_token_id": [2, *more]})
        directory = tmp_path / f"run{number}"
        imported(source, directory)
        capsys.readouterr()
        flags = ["--decode.max-tokens", "12", "--decode.never", "2"]
        assert cli.run(["generate", str(directory), "red", *flags]) == 0
        written.append(capsys.readouterr().out.removesuffix("\n").removeprefix("red"))
        more = tokenizer.encode_batch([written[0][-1]])[0].tolist()
    assert len(written[0]) == 12
    assert written[1] == written[0][: written[0].index(written[0][-1])]


def test_a_special_token_in_a_prompt_is_that_token_where_it_is_asked_for(writer, tmp_path):
    run = imported(writer, tmp_path / "run", "--decode.special-tokens")
    assert run.train.decode.special_tokens
    tokenizer = run.tokenizer()
    for reads in (False, True):
        decode = replace(run.train.decode, special_tokens=reads, max_tokens=3)
        trained = load(run.directory, toy.QUIET)
        generator = Generator(run.model, decode, tokenizer, trained.params, trained.mesh)
        ids = generator._encode(["<bos>r<eos>d"])[0].tolist()
        r, d = (int(tokenizer.encode_batch([c])[0][0]) for c in "rd")
        assert (ids == [tokenizer.bos, r, tokenizer.eos, d]) == reads
        assert ids[0] == tokenizer.bos and (tokenizer.eos in ids) == reads


def test_generation_config_is_followed_or_named(writer, tmp_path, capsys):
    values = {
        "num_beams": 3, "length_penalty": 0.7, "early_stopping": True, "repetition_penalty": 1.2,
        "max_new_tokens": 9, "bad_words_ids": [[0], [2], [5, 6]], "suppress_tokens": [7],
        "no_repeat_ngram_size": 3, "max_length": 50, "use_cache": True, "temperature": 0.3,
    }  # fmt: skip
    source = changed(writer, tmp_path / "hf", generation_config=values)
    capsys.readouterr()
    run = imported(source, tmp_path / "run", "--decode.beam", "2")
    decode = DecodeConfig(
        beam=2, length_penalty=0.7, length_penalty_offset=0, early_stopping=True,
        repetition_penalty=1.2, max_tokens=9, never=(0, 7),
    )  # fmt: skip
    assert run.train.decode == decode
    out = capsys.readouterr().out
    assert "decode.length_penalty = 0.7 (length_penalty)" in out
    line = next(line for line in out.splitlines() if "not followed" in line)
    for key in ("no_repeat_ngram_size", "max_length", "bad_words_ids"):
        assert key in line
    assert "use_cache" not in out and "temperature" not in out

    sampled = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 0.5}
    source = changed(writer, tmp_path / "sampling", generation_config=sampled)
    decode = imported(source, tmp_path / "sampled").train.decode
    assert (decode.beam, decode.temperature, decode.top_p, decode.top_k) == (1, 0.6, 0.9, 50)
    assert decode.repetition_penalty == 1.0
    assert "not followed: repetition_penalty" in capsys.readouterr().out

    older = changed(writer, tmp_path / "older", config={"num_beams": 6, "bad_words_ids": [[0]]})
    decode = imported(older, tmp_path / "older_run").train.decode
    assert (decode.beam, decode.never) == (6, (0,))


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("config", {"eos_token_id": "2"}, "\"eos_token_id\": '2': give a token id"),
        ("config", {"eos_token_id": [1.5]}, '"eos_token_id": [1.5]: give a token id'),
        ("generation_config", {"num_beams": "4"}, "\"num_beams\": '4'"),
        ("generation_config", {"bad_words_ids": [3]}, '"bad_words_ids": [3]'),
    ],
)
def test_values_that_cannot_be_read(writer, name, values, message, tmp_path, capsys):
    source = changed(writer, tmp_path / "hf", **{name: values})
    fails(capsys, ["import", f"hf:{source}", "--run-dir", str(tmp_path / "run")], message)


def test_an_import_says_that_spaces_are_lost(writer, tmp_path, capsys):
    source = Path(shutil.copytree(writer, tmp_path / "hf"))
    words = TokenizerConfig(kind="wordpiece", vocab_size=30)
    Tokenizer.train(["a b"], words).save(source / "tokenizer.json")
    run = imported(source, tmp_path / "run")
    assert "tokenizer.json does not keep spaces" in capsys.readouterr().out
    assert run.tokenizer().loses_spaces


def test_an_id_beyond_the_vocabulary_is_said(writer, tmp_path, capsys):
    source = changed(writer, tmp_path / "hf", config={"eos_token_id": 50256})
    found = imported(source, tmp_path / "run").tokenizer()
    assert found.ends == (2,)
    assert "config.json: eos_token_id 50256 is not used" in capsys.readouterr().out


def test_a_run_from_before_has_no_list_of_special_tokens(writer, tmp_path, capsys):
    run = imported(writer, tmp_path / "run")
    path = run.directory / "special_tokens.json"
    before = run.tokenizer().fingerprint
    path.unlink()
    assert run.tokenizer().fingerprint == before and run.tokenizer().special is None
    for text in ("{", '{"eos": 2}', "[]"):
        path.write_text(text)
        fails(capsys, ["generate", str(run.directory), "red"], "special_tokens.json", "restore")
