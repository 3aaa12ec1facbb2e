"""Test the public API: examples of all names, an own loop, own texts, pretrained models, runs."""

import ast
import doctest
import importlib.util
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quick
import toy
from jax.sharding import PartitionSpec

import heedful as hf
from heedful.train.cli import run as command
from heedful.train.conversion.export_run import export_run
from heedful.train.load import load

ROOT = Path(__file__).parent.parent
TEXTS = toy.sentences(200)
WORDS = hf.TokenizerConfig(kind="words")
SIZES = {"max_length": 16, "batch_tokens": 128, "buckets": 1}
GPT = toy.model("decoder_only")


@pytest.fixture(scope="module")
def tokenizer() -> hf.Tokenizer:
    return hf.Tokenizer.train(TEXTS, WORDS)


@pytest.fixture(scope="module")
def run(tmp_path_factory, tokenizer) -> hf.TrainedRun:
    """Train a language model on texts of this program."""
    train, valid = datasets(tokenizer)
    training = hf.TrainConfig(steps=4, average_last=1, decode=toy.TRAIN.decode)
    experiment = hf.Experiment(model=GPT, train=training)
    directory = tmp_path_factory.mktemp("api") / "run"
    return hf.fit(experiment, directory, train=train, valid=valid, audit=False)


def datasets(tokenizer, **settings) -> tuple[hf.Dataset, hf.Dataset]:
    make = partial(hf.Dataset.from_texts, tokenizer=tokenizer, **SIZES, **settings)
    return make(TEXTS[:150]), make(TEXTS[150:])


# Names ------------------------------------------------------------------------------------------


TRAINING = {"TrainedRun", "audit", "fit", "load", "make_train_step", "save_pretrained"}


@pytest.mark.parametrize("name", quick.only(set(hf.__all__) - TRAINING, hf.__all__))
def test_each_name_has_an_example_that_runs(name: str, tmp_path, monkeypatch, unchecked):
    monkeypatch.chdir(tmp_path)
    value = getattr(hf, name)
    assert ">>>" in (value.__doc__ or "")
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    found = doctest.DocTestFinder(recurse=not isinstance(value, type(doctest))).find(
        value, name, globs={}
    )
    for example in found:
        runner.run(example)
    assert runner.summarize(verbose=False).failed == 0


def test_public_methods_have_docstrings():
    for kind in (hf.TrainedRun, hf.Dataset, hf.Tokenizer, hf.Observer, hf.TrainState):
        methods = {name for name, x in vars(kind).items() if callable(x) and name[0] != "_"}
        assert {name for name in methods if not getattr(kind, name).__doc__} <= {"replace"}


def test_type_checkers_and_python_know_the_same_names():
    tree = ast.parse((ROOT / "heedful" / "__init__.py").read_text("utf-8"))
    typed = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("heedful")
        for alias in node.names
    }
    assert typed == hf._HOME_OF and set(typed) == set(hf.__all__) <= set(dir(hf))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        hf.nothing  # noqa: B018


def test_importing_heedful_is_cheap():
    code = "import heedful, sys; sys.exit(any(m in sys.modules for m in ('jax', 'numpy', 'rich')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_errors_are_one_family():
    for error in (hf.DataError, hf.ModelError, hf.TrainError, hf.MaskNotSupported):
        assert issubclass(error, hf.HeedfulError) and issubclass(error, ValueError)
    assert issubclass(hf.Interrupted, hf.HeedfulError)


def test_reprs_are_short_and_name_what_differs():
    assert repr(hf.ModelConfig()) == "ModelConfig()"
    config = hf.ModelConfig(width=64, attention=hf.AttentionConfig(heads=2))
    assert repr(config) == "ModelConfig(width=64, attention=AttentionConfig(heads=2))"
    names = {name: getattr(hf, name) for name in hf.__all__ if name.endswith("Config")}
    assert eval(repr(GPT), names) == GPT and repr(GPT).count("\n") > 3
    mask = hf.masks.packed(jnp.ones((2, 5), jnp.int32)) & hf.masks.causal()
    assert repr(mask) == (
        "AttentionMask(causal=True, q_segment_ids=int32[2, 5], kv_segment_ids=int32[2, 5])"
    )


