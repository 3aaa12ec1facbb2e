import hashlib
import json
import zipfile
from pathlib import Path

import pytest

from data import packages, sources
from data.config import DataConfig, DataError, TokenizerConfig
from data.pipeline import fingerprint

REPOSITORY = Path(__file__).parents[1]


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
        ({"train": ("a",), "source": "files"}, "data.train has 1"),
        ({"train": ("a", "b")}, "data.source"),
        ({"source": "files"}, "data.train is empty"),
        ({"holdout": 0.5}, "data.holdout is 0.5"),
        ({"batch_tokens": 0}, "data.batch_tokens is 0"),
        ({"batch_multiple": 0}, "data.batch_multiple"),
        ({"buckets": 0}, "data.buckets"),
        ({"max_length": 1}, "data.max_length is 1"),
        ({"workers": -1}, "data.workers is -1"),
    ],
)
def test_config_names_the_bad_field(changes, names):
    with pytest.raises(DataError, match=names) as error:
        DataConfig(**changes)
    one_line(error)


@pytest.mark.parametrize(
    ("changes", "names"), [({"kind": "chars"}, "kind is 'chars'"), ({"vocab_size": 259}, "259")]
)
def test_tokenizer_config_names_the_bad_field(changes, names):
    with pytest.raises(DataError, match=names):
        TokenizerConfig(**changes)


def test_unknown_source_and_split():
    with pytest.raises(DataError, match=r"'nowhere'.*homeassistant, files, tfds"):
        sources.load(DataConfig(source="nowhere"), "train")
    with pytest.raises(DataError, match=r"'dev'.*train, valid, test"):
        sources.load(DataConfig(), "dev")


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
    valid = pair(tmp_path, ["v"], ["w"], "valid")
    config = files(*train, valid=valid, holdout=0.1)
    assert list(sources.load(config, "valid")) == [{"source": "v", "target": "w"}]
    kept, test = sources.load(config, "train"), sources.load(config, "test")
    assert len(kept) + len(test) == 499
    assert 0.06 < len(test) / 499 < 0.14


def test_empty_holdout_says_what_to_give(tmp_path):
    train = pair(tmp_path, ["a", "b"], ["c", "d"])
    with pytest.raises(DataError, match=r"'valid'.*empty: give files to data.valid"):
        sources.load(files(*train, holdout=0), "valid")
    assert len(sources.load(files(*train, holdout=0), "train")) == 2


# Packages and Home Assistant


def texts(component, language, tree):
    path = f"homeassistant/components/{component}/translations/{language}.json"
    return path, json.dumps(tree, ensure_ascii=False)


