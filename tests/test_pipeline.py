"""Test the pipeline of data: batches of all objectives, their order, workers and processes."""

import itertools
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from threading import current_thread

import numpy as np
import pytest

from heedful.data import sources
from heedful.data.batch import check
from heedful.data.config import DataConfig, TokenizerConfig
from heedful.data.errors import DataError
from heedful.data.objectives import OBJECTIVES
from heedful.data.pipeline import Dataset, classes, tokenizer_texts
from heedful.data.tokenizer import BOS, EOS, Tokenizer

TEXT_OBJECTIVES = [name for name, each in OBJECTIVES.items() if each.is_text]

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
    return Tokenizer.prepare(tokenizer_texts(config), config.tokenizer, config.objective)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("HEEDFUL_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def dataset(config, tokenizer):
    return Dataset.prepare(config, tokenizer, "train", seed=3)


def take(iterator, n):
    return list(itertools.islice(iterator, n))


def shape_of(batch):
    sides = [batch[name] for name in ("encoder_inputs", "inputs") if name in batch]
    return len(batch["inputs"]), tuple(side.shape[1] for side in sides)


def same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


def examples_of(batches, tokenizer):
    """Return the texts (source, target) of all rows that hold an example."""
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
    for shape in dataset.train_plan.shapes:
        assert str(shape) in text
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
        check(batch)
        assert shape_of(batch) in dataset.train_plan.shapes


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
        parts = [take(getattr(dataset, read)([p], processes), count) for p in range(processes)]
        joined = [
            {name: np.concatenate([part[name] for part in step]) for name in step[0]}
            for step in zip(*parts, strict=True)
        ]
        same(joined, alone)


def test_a_process_may_read_several_parts(dataset):
    """A process reads several parts if the devices of its host are not neighbours in the mesh."""
    for index in range(dataset.batches_per_epoch):
        whole = dataset.batch(dataset.eval_plan, index)
        mine = dataset.batch(dataset.eval_plan, index, [0, 2], 3)
        for name, array in whole.items():
            first, _, last = np.split(array, 3)
            np.testing.assert_array_equal(mine[name], np.concatenate([first, last]))


def test_parts_must_divide_the_rows(dataset):
    with pytest.raises(DataError, match=r"data.batch_multiple is 6: give a multiple of 4"):
        dataset.train_iterator([0], 4)
    with pytest.raises(DataError, match=r"give a multiple of 4"):
        dataset.eval_batches([0], 4)


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


def test_batches_are_placed_while_the_last_one_is_used(dataset):
    expected, placed = take(dataset.train_iterator(), 3), []

    def place(batch):
        if len(placed) == 3:
            raise OSError("no room")
        placed.append(current_thread())
        return batch["inputs"]

    iterator = dataset.train_iterator(place=place)
    for n, batch in enumerate(expected):
        np.testing.assert_array_equal(next(iterator), batch["inputs"])
        # The state does not count batches that are already placed but not used.
        assert iterator.get_state() == {"next_batch": n + 1}
        until = time.monotonic() + 20
        while len(placed) < min(n + 2, 3):  # The next batch is placed without a request.
            assert time.monotonic() < until
            time.sleep(0.001)
    with pytest.raises(OSError, match="no room"):
        next(iterator)
    iterator.close()
    (thread,) = set(placed)
    assert thread is not current_thread() and not thread.is_alive()


def test_worker_processes_give_the_same_batches(config, tokenizer, dataset):
    n = dataset.batches_per_epoch
    parallel = Dataset.prepare(replace(config, workers=2), tokenizer, "train", seed=3)
    iterator = parallel.train_iterator()
    batches = take(iterator, n + 2)
    state = iterator.get_state()
    same(batches, take(dataset.train_iterator(), n + 2))
    iterator.close()
    # The state does not depend on workers.
    alone = dataset.train_iterator()
    alone.set_state(state)
    same(take(alone, 1), [dataset.batch(dataset.train_plan, n + 2)])


def test_nothing_left_says_why(config, tokenizer, tmp_path):
    with pytest.raises(DataError, match=r"2 are blank and 20\d have more than .*max_length 2 "):
        Dataset.prepare(replace(config, max_length=2), tokenizer, "train")
    (tmp_path / "blank").write_text("\n\n\n")
    paths = str(tmp_path / "blank"), str(tmp_path / "blank")
    with pytest.raises(DataError, match="3 are blank and 0 have"):
        Dataset.prepare(replace(config, train=paths), tokenizer, "train")


# Running text ------------------------------------------------------------------------------------

DOCUMENTS = ["abcd " * n for n in (1, 7, 0, 3)] + ["\n \n", "éa", "bad cab. " * 23, "d"]


@pytest.fixture
def prepare(monkeypatch):
    """Return `prepare(objective, examples, **config)`, which returns a Dataset."""

    def prepare(objective, examples=None, split="train", seed=3, **changes):
        if examples is None:
            examples = [{"text": text} for text in DOCUMENTS]
        fields = tuple(field for field in examples[0] if field != "label")
        monkeypatch.setattr(sources, "load", lambda config, split: examples)
        monkeypatch.setattr(sources, "fields", lambda config: fields)
        monkeypatch.setattr(sources, "classes", lambda config: ())
        how = {"max_length": 17, "batch_tokens": 103, "batch_multiple": 6, "buckets": 3} | changes
        kind = TokenizerConfig(kind="chars", vocab_size=211)
        config = DataConfig(source="tfds:x", objective=objective, tokenizer=kind, **how)
        tokenizer = Tokenizer.prepare(tokenizer_texts(config), kind, objective)
        return Dataset.prepare(config, tokenizer, split, seed=seed)

    return prepare


def segments(batches, *names):
    """Yield the arrays of each segment of each row, without padding, as tuples of lists."""
    for batch in batches:
        for row, ids in enumerate(batch["segment_ids"]):
            for number in range(1, ids.max() + 1):
                yield tuple(batch[name][row][ids == number].tolist() for name in names)


def spelled(tokenizer, texts=DOCUMENTS):
    """Return the tokens of each document that is not blank, begin and end included."""
    rows = tokenizer.encode_batch([text for text in texts if text.strip()])
    return [[BOS, *row.tolist(), EOS] for row in rows]


@pytest.mark.parametrize("packing", [True, False])
def test_an_evaluation_predicts_every_token_exactly_once(prepare, packing):
    dataset = prepare("causal_lm", packing=packing)
    expected = [token for document in spelled(dataset.tokenizer) for token in document[1:]]
    found = list(segments(dataset.eval_batches(), "targets", "weights", "inputs", "positions"))
    targets = [token for segment in found for token in segment[0]]
    if packing:
        assert targets == expected  # Packed rows keep the order.
    assert sorted(targets) == sorted(expected)
    assert dataset.target_count == len(expected) == sum(sum(weights) for _, weights, *_ in found)
    for target, _, inputs, positions in found:
        assert inputs[1:] == target[:-1]
        assert positions == list(range(len(inputs)))
    same(list(dataset.eval_batches()), list(dataset.eval_batches()))


@pytest.mark.parametrize("objective", TEXT_OBJECTIVES)
@pytest.mark.parametrize("packing", [True, False])
def test_documents_can_be_put_together_again(prepare, objective, packing):
    dataset = prepare(objective, packing=packing)
    found = []
    for _ in range(2):
        for batch in take(dataset.train_iterator(), dataset.batches_per_epoch):
            check(batch)
            assert shape_of(batch) in dataset.train_plan.shapes
    for batch in dataset.eval_batches():
        for row in range(len(batch["inputs"])):
            found += pieces_of(objective, {k: v[row] for k, v in batch.items()}, dataset)
    documents = spelled(dataset.tokenizer)
    if objective == "span_corruption":
        documents = [document[1:-1] for document in documents]
    overlap = objective in ("causal_lm", "prefix_lm")
    for document in sorted(documents, key=len, reverse=True):
        while document:
            # Remove the pieces of the document from `found`, from its begin to its end.
            piece = max((p for p in found if document[: len(p)] == p), key=len)
            found.remove(piece)
            document = document[len(piece) - overlap :] if len(piece) < len(document) else []
    assert not found


def pieces_of(objective, row, dataset):
    """Return the tokens of each piece of a document in a row."""
    pieces = []
    for number in range(1, row["segment_ids"].max() + 1):
        here = row["segment_ids"] == number
        inputs, targets = row["inputs"][here].tolist(), row["targets"][here].tolist()
        if objective == "masked_lm":
            pieces.append(targets)
        elif objective == "span_corruption":
            source = row["encoder_inputs"][row["encoder_segment_ids"] > 0].tolist()[:-1]
            spans = iter(np.split(targets[:-1], np.flatnonzero(np.isin(targets, SENTINELS)))[1:])
            parts = [next(spans)[1:] if t in SENTINELS else [t] for t in source]
            pieces.append([int(token) for part in parts for token in part])
        else:
            pieces.append([inputs[0], *targets])
    return pieces


SENTINELS = range(4, 104)


def test_packed_rows_are_full(prepare):
    dataset = prepare("causal_lm")
    for _ in range(3):
        batches = take(dataset.train_iterator(), dataset.batches_per_epoch)
        rows = np.concatenate([batch["segment_ids"] for batch in batches])
        rows = rows[rows.any(1)]
        assert sorted((rows == 0).sum(1))[:-1] == [0] * (len(rows) - 1)
        assert rows.max() > 2
        places = len(batches) * 6 * 17
        assert dataset.train_plan.padding_share == pytest.approx(1 - (rows > 0).sum() / places)


def test_masks_are_new_in_every_epoch_and_fixed_in_evaluation(prepare):
    for packing in (True, False):
        dataset = prepare("masked_lm", packing=packing, noise=0.3)
        iterator = dataset.train_iterator()
        epochs = [take(iterator, dataset.batches_per_epoch) for _ in range(2)]
        masks = [sorted(segments(epoch, "targets", "weights")) for epoch in epochs]
        assert masks[0] != masks[1]
        if not packing:
            assert [t for t, _ in masks[0]] == [t for t, _ in masks[1]]
        same(list(dataset.eval_batches()), list(dataset.eval_batches()))
        for _, weights in segments(dataset.eval_batches(), "targets", "weights"):
            assert sum(weights) > 0


def test_a_row_does_not_depend_on_its_batch(prepare):
    small, large = (prepare("masked_lm", packing=False, batch_tokens=n) for n in (103, 409))
    rows = [
        sorted(segments(d.eval_batches(), "inputs", "targets", "weights")) for d in (small, large)
    ]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("objective", ["masked_lm", "span_corruption"])
def test_text_does_not_depend_on_processes(prepare, objective):
    dataset = prepare(objective)
    n = dataset.batches_per_epoch + 2
    expected = take(dataset.train_iterator(), n)
    parts = [take(dataset.train_iterator([process], 3), n) for process in range(3)]
    joined = [
        {name: np.concatenate([part[name] for part in step]) for name in step[0]}
        for step in zip(*parts, strict=True)
    ]
    same(joined, expected)
    resumed = dataset.train_iterator()
    resumed.set_state({"next_batch": n - 1})
    same(take(resumed, 1), expected[-1:])


def test_text_does_not_depend_on_workers(prepare):
    n = 5
    iterator = prepare("masked_lm", workers=1, whole_words=True).train_iterator()
    same(take(iterator, n), take(prepare("masked_lm", whole_words=True).train_iterator(), n))
    iterator.close()


def test_report_of_documents(prepare):
    for packing in (True, False):
        dataset = prepare("causal_lm", packing=packing)
        kept = [text for text in DOCUMENTS if text.strip()]
        assert dataset.characters == sum(map(len, kept))
        assert dataset.bytes == dataset.characters + 1
        tokens = dataset.characters + len(kept)
        text = "\n".join(dataset.report)
        expected = f"6 documents, {tokens:,} tokens, {dataset.characters:,} characters"
        assert f"train: {expected}" in text
        assert "train: 2 documents left out, blank\n" in text
        assert ("packed" in text) == packing
    with pytest.raises(DataError, match="all 2 documents of split 'valid' are blank"):
        prepare("masked_lm", [{"text": ""}, {"text": " \n"}], "valid")


def test_report_of_what_the_tokenizer_loses(config, prepare, folder, tokenizer):
    unknown = Tokenizer.train(["x"], TokenizerConfig(kind="words"), "translation")
    dataset = Dataset.prepare(config, unknown, "train")
    tokens = sum(len(ids) for ids in dataset.store.ids.values())
    line = f"train: {tokens:,} of {tokens:,} tokens (100.00%) are <unk>"
    assert any(found.startswith(line) for found in dataset.report)
    pieces = Tokenizer.train(DOCUMENTS, TokenizerConfig(kind="wordpiece"), "translation")
    assert any(
        "does not keep spaces" in line for line in Dataset.prepare(config, pieces, "train").report
    )
    for dataset in (Dataset.prepare(config, tokenizer, "train"), prepare("causal_lm")):
        assert not any("<unk>" in line or "spaces" in line for line in dataset.report)


def test_tokenizer_that_does_not_fit_the_objective(config, tokenizer):
    with pytest.raises(DataError, match=r"the tokenizer lacks a mask.*masked_lm needs"):
        Dataset.prepare(replace(config, objective="masked_lm"), tokenizer, "train")


def test_long_texts_come_to_the_tokenizer_in_parts(prepare, monkeypatch):
    monkeypatch.setattr("heedful.data.text_parts.PART", 29)
    dataset = prepare("causal_lm")
    parts = list(tokenizer_texts(dataset.config))
    assert "".join(parts) == "".join(DOCUMENTS)
    assert max(map(len, parts)) < 29 + 10
    texts = tokenizer_texts(dataset.config)
    assert list(texts) == list(texts)


# Labels ------------------------------------------------------------------------------------------

REVIEWS = [
    {"text": "a fine cast", "label": "good"},
    {"text": "", "label": "bad"},
    {"text": "dull", "label": "bad"},
    {"text": "fine", "label": "good"},
    {"text": "long " * 9, "label": "bad"},
    {"text": "not as bad as the other", "label": "good"},
    {"text": "sad", "label": "so so"},
]
PAIRS = [
    {"text": "a cat", "pair": "cats", "label": "4.5"},
    {"text": "a cat", "pair": "", "label": "1"},
    {"text": "a hat", "pair": "no", "label": "-0.25"},
]


def test_classification(prepare):
    dataset = prepare("classification", REVIEWS, max_length=29, batch_tokens=199)
    assert dataset.classes == classes(dataset.config) == ("bad", "good", "so so")
    assert dataset.kept.tolist() == [0, 2, 3, 5, 6]
    found = []
    for batch in dataset.eval_batches():
        check(batch)
        for inputs, target, weight in zip(
            *(batch[n] for n in ("inputs", "targets", "weights")), strict=True
        ):
            assert weight == (inputs[0] == BOS)
            if weight:
                found.append((dataset.tokenizer.decode(inputs), dataset.classes[target]))
    expected = [(e["text"], e["label"]) for i, e in enumerate(REVIEWS) if i not in (1, 4)]
    assert sorted(found) == sorted(expected)
    assert dataset.target_count == 5
    text = "\n".join(dataset.report)
    assert "1 examples left out, longer than 29" in text
    assert "1 examples left out, blank" in text
    assert "3 classes, the largest 'good' with 60.0%" in text
    assert dataset.characters == sum(len(text) for text, _ in expected)


def test_regression_of_pairs(prepare):
    dataset = prepare("regression", PAIRS)
    (batch,) = dataset.eval_batches()
    check(batch)
    assert batch["targets"].tolist() == [4.5, -0.25, 0, 0, 0, 0]
    assert batch["targets"].dtype == np.float32
    assert batch["type_ids"].sum(1).tolist() == [5, 3, 0, 0, 0, 0]
    assert dataset.classes == ()
    alone = list(dataset.eval_batches([2], 3))  # The rows of this part are all padding.
    assert [b["weights"].tolist() for b in alone] == [[0, 0]]
    assert alone[0]["inputs"].shape == (2, batch["inputs"].shape[1])


def test_order_of_classes(prepare):
    dataset = prepare("classification", REVIEWS, classes=("so so", "good", "bad"))
    assert dataset.classes == ("so so", "good", "bad")
    assert dataset.labels.tolist() == [1, 2, 2, 1, 2, 1, 0]


def test_labels_that_cannot_be(prepare):
    with pytest.raises(
        DataError, match=r"split 'valid' has the label 'so so'.* bad, good: .*data\.c"
    ):
        prepare("classification", REVIEWS, "valid", classes=("bad", "good"))
    with pytest.raises(DataError, match=r"'good' is the only class: name two or more"):
        prepare("classification", REVIEWS[:1])
    for label in ("many", "nan", "", "inf"):
        with pytest.raises(DataError, match=rf"example 1 of split 'test' has the label '{label}'"):
            prepare("regression", [PAIRS[0], {**PAIRS[0], "label": label}], "test")


# Processes ---------------------------------------------------------------------------------------


def run(code):
    return subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    )


def test_importing_the_data_never_imports_jax():
    done = run(
        "import heedful.data.pipeline, sys\n"
        "assert not {'jax', 'heedful.model', 'heedful.train'} & set(sys.modules)"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("place", [None, "dict"])
def test_exit_in_the_middle_is_clean(config, place):
    done = run(
        "from heedful.data.config import *\n"
        "from heedful.data.pipeline import Dataset, tokenizer_texts\n"
        "from heedful.data.tokenizer import Tokenizer\n"
        f"config = {config!r}\n"
        "tokenizer = Tokenizer.train(tokenizer_texts(config), config.tokenizer, 'translation')\n"
        "dataset = Dataset.prepare(config, tokenizer, 'train')\n"
        f"batches = dataset.train_iterator(place={place})\n"
        "kept = next(batches)\n"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