def test_pictures_are_png():
    mask = hf.masks.sliding(1, 0, dilation=(1, 2))
    assert "▒▒" in repr(hf.show(mask, 4))
    for shown in (mask, hf.show(mask, 4)):
        assert shown._repr_png_().startswith(b"\x89PNG")
    with pytest.raises(hf.ModelError, match="not an AttentionMask"):
        hf.show(np.ones((2, 2)), 2)
    with pytest.raises(hf.ModelError, match="describes 5 q positions, there are 4"):
        hf.show(hf.masks.packed(jnp.ones((1, 5), int)), 4)


# Attention --------------------------------------------------------------------------------------

B, T, N, K, H = 4, 12, 4, 2, 8
Q, KEYS, V = (
    jnp.asarray(np.random.default_rng(i).normal(size=(B, T, n, H)), jnp.float32)
    for i, n in enumerate((N, K, K))
)
SEGMENTS = jnp.array([[1] * 5 + [2] * 5 + [0] * 2] * B)


def attend(q, k, v, segments, core):
    window = hf.masks.sliding(3, 0 if core != "longformer" else 3)
    mask = hf.masks.packed(segments) & (hf.masks.causal() if core == "performer" else window)
    return hf.attention(q, k, v, mask, core=core)


@pytest.mark.slow
@pytest.mark.parametrize("core", ["dense", "flash", "longformer", "performer"])
def test_attention_under_transformations(core: str, unchecked):
    f = partial(attend, core=core)
    close = partial(np.testing.assert_allclose, rtol=0, atol=2e-5)
    expected = f(Q, KEYS, V, SEGMENTS)
    if core != "performer":
        close(expected, attend(Q, KEYS, V, SEGMENTS, "dense") if core != "longformer" else expected)
    close(jax.jit(f)(Q, KEYS, V, SEGMENTS), expected)
    close(jax.vmap(lambda *x: f(*(a[None] for a in x))[0])(Q, KEYS, V, SEGMENTS), expected)
    devices = jax.make_mesh((4,), ("d",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    split = PartitionSpec("d")
    # The keys are whole on every device: their gradient is a sum over the devices.
    one = partial(lambda k, v, q, s: f(q, k, v, s))
    whole = jnp.broadcast_to(KEYS[:1], KEYS.shape)
    sharded = jax.jit(jax.shard_map(one, mesh=devices, in_specs=split, out_specs=split))
    close(sharded(KEYS, V, Q, SEGMENTS), expected)
    shared = jax.jit(
        jax.shard_map(
            lambda k, v, q, s: f(q, k, v, s),
            mesh=devices,
            in_specs=(PartitionSpec(), PartitionSpec(), split, split),
            out_specs=split,
        )
    )
    loss = lambda k, g: (g(k) ** 2).sum()  # noqa: E731
    grads = [
        jax.grad(loss)(KEYS[:1], lambda k: shared(k, V[:1], Q, SEGMENTS)),
        jax.grad(loss)(
            KEYS[:1],
            lambda k: f(
                Q, jnp.broadcast_to(k, whole.shape), jnp.broadcast_to(V[:1], V.shape), SEGMENTS
            ),
        ),
    ]
    close(*grads, atol=1e-4)


@pytest.mark.parametrize("core", ["dense", "flash"])
def test_attention_with_bias_scale_and_dropout(core: str, unchecked):
    bias = jnp.asarray(np.random.default_rng(9).normal(size=(B, 1, T, T)), jnp.float32)
    out = hf.attention(Q, KEYS, V, core=core, bias=bias, scale=0.5)
    k, v = (jnp.repeat(x, N // K, 2) for x in (KEYS, V))
    weights = jax.nn.softmax(0.5 * jnp.einsum("BTNH,BSNH->BNTS", Q, k) + bias)
    np.testing.assert_allclose(out, jnp.einsum("BNTS,BSNH->BTNH", weights, v), atol=1e-5)
    dropped = hf.attention(Q, KEYS, V, core=core, dropout_rate=0.5, dropout_key=jax.random.key(0))
    assert not np.allclose(dropped, hf.attention(Q, KEYS, V, core=core))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"core": "flesh"}, "unknown core 'flesh': did you mean flash"),
        ({"q": Q[0]}, r"q is float32\[12, 4, 8\]: give floating-point numbers \[rows, positions"),
        ({"k": KEYS[:, :5]}, r"shapes do not fit: .* K divides N"),
        ({"mask": np.ones((T, T), bool)}, "mask is ndarray, not an AttentionMask"),
        ({"mask": hf.masks.packed(SEGMENTS[:, :7])}, "describes 7 q positions, there are 12"),
        ({"bias": jnp.ones((T, T))}, r"bias has the shape \[12, 12\]: give \[4 or 1, 4 or 1"),
        ({"dropout_rate": 0.1}, "needs dropout_key"),
        ({"core": "linformer"}, "core = linformer has parameters of its own"),
        ({"core": "cudnn"}, "core cudnn needs .*choose core auto"),
        ({"core": "performer", "bias": jnp.ones((1, 1, T, T))}, "no scores that a bias"),
    ],
)
def test_attention_says_what_is_wrong(change, words, unchecked):
    arguments = {"q": Q, "k": KEYS, "v": V, **change}
    with pytest.raises(hf.ModelError, match=words) as error:
        hf.attention(**arguments)
    assert "\n" not in str(error.value)