def fake_wheel(cache, monkeypatch, members):
    """Puts a wheel where a user would put one by hand."""
    path = cache / "packages" / packages.PACKAGES["homeassistant"].file
    path.parent.mkdir(parents=True)
    with zipfile.ZipFile(path, "w") as archive:
        for member in members:
            archive.writestr(*member)
    pin_to(monkeypatch, hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def pin_to(monkeypatch, sha256):
    package = packages.PACKAGES["homeassistant"]
    fake = packages.Package(package.name, package.version, package.file, sha256, package.pip)
    monkeypatch.setitem(packages.PACKAGES, "homeassistant", fake)


def components_of(split, count):
    names = (f"component_{n}" for n in range(1000))
    return [name for name in names if sources._split_of(name) == split][:count]


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
                assert sources._split_of(example["source"].split()[-1]) == split


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
    path.unlink()  # What has been extracted does not need the package any more.
    assert sources.load(DataConfig(languages=("en", "zh-Hans")), "train")


def test_wrong_checksum_says_both(cache, monkeypatch):
    fake_wheel(cache, monkeypatch, [texts("a", "en", {})])
    pin_to(monkeypatch, "0" * 64)
    with pytest.raises(DataError, match=r"has sha256 (?!0{64})\w{64}, expected 0{64}"):
        sources.load(DataConfig(), "train")
    assert not list((cache / "packages").glob("homeassistant-*/*"))


def test_offline_says_what_to_download_and_where(cache, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(DataError) as error:
        sources.load(DataConfig(), "train")
    message = one_line(error)
    assert "pip download --no-deps --only-binary=:all: --python-version 3.14.2" in message
    assert "homeassistant==2026.11.0" in message
    assert message.endswith(str(cache / "packages"))
    assert not list((cache / "packages").glob("*/*"))


def test_download_is_checked_and_kept(cache, monkeypatch):
    def download(package, scratch):
        with zipfile.ZipFile(scratch / package.file, "w") as archive:
            archive.writestr(*texts("a", "en", {"k": "text"}))
        pin_to(monkeypatch, hashlib.sha256((scratch / package.file).read_bytes()).hexdigest())

    monkeypatch.setattr(packages, "_download", download)
    with pytest.raises(DataError, match="expected 7ca5"):
        packages.members("homeassistant")
    assert packages.members("homeassistant") == ["homeassistant/components/a/translations/en.json"]


def test_build_once_is_atomic_and_the_first_one_wins(tmp_path):
    target = tmp_path / "deep" / "folder"

    def fail(draft):
        (draft / "half").write_text("x")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        packages.build_once(target, fail)
    assert list(target.parent.iterdir()) == []

    def build_while_another_finishes(draft):
        (draft / "mine").write_text("x")
        packages.build_once(target, lambda other: (other / "theirs").write_text("x") and None)

    assert packages.build_once(target, build_while_another_finishes) == target
    assert [path.name for path in target.iterdir()] == ["theirs"]


def test_unwritable_cache_is_named(tmp_path):
    def full(draft):
        raise OSError(28, "No space left on device")

    with pytest.raises(DataError, match=r"cannot write .*No space left.*HEEDFUL_CACHE"):
        packages.build_once(tmp_path / "folder", full)


def test_cache_is_in_the_home_folder_by_default(monkeypatch):
    monkeypatch.delenv("HEEDFUL_CACHE")
    assert packages.cache() == Path.home() / ".cache" / "heedful"


# TensorFlow Datasets


@pytest.fixture
def tfds(tmp_path, monkeypatch):
    pytest.importorskip("tensorflow_datasets")
    import tiny_tfds

    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    return tiny_tfds.PAIRS


def test_tfds_is_prepared_and_read_back(tfds):
    config = DataConfig(source="tfds:tiny_pairs/de-en")
    for split, name in (("train", "train"), ("valid", "validation"), ("test", "test")):
        examples = sources.load(config, split)
        assert len(examples) == len(tfds[name])
        read = {(e["source"], e["target"]) for e in examples}
        assert read == set(tfds[name])
        assert examples[0] == examples[0]


@pytest.mark.parametrize(
    ("source", "languages", "names"),
    [
        ("tiny_pairs/de-en", ("en", "fr"), r"'fr'.* has the texts de, en:"),
        ("tiny_pairs/de-en", ("en", "id"), r"'id'.* has the texts de, en:"),
        ("tiny_pairs/train-only", ("en", "de"), r"no split 'validation', only train"),
        ("tiny_pairs/broken", ("en", "de"), r"cannot be prepared in .*no network\)"),
        ("no_such_dataset/x", ("en", "de"), r"tfds:no_such_dataset/x.* cannot be opened"),
    ],
)
def test_tfds_errors_name_what_there_is(tfds, source, languages, names):
    with pytest.raises(DataError, match=names) as error:
        sources.load(DataConfig(source=f"tfds:{source}", languages=languages), "valid")
    one_line(error)


def test_tfds_is_known_by_version_split_and_languages_without_reading_it(tfds):
    def known(split: str, languages: tuple[str, str] = ("de", "en")) -> str:
        config = DataConfig(source="tfds:tiny_pairs/de-en", languages=languages)
        return fingerprint(sources.load(config, split))

    fingerprints = {known("train"), known("valid"), known("train", ("en", "de"))}
    assert len(fingerprints) == 3
    assert known("train") in fingerprints
