"""Test fine-tuning: the body keeps the bits of its source, and each replacement is reported."""

import dataclasses
import io
import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from rich.console import Console
from test_cli import fails
from tiny_pretrained import export

from heedful.data.config import TokenizerConfig
from heedful.data.errors import DataError
from heedful.model.config import (
    AttentionConfig,
    LoraConfig,
    ModelConfig,
    PerformerConfig,
    PositionConfig,
)
from heedful.model.pretrained import merge_lora
from heedful.model.transformer import build
from heedful.train import cli
from heedful.train.checkpoint import Checkpoints
from heedful.train.conversion.init_from import init_from_pretrained, merge_pretrained_config
from heedful.train.conversion.source import Source, open_source
from heedful.train.errors import TrainError
from heedful.train.load import load
from heedful.train.run import Run
from heedful.train.sharding import make_mesh
from heedful.train.state import set_up
from heedful.train.trainable import named

WORDS = TokenizerConfig(kind="words")
MASKED = toy.model(
    tie_embeddings=False,
    head=dataclasses.replace(toy.model().head, transform=True, bias=True),
    type_vocab_size=2,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Write a run of a masked_lm without training, and data to fine-tune it on."""
    folder = tmp_path_factory.mktemp("folder")
    toy.write_table(folder)
    data = toy.data(toy.write_text(folder), "masked_lm", tokenizer=WORDS)
    toy.random_run(folder / "source", MASKED, data, scores={3: -2.0, 5: -1.0})
    return folder


@pytest.fixture(scope="module")
def source(folder) -> Source:
    return open_source(str(folder / "source"), toy.QUIET)


def bits(params: Any) -> dict[str, bytes]:
    return {name: np.asarray(leaf).tobytes() for name, leaf in named(params)}


def fresh(model: ModelConfig) -> Any:
    return toy.random_params(model, make_mesh(toy.TRAIN.mesh), seed=1)


def classifier(source: Source, **values) -> ModelConfig:
    """Return the config of a run on the data: the source's body and a new head."""
    head = dataclasses.replace(toy.CLASSIFIER, outputs=2)
    return dataclasses.replace(
        merge_pretrained_config(toy.model(head=head), source.model), **values
    )


def test_a_source_has_the_parameters_that_its_run_would_use(folder, source):
    trained = load(folder / "source", toy.QUIET)
    assert trained.steps == [3, 5]
    assert bits(source.params()) == bits(trained.params)
    assert source.tokenizer.fingerprint == trained.tokenizer.fingerprint
    assert (source.label, source.model) == ("source", trained.run.model)


def test_the_body_is_the_source_s_and_the_head_is_new(source):
    model = classifier(source)
    start, out = fresh(model), Console(markup=False, file=io.StringIO(), width=200)
    random, given = bits(start), bits(source.params())
    found = init_from_pretrained(start, source, model, (), out)
    for name, ours in bits(found).items():
        assert ours == (random if name.startswith("head.") else given)[name], name
    for leaf, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(start), strict=True):
        assert leaf.sharding == wanted.sharding and leaf.dtype == wanted.dtype

    table = out.file.getvalue()
    assert "fine-tuning" in table and source.name in table
    rows = {
        key: next(line for line in table.splitlines() if key in line)
        for key in ("loaded", "new, random", "left out")
    }
    body = sum(np.size(x) for name, x in named(source.params()) if not name.startswith("head."))
    assert f"{body:,}" in rows["loaded"] and "embedding, encoder, inputs" in rows["loaded"]
    assert "head.classes.bias, head.classes.kernel" in rows["new, random"]
    assert f"{2 * 16 + 2:,}" in rows["new, random"]
    for name in ("head.transform.kernel", "head.norm.scale", "head.bias", "head.kernel"):
        assert name in rows["left out"]


def test_a_head_of_the_same_kind_is_taken_over_too(source):
    model = dataclasses.replace(merge_pretrained_config(toy.model(), source.model), dropout=0.3)
    found = init_from_pretrained(fresh(model), source, model, (), toy.QUIET)
    assert bits(found) == bits(source.params())


def test_what_is_to_begin_at_random_does(source):
    model = classifier(source)
    start = fresh(model)
    random, given = bits(start), bits(source.params())
    patterns = ("embedding", r"feed_forward\.down")
    for name, ours in bits(init_from_pretrained(start, source, model, patterns, toy.QUIET)).items():
        is_new = name.startswith(("head.", "embedding.")) or "feed_forward.down" in name
        assert ours == (random if is_new else given)[name], name
    with pytest.raises(TrainError, match=r"train.reinit has 'decoder', which matches no parameter"):
        init_from_pretrained(start, source, model, ("embedding", "decoder"), toy.QUIET)