# Models and loops -------------------------------------------------------------------------------


def test_tokens_of_a_wrong_shape_are_named(unchecked):
    model = hf.build(hf.ModelConfig(architecture="decoder_only", vocab_size=9, width=16, layers=1))
    params = hf.init(model, jax.random.key(0))
    with pytest.raises(hf.ModelError, match=r"tokens are int32\[3\]: give integers .*tokens\[None"):
        model.apply({"params": params}, jnp.ones(3, int))
    with pytest.raises(hf.ModelError, match=r"tokens are float32\[1, 3\]"):
        model.apply({"params": params}, jnp.ones((1, 3)))
    with pytest.raises(hf.ModelError, match=r"model.vocab_size = None"):
        hf.init(hf.build(GPT), jax.random.key(0))


def own_model(tokenizer):
    model = hf.build(hf.ModelConfig(**{**vars_of(GPT), "vocab_size": tokenizer.vocab_size}))
    return model, hf.init(model, jax.random.key(0))


def vars_of(config) -> dict:
    return {name: getattr(config, name) for name in config.__dataclass_fields__}


def test_an_own_loop_learns(tokenizer):
    data, _ = datasets(tokenizer)
    model, params = own_model(tokenizer)
    optimizer = optax.adam(1e-2)
    step = hf.make_train_step(model, optimizer, accumulate=2)
    state, losses = hf.TrainState.create(params, optimizer), []
    for batch, _ in zip(data.train_iterator(), range(40), strict=False):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.8 * losses[0] and int(state.step) == 40
    jax.tree.map(lambda x: x.block_until_ready(), params)  # They were not donated.


def test_an_own_loop_is_measured(tokenizer):
    data, _ = datasets(tokenizer)
    model, params = own_model(tokenizer)
    batch = jax.tree.map(jnp.asarray, dict(next(data.eval_batches())))
    arrays = {name: batch[name] for name in ("segment_ids", "positions")}
    logits = jax.nn.log_softmax(model.apply({"params": params}, batch["inputs"], **arrays))
    found = np.take_along_axis(np.asarray(logits), batch["targets"][..., None], 2)[..., 0]
    weights = batch["weights"]
    measured = hf.make_eval_step(model)(params, batch)
    assert measured["weight"] == weights.sum()
    np.testing.assert_allclose(
        measured["loss"], -(found * weights).sum() / weights.sum(), rtol=1e-5
    )
    with pytest.raises(hf.TrainError, match="the batch has no targets and no weights"):
        hf.make_eval_step(model)(params, {"inputs": batch["inputs"]})


