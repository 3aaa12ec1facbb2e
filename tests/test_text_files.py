"""Test text files: documents, held-out parts and errors."""

import bz2
import gzip
import lzma
import re

import pytest

from heedful.data import sources, text_files
from heedful.data.config import DataConfig
from heedful.data.errors import DataError


def config(*train, **more):
    paths = tuple(str(path) for path in train)
    return DataConfig(source="files", objective="causal_lm", train=paths, **more)


def load_all(data):
    return {split: [e["text"] for e in sources.load(data, split)] for split in sources.SPLITS}


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    return path


def numbered(n_lines):
    return "".join(f"line {n} grün\n" for n in range(n_lines))


# Documents


def test_a_file_is_a_document_and_a_folder_all_of_its_files(tmp_path):
    names = ["b.txt", "a/z.md", "a/b/c", "c.txt", ".git/x", "a/.hidden"]
    for name in names:
        write(tmp_path / "texts" / name, f"{name}\r\nend")
    write(tmp_path / "one.txt", "\ufeffBOM\n")
    own = (str(tmp_path / "one.txt"),)
    data = config(tmp_path / "one.txt", tmp_path / "texts", valid=own, test=own)
    assert sources.fields(data) == ("text",)
    parts = load_all(data)
    visible = ["a/b/c", "a/z.md", "b.txt", "c.txt"]
    assert parts["train"] == ["BOM\n", *(f"{name}\nend" for name in visible)]
    assert parts["valid"] == parts["test"] == ["BOM\n"]


def test_the_end_of_each_file_is_held_out_at_a_line_end(tmp_path):
    texts = {name: numbered(n) for name, n in (("a", 997), ("b", 499))}
    for name, text in texts.items():
        write(tmp_path / name, text)
    parts = load_all(config(tmp_path / "a", tmp_path / "b", holdout=0.1))
    for i, text in enumerate(texts.values()):
        train, valid, test = (parts[split][i] for split in ("train", "valid", "test"))
        assert train + test + valid == text
        assert all(part.endswith("\n") for part in (train, valid, test))
        for part in (valid, test):
            assert abs(len(part) / len(text) - 0.1) < 20 / len(text)


def test_valid_is_the_same_with_a_test_file_and_without(tmp_path):
    write(tmp_path / "a", numbered(997))
    both = load_all(config(tmp_path / "a", holdout=0.1))
    one = load_all(config(tmp_path / "a", holdout=0.1, test=(str(tmp_path / "a"),)))
    assert one["valid"] == both["valid"]
    assert one["train"] == [both["train"][0] + both["test"][0]]


def test_text_without_line_ends_is_cut_at_a_space_or_between_characters(tmp_path):
    words = " ".join(f"wörter{n}" for n in range(30_000))
    parts = load_all(config(write(tmp_path / "words", words), holdout=0.1))
    joined = [parts[split][0] for split in ("train", "test", "valid")]
    assert "".join(joined) == words
    assert joined[0].endswith(" ")
    for n in range(7):  # The border falls on each byte of a character of three bytes.
        signs = "家" * (101 + n)
        parts = load_all(config(write(tmp_path / "signs", signs), holdout=0.1))
        joined = [parts[split][0] for split in ("train", "test", "valid")]
        assert "".join(joined) == signs
        assert 8 <= len(joined[1]) <= 13


def test_a_last_line_without_its_end_stays_whole(tmp_path):
    text = numbered(7) + "the last line, with many words in it, is longer than the held-out share"
    data = config(write(tmp_path / "a", text), holdout=0.2)
    assert [example["text"] for example in sources.load(data, "train")] == [text]
    with pytest.raises(DataError, match=r"split 'valid' .* is empty"):
        sources.load(data, "valid")


def test_of_many_files_whole_ones_are_held_out_and_copies_stay_together(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "MANY_FILES", 211)
    for n in range(211):
        write(tmp_path / f"{n:03}", f"document {n % 100}\nsecond line\n")
    parts = load_all(config(tmp_path, holdout=0.2))
    assert sum(map(len, parts.values())) == 211
    assert sum(len(set(part)) for part in parts.values()) == 100
    assert all(text.endswith("second line\n") for part in parts.values() for text in part)
    assert 5 < len(set(parts["valid"])) < 40


def test_a_huge_file_is_several_documents(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "DOCUMENT_BYTES", 101)
    text = numbered(97)
    path = str(write(tmp_path / "a", text))
    documents = [
        e["text"] for e in sources.load(config(path, valid=(path,), test=(path,)), "train")
    ]
    assert "".join(documents) == text
    assert max(map(len, documents)) < 130
    assert all(re.fullmatch(r"(line \d+ grün\n)+", document) for document in documents)


TEXT = "the same words in every encoding\n" * 99
FOREIGN = {
    "gzip": gzip.compress(TEXT.encode()),
    "bzip2": bz2.compress(TEXT.encode()),
    "xz": lzma.compress(TEXT.encode()),
    "Zstandard": b"\x28\xb5\x2f\xfd\x04\x58\xf0\x80" + bytes(range(256)),
    "zip archive": b"PK\x03\x04\x14\x00\x00\x00\x08\x00" + bytes(range(256)),
    "Parquet": b"PAR1\x15\x04\x15\xb8\x01\x15" + bytes(range(256)),
    "UTF-16": TEXT.encode("utf-16"),
    "UTF-16 or not text": TEXT.encode("utf-16-le"),
}


@pytest.mark.parametrize("what", FOREIGN)
@pytest.mark.parametrize("objective", ["causal_lm", "classification", "translation"])
def test_a_file_that_is_no_utf8_is_called_what_it_is(tmp_path, what, objective):
    path = tmp_path / ("a.tsv" if objective == "classification" else "a")
    path.write_bytes(FOREIGN[what])
    paths = (str(path),) * (2 if objective == "translation" else 1)
    own = {"train": paths, "valid": paths, "test": paths}
    with pytest.raises(DataError, match=rf"a(\.tsv)? is .*{what}.*: ") as error:
        list(sources.load(DataConfig(source="files", objective=objective, **own), "train"))
    assert "\n" not in str(error.value)


def test_text_files_of_one_line_with_carriage_returns_do_not_translate_each_other(tmp_path):
    paths = [str(write(tmp_path / name, "one\rtwo\r")) for name in ("a", "b")]
    data = DataConfig(source="files", objective="translation", train=paths, valid=paths, test=paths)
    with pytest.raises(DataError, match=r"a has line ends of \\r alone: convert them"):
        sources.load(data, "train")


@pytest.mark.parametrize("mark", ["\r\n", *"\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"])
def test_a_text_becomes_one_line(mark):
    assert len(f"a{mark}b".splitlines()) == 2
    assert text_files.one_line(f"a{mark}b{mark}") == "a b "


def test_invalid_utf8_names_file_and_line(tmp_path):
    path = tmp_path / "a"
    path.write_bytes("gut\nschön\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"a, line 2: byte 4 .*0xf6.*UTF-8"):
        list(sources.load(config(path, holdout=0), "train"))


def test_missing_and_empty(tmp_path):
    with pytest.raises(DataError, match=r"cannot read .*nothing: No such file"):
        sources.load(config(tmp_path / "nothing"), "train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty has no files"):
        sources.load(config(tmp_path / "empty"), "train")
    write(tmp_path / "blank", "")
    with pytest.raises(DataError, match=r"'train'.*empty: give files to data.train"):
        sources.load(config(tmp_path / "blank"), "train")
    with pytest.raises(DataError, match=r"'valid'.*empty: give files to data.valid"):
        sources.load(config(write(tmp_path / "short", "one line\n")), "valid")