def test_low_rank_updates_are_new(source):
    model = classifier(source, lora=LoraConfig(rank=2))
    start = fresh(model)
    random, given = bits(start), bits(source.params())
    for name, ours in bits(init_from_pretrained(start, source, model, (), toy.QUIET)).items():
        is_new = name.startswith("head.") or "lora_" in name
        assert ours == (random if is_new else given)[name], name


@pytest.mark.slow
def test_what_low_rank_updates_have_learned_is_taken_over(folder, tmp_path):
    """The source's low-rank updates are merged, so that the model starts with the same outputs."""
    data = toy.data(folder / "text.txt", "masked_lm", tokenizer=WORDS)
    adapted = dataclasses.replace(MASKED, lora=LoraConfig(rank=2, targets=("query", "down")))
    run = toy.random_run(tmp_path / "run", adapted, data)
    source = open_source(str(run.directory), toy.QUIET)
    params = load(run.directory, toy.QUIET).params
    assert source.model.lora == LoraConfig()
    assert bits(source.params()) == bits(merge_lora(run.model, params)[1])
    tokens = jnp.arange(4, 12)[None]
    before = build(run.model).apply({"params": params}, tokens)
    after = build(source.model).apply({"params": source.params()}, tokens)
    np.testing.assert_allclose(after, before, atol=1e-5)
    name = "encoder.blocks.feed_forward.down.kernel"
    assert bits(source.params())[name] != bits(params)[name]


def test_a_shape_that_does_not_fit_names_both(folder, tmp_path):
    table = toy.data(folder / "table.tsv", "classification", tokenizer=WORDS)
    model = toy.model(head=toy.CLASSIFIER)
    run = toy.random_run(tmp_path / "run", model, table)
    source = open_source(str(run.directory), toy.QUIET)
    # The number of classes comes from the data. With as many classes as in the source, the head of
    # the source would be kept.
    assert merge_pretrained_config(model, source.model).head.outputs is None
    head = dataclasses.replace(toy.CLASSIFIER, outputs=3)
    model = dataclasses.replace(merge_pretrained_config(model, source.model), head=head)
    with pytest.raises(TrainError) as error:
        init_from_pretrained(fresh(model), source, model, ("embedding",), toy.QUIET)
    for word in ("head.classes.bias", "(2,)", "(3,)", "--train.reinit"):
        assert word in str(error.value)
    # The patterns in the message are sufficient, together with the given one.
    advice = shlex.split(str(error.value).partition("--train.reinit ")[2].partition(" to ")[0])
    assert advice == ["embedding", r"head\.classes\.bias", r"head\.classes\.kernel"]
    found = init_from_pretrained(fresh(model), source, model, advice, toy.QUIET)
    assert found["head"]["classes"]["kernel"].shape == (16, 3)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"feed_forward": {"activation": "gelu"}},
            ["model.feed_forward.activation is 'relu' there and 'gelu' here"],
        ),
        ({"width": 32}, ["model.width is 16 there and 32 here"]),
        ({"norm": {"epsilon": 1e-5}}, ["model.norm.epsilon"]),
    ],
)
def test_another_body_is_refused(source, values, words):
    model = classifier(source)
    for name, value in values.items():
        if isinstance(value, dict):
            value = dataclasses.replace(getattr(model, name), **value)
        model = dataclasses.replace(model, **{name: value})
    with pytest.raises(TrainError) as error:
        init_from_pretrained(fresh(model), source, model, (), toy.QUIET)
    for word in (*words, "has another model"):
        assert word in str(error.value)


# To longer inputs ---------------------------------------------------------------------------------


OLD = toy.model(
    vocab_size=19, positions=PositionConfig(kind="learned", max_length=8), scale_embeddings=False
)
WINDOWS: dict[str, dict[str, Any]] = {
    "encoder_only": {"global_tokens": 2, "global_projections": True},
    "decoder_only": {},
}


def converted(old: ModelConfig, window: int, length: int, **attention: Any) -> ModelConfig:
    """Return the source's config after the flags of a new run have changed it."""
    model = merge_pretrained_config(toy.model(old.architecture), old)
    changes = {"core": "longformer", "window": window, **attention}
    return dataclasses.replace(
        model,
        attention=dataclasses.replace(model.attention, **changes),
        positions=dataclasses.replace(model.positions, max_length=length),
    )