def test_an_own_module_learns_with_an_own_loss():
    model, rng = nn.Dense(1), np.random.default_rng(0)
    x = rng.normal(size=(12, 3)).astype(np.float32)
    batch = {"x": x, "y": x @ np.float32([[1.0], [-2.0], [0.5]])}

    def squares(model, params, batch, options):
        error = model.apply({"params": params}, batch["x"]) - batch["y"]
        return jnp.sum(error**2), jnp.float32(len(error)), None

    params = model.init(jax.random.key(0), x)["params"]
    state = hf.TrainState.create(params, optimizer := optax.adam(0.1))
    step = hf.make_train_step(model, optimizer, squares, accumulate=4)
    for _ in range(200):
        state, metrics = step(state, batch)
    assert metrics["loss"] < 1e-3
    with pytest.raises(hf.TrainError, match=r"needs a model of heedful\.build, not Dense"):
        hf.make_train_step(model, optimizer)


def test_what_is_left_out_is_told(tokenizer):
    texts = ["red cat", "red " * 17, " ", "violet cat"] * 9
    with pytest.warns(UserWarning) as told:
        pairs = [(text, str(i % 2)) for i, text in enumerate(texts)]
        hf.Dataset.from_texts(pairs, tokenizer, "classification", **SIZES)
    said = [str(each.message) for each in told]
    assert "train: 9 examples left out, longer than 16 tokens (--data.max-length)" in said
    assert "train: 9 examples left out, blank" in said
    assert any("<unk>: the vocabulary lacks" in each for each in said)


def test_what_a_step_refuses(tokenizer):
    model, params = own_model(tokenizer)
    optimizer = optax.sgd(1.0)
    with pytest.raises(hf.TrainError, match="unknown task 'causal': did you mean causal_lm"):
        hf.make_train_step(model, optimizer, "causal")
    with pytest.raises(hf.TrainError, match="task = optax:adam: it is of type function, not"):
        hf.make_train_step(model, optimizer, "optax:adam")
    with pytest.raises(
        hf.TrainError, match=r"translation needs model.architecture encoder_decoder"
    ):
        hf.make_train_step(model, optimizer, "translation")
    step = hf.make_train_step(model, optimizer, accumulate=3)
    state, ones = hf.TrainState.create(params, optimizer), np.ones((4, 8), np.int32)
    with pytest.raises(hf.TrainError, match="the batch has no targets and no weights"):
        step(state, {"inputs": ones})
    with pytest.raises(hf.TrainError, match="accumulate = 3 does not divide"):
        step(state, {"inputs": ones, "targets": ones, "weights": ones.astype(np.float32)})


@pytest.mark.slow
def test_an_audit_finds_a_planted_leak(monkeypatch, tokenizer):
    model, params = own_model(hf.Tokenizer.train([" ".join(f"w{i}" for i in range(60))], WORDS))
    assert hf.audit(model, params) == []
    attention = replace(model.config.attention, window=15)
    with pytest.warns(UserWarning, match="not audited: the window of 15, .* at least 17"):
        hf.audit(replace(model.config, attention=attention), params)
    full = lambda *_, **__: hf.masks.full()  # noqa: E731
    monkeypatch.setattr("heedful.model.transformer.decoder_mask", full)
    findings = hf.audit(model, params)
    assert "leak" in {finding.kind for finding in findings}
    with pytest.raises(hf.TrainError, match="params have other names or shapes"):
        hf.audit(model, {"embedding": params["embedding"]})
    with pytest.raises(hf.TrainError, match=r"model.vocab_size = .* give a smaller length"):
        hf.audit(*own_model(tokenizer))


