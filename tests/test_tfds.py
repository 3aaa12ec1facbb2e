"""Test sources of TensorFlow Datasets with small builders in place of the real ones."""

import sys

import pytest

from heedful.data import labels, sources
from heedful.data.config import DataConfig
from heedful.data.errors import DataError
from heedful.data.examples import share
from heedful.data.sources import tfds

pytest.importorskip("tensorflow_datasets")
import tiny_tfds


@pytest.fixture(autouse=True, scope="module")
def prepared(tmp_path_factory):
    """Set folders in which each dataset is prepared once for all tests."""
    folder = tmp_path_factory.mktemp("tfds")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", str(folder / "data"))
        patch.setenv("HEEDFUL_CACHE", str(folder / "cache"))
        yield folder


def config(source, objective="translation", **more):
    return DataConfig(source=f"tfds:{source}", objective=objective, **more)


def load_all(data):
    return {split: list(sources.load(data, split)) for split in sources.SPLITS}


def identity(data, split):
    return getattr(sources.load(data, split), "identity")  # noqa: B009


# Translation


def test_is_prepared_and_read_back():
    data = config("tiny_pairs/de-en")
    assert sources.fields(data) == ("source", "target")
    for split, name in (("train", "train"), ("valid", "validation"), ("test", "test")):
        examples = sources.load(data, split)
        assert len(examples) == len(tiny_tfds.PAIRS[name])
        assert {(e["source"], e["target"]) for e in examples} == set(tiny_tfds.PAIRS[name])
        assert examples[0] == examples[0]
        assert examples[-1] == examples[len(examples) - 1]
        with pytest.raises(IndexError):
            examples[len(examples)]


def test_columns_name_the_languages_too():
    chosen = sources.load(config("tiny_pairs/de-en", columns=("de", "en")), "test")
    assert list(chosen) == [{"source": "das letzte", "target": "last one"}]


@pytest.mark.parametrize(
    ("source", "more", "names"),
    [
        ("tiny_pairs/de-en", {"languages": ("en", "fr")}, r"has the texts de, en, not en and fr"),
        ("tiny_pairs/de-en", {"languages": ("en", "id")}, r"has the texts de, en, not en and id"),
        ("tiny_pairs/de-en", {"columns": ("en", "id")}, r"data.columns has 'id', but .*de, en:"),
        ("tiny_pairs/de-en", {"columns": ("en",)}, r"translation reads 2"),
        ("tiny_pairs/test-only", {}, r"no split 'train', only test"),
        ("tiny_pairs/broken", {}, r"cannot be prepared in .*no network\)"),
        ("no_such_dataset/x", {}, r"tfds:no_such_dataset/x.* cannot be opened"),
        ("tiny_pairs/train-only", {"holdout": 0}, r"'valid'.* is empty: .*data.holdout"),
        ("tiny_pairs/de-en", {"objective": "causal_lm"}, r"texts de, en, not text or sentence"),
        ("tiny_lines", {"objective": "classification"}, r"data.label is 'label', but .*has text"),
        ("tiny_glue/stsb", {"objective": "classification"}, r"is a number: .*regression"),
        (
            "tiny_pairs/de-en",
            {"objective": "classification", "columns": ("de",), "label": "both"},
            r"'both' of .* is not a single value",
        ),
        ("tiny_glue/sst2", {"objective": "regression"}, r"is not a number: .*classification"),
    ],
)
def test_errors_name_what_there_is(source, more, names):
    with pytest.raises(DataError, match=names) as error:
        sources.load(config(source, **more), "valid")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name",
    [
        "huggingface:evil/set",
        "kaggle:evil",
        "tiny_pairs/de-en/data_dir=/tmp",
        "tiny_pairs/data_dir=/tmp",
        "../tiny_pairs",
        "tiny_pairs/..",
        "tiny_pairs/de-en:latest",
        "",
    ],
)
def test_a_name_that_may_run_code_is_refused_before_anything_is_imported(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)  # An import would fail.
    with pytest.raises(DataError, match="may run code of the data") as error:
        sources.load(config(name), "valid")
    assert repr(f"tfds:{name}") in str(error.value)


def test_a_version_may_be_named():
    load_all(config("tiny_pairs/de-en"))  # This prepares the dataset.
    named = identity(config("tiny_pairs/de-en:1.0.0"), "test")
    assert named == identity(config("tiny_pairs/de-en"), "test")


def test_known_by_version_split_and_columns_without_reading_it():
    def known(split, **more):
        return identity(config("tiny_pairs/de-en", **more), split)

    identities = {known("train"), known("valid"), known("train", languages=("de", "en"))}
    assert len(identities) == 3
    assert known("train") in identities


# Labels and text