@pytest.mark.slow
@pytest.mark.parametrize("architecture", WINDOWS)
def test_an_exact_model_is_converted_to_windows(architecture: Any, source):
    old = dataclasses.replace(OLD, architecture=architecture)
    mesh = make_mesh(toy.TRAIN.mesh)
    params = jax.tree.map(np.asarray, toy.random_params(old, mesh, seed=0))
    old_source = Source("old", old, source.tokenizer, lambda: params)
    tokens = jnp.array(np.random.default_rng(0).integers(0, 19, (2, 8)))
    ids = jnp.array([[1] * 8, [1] * 5 + [0] * 3])
    expected = build(old).apply({"params": params}, tokens, segment_ids=ids)

    # With the same length and a window over the whole length the model computes the same.
    model = converted(old, 8, 8, **WINDOWS[architecture])
    found = init_from_pretrained(fresh(model), old_source, model, (), toy.QUIET)
    logits = build(model).apply({"params": found}, tokens, segment_ids=ids)
    np.testing.assert_allclose(np.asarray(logits)[ids > 0], expected[ids > 0], atol=1e-5)

    # In a longer model positions repeat, and the copied parameters are listed.
    out = Console(markup=False, file=io.StringIO(), width=999)
    model = converted(old, 3, 21, **WINDOWS[architecture])
    longer = init_from_pretrained(fresh(model), old_source, model, (), out)
    table, given = longer["inputs"]["positions"]["table"], params["inputs"]["positions"]["table"]
    np.testing.assert_array_equal(table, np.concatenate([given, given, given[:5]]))
    (line,) = (line for line in out.file.getvalue().splitlines() if "copied" in line)
    assert "inputs.positions.table" in line
    if architecture == "encoder_only":
        attention = longer["encoder"]["blocks"]["self_attention"]
        for name in ("query", "key", "value"):
            for leaf, value in attention[name].items():
                np.testing.assert_array_equal(attention[f"global_{name}"][leaf], value)
                assert f"self_attention.global_{name}.{leaf}" in line
    logits = build(model).apply({"params": longer}, jnp.tile(tokens, (1, 3))[:, :21])
    assert np.isfinite(logits).all()


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["encoder_only", "decoder_only"])
def test_an_exact_model_is_converted_to_random_features(architecture: Any, source):
    """All parameters are loaded; with 256 times as many features the outputs are much closer."""
    old = dataclasses.replace(OLD, architecture=architecture)
    params = jax.tree.map(np.asarray, toy.random_params(old, make_mesh(toy.TRAIN.mesh), seed=0))
    old_source = Source("old", old, source.tokenizer, lambda: params)
    tokens = jnp.array(np.random.default_rng(0).integers(0, 19, (2, 8)))
    expected = build(old).apply({"params": params}, tokens)

    def error(features: int) -> float:
        model = merge_pretrained_config(toy.model(architecture), old)
        attention = dataclasses.replace(
            model.attention, core="performer", performer=PerformerConfig(features=features)
        )
        model = dataclasses.replace(model, attention=attention)
        found = init_from_pretrained(fresh(model), old_source, model, (), toy.QUIET)
        jax.tree.map(np.testing.assert_array_equal, found, params)
        return float(abs(build(model).apply({"params": found}, tokens) - expected).max())

    assert error(4096) < error(16) / 4


def test_a_model_with_windows_keeps_them_where_the_new_run_has_none(source):
    old = dataclasses.replace(OLD, attention=converted(OLD, 3, 8, global_tokens=1).attention)
    model = merge_pretrained_config(toy.model(), old)
    assert (model.attention.window, model.attention.global_tokens) == (3, 1)
    assert model.attention.core == "auto"  # The core of the source is not inherited.
    wider = dataclasses.replace(toy.model(), attention=AttentionConfig(heads=2, window=5))
    assert merge_pretrained_config(wider, old).attention.window == 5
    assert merge_pretrained_config(wider, old).attention.global_tokens == 0
    shorter = converted(OLD, 3, 7)
    old_source = Source("old", OLD, source.tokenizer, dict)
    with pytest.raises(TrainError, match=r"positions\.max_length is 8 there and 7 here"):
        init_from_pretrained(fresh(shorter), old_source, shorter, (), toy.QUIET)