# Data -------------------------------------------------------------------------------------------


def same(a: hf.Dataset, b: hf.Dataset) -> None:
    assert a.batches_per_epoch == b.batches_per_epoch and a.target_count == b.target_count
    for ours, theirs, _ in zip(a.train_iterator(), b.train_iterator(), range(5), strict=False):
        assert ours.keys() == theirs.keys()
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name])


@pytest.mark.parametrize("task", ["causal_lm", "masked_lm"])
def test_texts_and_arrays_make_the_same_batches_as_files(task: str, tmp_path):
    tokenizer = hf.Tokenizer.train(TEXTS, WORDS, task)
    paths = [tmp_path / f"{i:03}.txt" for i in range(40)]
    texts = [". ".join(TEXTS[i::40]) for i in range(40)]
    for path, text in zip(paths, texts, strict=True):
        path.write_text(text)
    files = hf.Dataset.from_files(paths, tokenizer, task, holdout=0.0, **SIZES)
    same(files, hf.Dataset.from_texts(iter(texts), tokenizer, task, **SIZES))
    arrays = tokenizer.encode_batch(texts)
    same(files, hf.Dataset.from_arrays(arrays, tokenizer, task, **SIZES))


def test_pairs_and_labels(tmp_path):
    lines = [(text, toy.translate(text)) for text in TEXTS]
    tokenizer = hf.Tokenizer.train([" ".join(pair) for pair in lines], WORDS)
    paths = [tmp_path / "a.en", tmp_path / "a.de"]
    for path, side in zip(paths, zip(*lines, strict=True), strict=True):
        path.write_text("".join(line + "\n" for line in side))
    files = hf.Dataset.from_files(paths, tokenizer, "translation", holdout=0.0, **SIZES)
    same(files, hf.Dataset.from_texts(lines, tokenizer, "translation", **SIZES))

    labelled = [(text, toy.label(text)) for text in TEXTS]
    table = toy.write_table(tmp_path, rows=len(TEXTS))
    files = hf.Dataset.from_files(table, tokenizer, "classification", holdout=0.0, **SIZES)
    given = hf.Dataset.from_texts(labelled, tokenizer, "classification", **SIZES)
    same(files, given)
    assert given.classes == ("bad", "good")
    parts = [
        hf.Dataset.from_texts(
            labelled, tokenizer, "classification", split=split, holdout=0.2, **SIZES
        )
        for split in ("train", "valid", "test")
    ]
    assert sum(len(part.store.blank) for part in parts) == len(TEXTS)


@pytest.mark.parametrize(
    ("texts", "task", "words"),
    [
        ([], "causal_lm", "there are no texts: give at least one"),
        ([" "], "causal_lm", "all 1 documents of split 'train' are blank"),
        ("red cat", "causal_lm", "the texts are one str: give a list"),
        ([7], "causal_lm", "text 0 has a text of type int"),
        (["red cat"], "causal_ml", "data.objective is 'causal_ml': did you mean causal_lm"),
        (["red cat"], "translation", r"text 0 is 'red cat': this task needs \(source, target\)"),
        ([("red", "a", "b"), ("red", "a")], "classification", "1 of 2 texts have a second text"),
        ([("red", "good")], "classification", "'good' is the only class"),
        ([("red", "x"), ("cat", "1")], "regression", "not a finite number"),
    ],
)
def test_texts_that_are_refused(tokenizer, texts, task, words):
    with pytest.raises(hf.DataError, match=words):
        hf.Dataset.from_texts(texts, tokenizer, task, **SIZES)


def test_arrays_that_are_refused(tokenizer):
    with pytest.raises(hf.DataError, match=r"array 0 has ids from 0 to 999: .* from 0 to 14"):
        hf.Dataset.from_arrays([np.array([999])], tokenizer)
    with pytest.raises(hf.DataError, match=r"array 1 is float64\[1\]: give token ids"):
        hf.Dataset.from_arrays([np.array([5]), np.array([0.5])], tokenizer)


