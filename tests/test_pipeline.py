import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data import pipeline
from data.batch import FIELDS, check
from data.config import DataConfig, DataError, TokenizerConfig
from data.pipeline import Dataset, TokenStore, tokenizer_texts
from data.tokenizer import BOS, Tokenizer

REPOSITORY = Path(__file__).parents[1]
N = 211


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    for language in ("en", "de"):
        lines = [
            " ".join([f"{language}{i}", *map(str, rng.integers(0, 97, rng.integers(0, 29)))])
            for i in range(N)
        ]
        lines[7] = "" if language == "en" else lines[7]
        lines[13] = " \t" if language == "de" else lines[13]
        lines[17] = "long " * (41 if language == "en" else 3)
        (folder / f"train.{language}").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def config(folder):
    pair = str(folder / "train.en"), str(folder / "train.de")
    return DataConfig(
        source="files",
        train=pair,
        valid=pair,
        test=pair,
        tokenizer=TokenizerConfig(kind="words", vocab_size=997),
        batch_tokens=257,
        batch_multiple=6,
        buckets=3,
        max_length=37,
    )


@pytest.fixture(scope="module")
def tokenizer(config):
    return Tokenizer.train(tokenizer_texts(config), config.tokenizer)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("HEEDFUL_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def dataset(config, tokenizer):
    return Dataset.prepare(config, tokenizer, "train", seed=3)


def take(iterator, n):
    return list(itertools.islice(iterator, n))


def same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


def examples_of(batches, tokenizer):
    """Returns the texts (source, target) of all rows that hold an example."""
    return sorted(
        (tokenizer.decode(source), tokenizer.decode(target))
        for batch in batches
        for source, target, inputs in zip(
            batch["encoder_inputs"], batch["targets"], batch["inputs"], strict=True
        )
        if inputs[0] == BOS
    )


def expected(folder):
    lines = [(folder / f"train.{x}").read_text().split("\n")[:N] for x in ("en", "de")]
    pairs = list(zip(*lines, strict=True))
    return sorted(pair for i, pair in enumerate(pairs) if i not in (7, 13, 17))


def test_report_counts_what_is_left_out(dataset):
    assert len(dataset.kept) == N - 3
    text = "\n".join(dataset.report)
    assert f"{N - 3:,} examples" in text
    assert "1 examples left out, longer than 37 tokens (--data.max-length)" in text
    assert "2 examples left out, blank" in text
    assert f"{dataset.train_plan.padding_share:.1%} padding" in text
    for rows, length in dataset.train_plan.shapes:
        assert f"{rows} x {length}" in text
    real = sum((b["weights"] > 0).sum() for b in dataset.eval_batches())
    real += sum((b["encoder_segment_ids"] > 0).sum() for b in dataset.eval_batches())
    assert f"{real:,} tokens" in text


def test_an_epoch_holds_every_example_exactly_once(dataset, tokenizer, folder):
    iterator = dataset.train_iterator()
    epochs = [take(iterator, dataset.batches_per_epoch) for _ in range(3)]
    for epoch in epochs:
        assert examples_of(epoch, tokenizer) == expected(folder)
    assert any((a["inputs"].shape != b["inputs"].shape) for a, b in zip(*epochs[:2], strict=True))


def test_evaluation_holds_every_example_exactly_once(dataset, tokenizer, folder):
    batches = list(dataset.eval_batches())
    assert len(batches) == dataset.batches_per_epoch
    assert examples_of(batches, tokenizer) == expected(folder)
    same(batches, list(dataset.eval_batches()))


def test_batches_keep_the_contract(dataset):
    for batch in dataset.eval_batches():
        assert batch.keys() == FIELDS.keys()
        check(batch)
        assert batch["inputs"].shape in dataset.train_plan.shapes


def test_padding_share_is_what_an_epoch_holds(dataset):
    batches = take(dataset.train_iterator(), dataset.batches_per_epoch)
    sides = [batch[name] for batch in batches for name in ("segment_ids", "encoder_segment_ids")]
    empty = sum((side == 0).sum() for side in sides) / sum(side.size for side in sides)
    assert dataset.train_plan.padding_share == pytest.approx(empty)


def test_same_seed_same_batches(config, tokenizer, dataset):
    batches = take(dataset.train_iterator(), 23)
    again = Dataset.prepare(config, tokenizer, "train", seed=3)
    same(batches, take(again.train_iterator(), 23))
    other = Dataset.prepare(config, tokenizer, "train", seed=5)
    orders = [[b["inputs"].tobytes() for b in take(d.train_iterator(), 23)] for d in (again, other)]
    assert orders[0] != orders[1]


@pytest.mark.parametrize("processes", [2, 3, 6])
def test_processes_together_see_what_one_sees(dataset, processes):
    n = dataset.batches_per_epoch + 3
    for read in ("train_iterator", "eval_batches"):
        count = n if read == "train_iterator" else dataset.batches_per_epoch
        alone = take(getattr(dataset, read)(), count)
        parts = [take(getattr(dataset, read)(p, processes), count) for p in range(processes)]
        joined = [
            {name: np.concatenate([part[name] for part in step]) for name in step[0]}
            for step in zip(*parts, strict=True)
        ]
        same(joined, alone)


def test_processes_must_divide_the_rows(dataset):
    with pytest.raises(DataError, match=r"4 processes .*data.batch_multiple 6"):
        dataset.train_iterator(0, 4)
    with pytest.raises(DataError, match=r"4 processes"):
        dataset.eval_batches(0, 4)


def test_state_goes_on_bit_for_bit(dataset):
    n = dataset.batches_per_epoch
    batches = take(dataset.train_iterator(), 2 * n + 5)
    for stop in (0, 1, n - 1, n, n + 7):
        iterator = dataset.train_iterator()
        take(iterator, stop)
        state = json.loads(json.dumps(iterator.get_state()))
        ahead = take(iterator, 3)
        resumed = dataset.train_iterator()
        resumed.set_state(state)
        assert resumed.get_state() == state
        same(take(resumed, 2 * n + 5 - stop), batches[stop:])
        iterator.set_state(state)
        same(take(iterator, 3), ahead)


def test_worker_processes_give_the_same_batches(config, tokenizer, dataset):
    n = dataset.batches_per_epoch
    parallel = Dataset.prepare(replace(config, workers=2), tokenizer, "train", seed=3)
    iterator = parallel.train_iterator()
    batches = take(iterator, n + 2)
    state = iterator.get_state()
    same(batches, take(dataset.train_iterator(), n + 2))
    iterator.close()
    # The state knows nothing of workers.
    alone = dataset.train_iterator()
    alone.set_state(state)
    same(take(alone, 1), [dataset.batch(dataset.train_plan, 0, 1, n + 2)])


def test_tokens_are_stored_once(config, tokenizer, monkeypatch):
    examples = [{"source": "en3 5", "target": "de3"}, {"source": "", "target": "de5 7 11"}]
    key = pipeline.fingerprint(examples)
    store = TokenStore.build(examples, tokenizer, key)
    assert [len(store[1][side]) for side in ("source", "target")] == [0, 3]
    assert store.lengths()["source"].tolist() == [2, 0]
    assert store.blank.tolist() == [False, True]

    def fail(*_):
        raise AssertionError("tokenised again")

    monkeypatch.setattr(pipeline, "_write_tokens", fail)
    again = TokenStore.build(examples, tokenizer, key)
    np.testing.assert_array_equal(again[0]["source"], store[0]["source"])
    with pytest.raises(AssertionError):
        TokenStore.build(examples, tokenizer, pipeline.fingerprint(examples[:1]))


def test_tokens_are_written_chunk_by_chunk(tokenizer, monkeypatch):
    examples = [{"source": f"en{i} {i}", "target": f"de{i}"} for i in range(23, 34)]
    monkeypatch.setattr(pipeline, "CHUNK", 3)
    store = TokenStore.build(examples, tokenizer, "chunks of three")
    for i, example in enumerate(examples):
        assert tokenizer.decode(store[i]["source"]) == example["source"]
        assert tokenizer.decode(store[i]["target"]) == example["target"]


def test_fingerprint_sees_text_order_and_border():
    def of(*pairs):
        return pipeline.fingerprint([{"source": s, "target": t} for s, t in pairs])

    different = [of(("a", "b")), of(("b", "a")), of(("ab", "")), of(("a", "b"), ("", ""))]
    different += [of(("a", "b"), ("c", "d")), of(("c", "d"), ("a", "b"))]
    assert len(set(different)) == len(different)
    assert of(("a", "b")) == of(("a", "b"))


def test_nothing_left_says_why(config, tokenizer, tmp_path):
    with pytest.raises(DataError, match=r"2 are blank and 20\d have more than .*max_length 2 "):
        Dataset.prepare(replace(config, max_length=2), tokenizer, "train")
    (tmp_path / "blank").write_text("\n\n\n")
    paths = str(tmp_path / "blank"), str(tmp_path / "blank")
    with pytest.raises(DataError, match="3 are blank and 0 have"):
        Dataset.prepare(replace(config, train=paths), tokenizer, "train")


def test_unknown_objective(config, tokenizer):
    with pytest.raises(DataError, match=r"data.objective is 'x': give one of translation"):
        Dataset.prepare(replace(config, objective="x"), tokenizer, "train")


def run(code):
    return subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    )


def test_importing_the_data_never_imports_jax():
    done = run("import data.pipeline, sys; assert not {'jax', 'model', 'train'} & set(sys.modules)")
    assert done.returncode == 0, done.stderr


def test_exit_in_the_middle_is_clean(config):
    done = run(
        "from data.config import *\n"
        "from data.pipeline import Dataset, tokenizer_texts\n"
        "from data.tokenizer import Tokenizer\n"
        f"config = {config!r}\n"
        "tokenizer = Tokenizer.train(tokenizer_texts(config), config.tokenizer)\n"
        "batches = Dataset.prepare(config, tokenizer, 'train').train_iterator()\n"
        "kept = next(batches)\n"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