def test_sources_that_are_none(tmp_path):
    with pytest.raises(TrainError, match=r"unknown package:bert: choose among .*minilm"):
        open_source("package:bert", toy.QUIET)
    with pytest.raises(TrainError, match="is no run directory"):
        open_source(str(tmp_path), toy.QUIET)
    with pytest.raises(TrainError, match=r"neither tokenizer.json nor vocab.txt"):
        open_source(f"hf:{tmp_path}", toy.QUIET)
    for name in ("source.spm", "target.spm", "vocab.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(TrainError, match=r"source.spm and target.spm.* two tokenizers cannot"):
        open_source(f"hf:{tmp_path}", toy.QUIET)
    directory = export(tmp_path, "GPT2LMHeadModel")
    (directory / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="is not a tokenizer"):
        open_source(f"hf:{directory}", toy.QUIET)


# Through the command line ------------------------------------------------------------------------


def command(folder: Path, run: Path) -> list[str]:
    flags = ["sentiment_tiny", "--run-dir", str(run), *toy.files(folder / "table.tsv")]
    flags += ["--data.batch-tokens", "256", "--data.buckets", "1", "--data.max-length", "16"]
    flags += [
        *toy.training(),
        "--init-from",
        str(folder / "source"),
        "--train.average-last",
        "1",
    ]
    return ["train", *flags, "--train.optimizer.freeze", "^(?!head)"]


def final_state(run: Run) -> list[bytes]:
    abstract = set_up(run.model, run.train).abstract
    checkpoints = Checkpoints(run.checkpoints, run.tokenizer().fingerprint)
    state, _ = checkpoints.restore(max(checkpoints.steps), abstract)
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


@pytest.fixture(scope="module")
def tuned(folder, tmp_path_factory) -> tuple[list[str], Run]:
    """Train a run with a frozen body; return its command and the run."""
    directory = tmp_path_factory.mktemp("tuned") / "run"
    assert cli.run(command(folder, directory)) == 0
    return command(folder, directory), Run.open(directory)


@pytest.mark.slow
def test_a_frozen_body_leaves_with_the_bits_that_it_came_with(folder, source, tuned, capsys):
    _, run = tuned
    given, trained = bits(source.params()), load(run.directory, toy.QUIET, checkpoint="last")
    for name, ours in bits(trained.params).items():
        assert (given.get(name) == ours) != name.startswith("head."), name
    assert run.tokenizer().fingerprint == source.tokenizer.fingerprint
    assert run.model == classifier(
        source, dropout=0.3, head=dataclasses.replace(toy.CLASSIFIER, outputs=2, dropout=0.3)
    )
    assert run.train.init_from == str(folder / "source")


@pytest.mark.slow
def test_fine_tuning_resumes_to_the_bit(tuned, capsys):
    arguments, run = tuned
    expected = final_state(run)
    shutil.rmtree(run.checkpoints / "12")
    capsys.readouterr()
    assert cli.run(arguments) == 0
    out = capsys.readouterr().out
    assert "resuming from the checkpoint of step 8" in out and "fine-tuning" not in out
    assert "of which 34 train" in out
    assert final_state(run) == expected


def test_both_spellings_of_the_flag_and_none(folder, tmp_path, capsys):
    """Both spellings have an effect; None overrides the value of an experiment."""
    arguments = command(folder, tmp_path / "run")
    place = arguments.index("--init-from")
    for flag in ("--init-from", "--init_from", "--train.init-from", "--train.init_from"):
        spelled = [*arguments[:place], flag, str(tmp_path / "nowhere"), *arguments[place + 2 :]]
        fails(capsys, spelled, "nowhere is no run directory")
    spelled = [*arguments[:place], f"--init-from={tmp_path / 'nowhere'}", *arguments[place + 2 :]]
    fails(capsys, spelled, "nowhere is no run directory")
    minilm = ["train", "sentiment_minilm", "--init-from", "None", "--train.steps", "0"]
    fails(capsys, minilm, "train.steps must be positive")


def test_mistakes_are_one_line(folder, tmp_path, capsys):
    arguments = command(folder, tmp_path / "run")
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "red"]))
    fails(capsys, [*arguments, "--data.tokenizer.path", str(path)], "vocab.txt", "path out")
    fails(capsys, [*arguments, "--init-from", "package:gpt9"], "unknown package:gpt9", "minilm")
    fails(capsys, [*arguments, "--init-from", f"hf:{folder}"], "tokenizer.json", "vocab.txt")
    assert not (tmp_path / "run").exists()
    activation = ["--model.feed-forward.activation", "gelu"]
    fails(capsys, [*arguments, *activation], "has another model", "activation", "'relu'", "'gelu'")
    other = [*arguments, "--run-dir", str(tmp_path / "other"), "--train.reinit", "enocder"]
    fails(capsys, other, "train.reinit has 'enocder'", "matches no parameter")


def test_a_source_that_was_trained_by_another_version(folder, tmp_path, capsys):
    """The config of the source has a field that this version does not know."""
    broken = Path(shutil.copytree(folder / "source", tmp_path / "source"))
    values = json.loads((broken / "config.json").read_text())
    values["model"]["experts"] = 8
    (broken / "config.json").write_text(json.dumps(values))
    arguments = [*command(folder, tmp_path / "run"), "--init-from", str(broken)]
    fails(capsys, arguments, "config.json cannot be read", "experts")