# Pretrained models ------------------------------------------------------------------------------

LLAMA = hf.ModelConfig(
    architecture="decoder_only",
    width=16,
    layers=2,
    attention=hf.AttentionConfig(heads=2, bias=False),
    tie_embeddings=False,
    scale_embeddings=False,
    dropout=0.0,
    positions=hf.PositionConfig(kind="rotary"),
    feed_forward=hf.FeedForwardConfig(activation="silu", gated=True, bias=False, width=24),
    norm=hf.NormConfig(kind="rmsnorm", position="pre"),
)


def test_a_round_trip_to_the_bit_and_the_files_of_export(tmp_path):
    data = toy.data(toy.write_text(tmp_path), "causal_lm", tokenizer=WORDS)
    toy.random_run(tmp_path / "run", LLAMA, data)
    config, params, tokenizer = hf.from_pretrained(tmp_path / "run")
    hf.save_pretrained(tmp_path / "saved", config, params, tokenizer)
    export_run(load(tmp_path / "run", toy.QUIET), tmp_path / "exported", toy.QUIET)
    files = {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "exported").iterdir()}

    again, found, reader = hf.from_pretrained(tmp_path / "saved")
    assert (
        reader.encode_batch(["red cat"])[0].tolist()
        == tokenizer.encode_batch(["red cat"])[0].tolist()
    )
    jax.tree.map(np.testing.assert_array_equal, found, params)
    tokens = jnp.array([[4, 5, 6]])
    outputs = [
        hf.build(c).apply({"params": p}, tokens) for c, p in ((config, params), (again, found))
    ]
    np.testing.assert_array_equal(*outputs)
    with pytest.raises(hf.TrainError, match="is not empty"):
        hf.save_pretrained(tmp_path / "saved", config, params, tokenizer)


def test_directories_that_hold_no_model(tmp_path):
    with pytest.raises(hf.TrainError, match="is no run directory"):
        hf.load(tmp_path)
    for path in (tmp_path, "google/bert-base-uncased"):
        with pytest.raises(
            hf.TrainError, match=r"has no config\.json: give the directory of a model"
        ):
            hf.from_pretrained(path)
    with pytest.raises(hf.TrainError, match="unknown package:bert: choose among"):
        hf.from_pretrained("package:bert")


# Runs -------------------------------------------------------------------------------------------