@pytest.mark.parametrize(
    ("name", "objective", "fields", "one"),
    [
        ("glue/cola", "classification", ("text",), "acceptable"),
        ("glue/sst2", "classification", ("text",), "positive"),
        ("glue/mrpc", "classification", ("text", "pair"), "equivalent"),
        ("glue/qqp", "classification", ("text", "pair"), "duplicate"),
        ("glue/stsb", "regression", ("text", "pair"), "1.0"),
        ("glue/mnli", "classification", ("text", "pair"), "neutral"),
        ("glue/qnli", "classification", ("text", "pair"), "not_entailment"),
        ("glue/rte", "classification", ("text", "pair"), "not_entailment"),
        ("glue/wnli", "classification", ("text", "pair"), "entailment"),
        ("imdb_reviews", "classification", ("text",), "pos"),
        ("lm1b", "causal_lm", ("text",), None),
        ("wmt14_translate/de-en", "translation", ("source", "target"), None),
    ],
)
def test_the_real_definitions_have_the_fields(name, objective, fields, one):
    """The definitions are part of tfds; only the texts need a network."""
    data = config(name, objective)
    assert sources.fields(data) == fields
    if one:
        feature = tfds._builder(data).info.features["label"]
        assert tfds._label_reader(data, "label", feature)(1) == one


@pytest.mark.parametrize("name", list(tiny_tfds.GLUE))
def test_glue_features_are_mapped_and_classes_named(name):
    texts, classes = tiny_tfds.GLUE[name]
    data = config(f"tiny_glue/{name}", "classification" if classes else "regression")
    assert labels.classes(data) == (classes or ())  # not sorted: GLUE's F1 is of the second
    assert sources.fields(data) == ("text", "pair")[: len(texts)]
    split = "validation_matched" if name == "mnli" else "validation"
    expected = []
    for n in range(tiny_tfds.GLUE_SIZES["validation"]):
        example = tiny_tfds.glue_example(name, split, n)
        label = classes[example["label"]] if classes else f"{n % 6}.1"
        fields = zip(("text", "pair"), texts, strict=False)
        expected.append({field: example[feature] for field, feature in fields} | {"label": label})
    found = sources.load(data, "test")
    assert sorted(found, key=lambda e: e["text"]) == expected


def test_hidden_test_labels_move_the_splits_and_this_is_said(capsys):
    data = config("tiny_glue/sst2", "classification", holdout=0.1)
    parts = load_all(data)
    said = capsys.readouterr().err
    assert "test is its validation, because it has no test split with labels" in said
    assert "valid is 0.1 of its train" in said
    texts = {split: {e["text"] for e in part} for split, part in parts.items()}
    assert all("of validation" in text for text in texts["test"])
    assert not texts["train"] & texts["valid"]
    everything = {f"sentence {n} of train" for n in range(199)}
    assert texts["train"] | texts["valid"] == everything
    assert texts["valid"] == {text for text in everything if share(text) < 0.1}
    # If labels are not needed, the test split is the real one.
    assert len(sources.load(config("tiny_glue/sst2", "masked_lm"), "test")) == 7
    assert len(sources.load(config("tiny_glue/sst2", "masked_lm"), "valid")) == 5


def test_reviews_hold_out_equal_texts_together():
    parts = load_all(config("tiny_reviews", "classification", holdout=0.1))
    assert {len(parts["test"]), len(parts["train"]) + len(parts["valid"])} == {11, 398}
    assert 20 < len(parts["valid"]) < 60
    texts = {split: {e["text"] for e in part} for split, part in parts.items()}
    assert not texts["train"] & texts["valid"]
    assert {e["label"] for e in parts["train"]} == {"neg", "pos"}


def test_lines_are_documents_and_shares_are_read_once(prepared, capsys):
    data = config("tiny_lines", "causal_lm", holdout=0.05)
    parts = load_all(data)
    assert capsys.readouterr().err.count("reading tiny_lines") == 1
    assert {e["text"] for e in parts["train"] + parts["valid"]} == {
        f"train ü {n}" for n in range(1999)
    }
    assert {tuple(e) for e in parts["valid"]} == {("text",)}
    assert len(parts["valid"]) == sum(share(f"train ü {n}") < 0.05 for n in range(1999))
    more = config("tiny_lines", "causal_lm", holdout=0.04)
    assert len({identity(d, s) for d in (data, more) for s in ("train", "valid")}) == 4
    assert identity(data, "test") == identity(more, "test")


def test_train_alone_gives_all_splits():
    parts = load_all(config("tiny_pairs/train-only", holdout=0.3))
    assert sum(map(len, parts.values())) == len(tiny_tfds.PAIRS["train"])
    assert all(parts.values())


def test_example_without_label_is_an_error():
    """SNLI has examples without a label, on which the raters disagreed."""
    data = config("tiny_reviews", "classification")
    feature = tfds._builder(data).info.features["label"]
    read = tfds._label_reader(data, "label", feature)
    assert read(1) == "pos"
    with pytest.raises(DataError, match=r"without a label \('label' is -1\)"):
        read(-1)