def test_a_run_generates_as_the_command_does(run, capsys, monkeypatch):
    prompts = ["red cat", "small dog runs"]
    from heedful.train.cli import commands

    monkeypatch.setattr(commands, "lines_of", lambda text: prompts)
    again = hf.load(run.directory)
    assert command(["generate", str(run.directory)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert again.generate(prompts) == printed == run.generate(prompts)
    assert run.generate(prompts, max_tokens=1) != printed
    monkeypatch.undo()
    assert command(["generate", str(run.directory), "red cat", "--decode.beam", "2"]) == 0
    assert capsys.readouterr().out.splitlines() == run.generate(["red cat"], beam=2)
    with pytest.raises(hf.TrainError, match="does not translate"):
        run.translate(prompts)
    with pytest.raises(hf.TrainError, match="does not classify"):
        run.classify(prompts)
    with pytest.raises(hf.TrainError, match="texts is one string, 'red cat'"):
        run.generate("red cat")


def test_hidden_states_and_scores_are_those_of_the_model(run):
    texts = ["red cat sleeps", "blue", "small large dog runs"]
    model = hf.build(run.config)
    params = jax.device_get(run.params)
    states, scores = run.hidden_states(texts), run.scores(texts)
    for text, state, score in zip(texts, states, scores, strict=True):
        (ids,) = run.tokenizer.encode_batch([text])
        begin, end = run.tokenizer.frame
        inputs, targets = jnp.array([[begin, *ids]]), np.array([*ids, end])
        hidden = model.apply({"params": params}, inputs, return_logits=False)[0]
        np.testing.assert_allclose(state, hidden, atol=1e-5)
        logits = jax.nn.log_softmax(model.apply({"params": params}, inputs)[0])
        np.testing.assert_allclose(score, logits[np.arange(len(targets)), targets], atol=1e-5)
    with pytest.raises(hf.TrainError, match="text 2 is empty"):
        run.scores(["red", " "])


def test_a_run_on_own_texts_is_evaluated_and_resumed_with_them(run, tokenizer):
    train, valid = datasets(tokenizer)
    loaded = hf.load(run.directory)
    with pytest.raises(hf.DataError, match=r"data.source 'texts' stands for texts of a Python"):
        loaded.evaluate()
    assert loaded.evaluate(valid=valid)["valid_loss"] == run.evaluate()["valid_loss"]
    seen = []

    class Seen(hf.Observer):
        def on_evaluation(self, step, measured):
            seen.append(step)

    fit = partial(hf.fit, run.experiment, run.directory, callbacks=[Seen()], audit=False)
    assert fit(train=train, valid=valid).steps == [4] and seen == []
    with pytest.raises(hf.TrainError, match="valid is missing: give both"):
        fit(train=train)
    others = hf.Dataset.from_texts(TEXTS[:99], tokenizer, **SIZES)
    with pytest.raises(hf.TrainError, match="the training data has changed"):
        fit(train=others, valid=valid)
    with pytest.raises(hf.TrainError, match="the dataset train has the seed 1"):
        fit(train=hf.Dataset.from_texts(TEXTS[:150], tokenizer, seed=1, **SIZES), valid=valid)


def test_a_fine_tuning_has_the_body_of_its_source_and_a_picture_of_its_curves(
    run, tokenizer, tmp_path, monkeypatch
):
    train, valid = datasets(tokenizer)
    training = replace(run.experiment.train, init_from=str(run.directory), steps=1)

    def fit(name: str, **settings) -> hf.TrainedRun:
        model = hf.ModelConfig(dropout=0.25, **settings)
        experiment = hf.Experiment(model=model, train=training)
        return hf.fit(experiment, tmp_path / name, train=train, valid=valid, audit=False)

    assert fit("same").config == replace(run.config, dropout=0.25)
    assert (tmp_path / "same" / "plot.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(hf.TrainError, match=r"model\.width is 16 there and 24 here"):
        fit("other", width=24)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    training = replace(training, tracker="wandb")
    with pytest.raises(hf.TrainError, match=r"train\.tracker = wandb: the package wandb is not"):
        fit("tracked")


def test_a_run_can_be_read(run, caplog):
    assert hf.load(run.directory).steps == run.steps and caplog.records == []
    for shown in (repr(run), run._repr_html_()):
        assert "decoder_only" in shown and "valid_loss" in shown and "causal_lm" in shown
    weights = run.attention("red cat", mean=True)
    assert weights.weights.shape == (1, 3, 3) and list(weights.keys)[1:] == ["red", "cat"]
    assert weights._repr_png_().startswith(b"\x89PNG")


def test_classes_of_texts_and_of_pairs(tmp_path):
    data = toy.data(toy.write_table(tmp_path), "classification", tokenizer=WORDS)
    toy.random_run(tmp_path / "run", toy.model(head=toy.CLASSIFIER), data)
    run = hf.load(tmp_path / "run", checkpoint=3)
    found = run.classify(["red cat", "blue"])
    scores = run.scores(["red cat", "blue"])
    for (label, probability), score in zip(found, scores, strict=True):
        assert label == ("bad", "good")[int(score.argmax())]
        assert probability == pytest.approx(float(np.exp(score.max())), abs=1e-5)
    assert run.hidden_states(["red cat"])[0].shape[1] == 16
