"""Test tables of examples: CSV, TSV and JSON lines, their columns, labels and errors."""

import json

import pytest

from heedful.data import sources, tables
from heedful.data.config import DataConfig
from heedful.data.errors import DataError
from heedful.data.tables import Table


def write(path, text):
    path.write_bytes(text.encode())
    return str(path)


def config(*train, objective="classification", **more):
    """Return a config in which the table is each of the splits, so that nothing is held out."""
    more = {"valid": train, "test": train} | more
    return DataConfig(source="files", objective=objective, train=train, **more)


def load(*train, split="train", **more):
    return list(sources.load(config(*train, **more), split))


ROWS = [("good, they said", "pos"), ('a "bad" one', "neg"), ("grün\u2028x", "neg")]
EXPECTED = [{"text": text, "label": label} for text, label in ROWS]


def test_tsv_is_not_quoted(tmp_path):
    rows = "".join(f"{n}\t{label}\t{text}\r\n" for n, (text, label) in enumerate(ROWS))
    path = write(tmp_path / "a.TSV", "\ufeffid\tlabel\ttext\r\n" + rows)
    assert load(path) == EXPECTED


def test_csv_cells_may_have_commas_quotes_and_line_ends(tmp_path):
    path = write(
        tmp_path / "a.csv",
        '\ufefftext,"the\nlabel"\n"good, they said",pos\n"a ""bad"" one",neg\n'
        '"two\nlines\r\n",pos\nplain,neg',
    )
    examples = sources.load(config(path, label="the\nlabel"), "train")
    assert list(examples) == [
        {"text": "good, they said", "label": "pos"},
        {"text": 'a "bad" one', "label": "neg"},
        {"text": "two\nlines\r\n", "label": "pos"},
        {"text": "plain", "label": "neg"},
    ]
    assert examples[-1] == examples[3]
    with pytest.raises(IndexError):
        examples[4]


def test_jsonl_labels_may_be_numbers(tmp_path):
    labels = ["pos", 1, 1.5, True]
    rows = [{"label": label, "more": [], "text": f"ü {label}"} for label in labels]
    path = write(tmp_path / "a.jsonl", "\n".join(json.dumps(row) for row in rows))
    assert [e["label"] for e in load(path)] == ["pos", "1", "1.5", "true"]
    assert load(path)[0]["text"] == "ü pos"


@pytest.mark.parametrize(
    ("columns", "fields"),
    [
        (["label", "text"], {"text": "text"}),
        (["sentence", "label"], {"text": "sentence"}),
        (["label", "sentence2", "sentence1"], {"text": "sentence1", "pair": "sentence2"}),
        (["premise", "hypothesis", "label"], {"text": "premise", "pair": "hypothesis"}),
        (["question", "sentence", "label"], {"text": "question", "pair": "sentence"}),
        (["question1", "question2", "label"], {"text": "question1", "pair": "question2"}),
    ],
)
def test_usual_names(tmp_path, columns, fields):
    path = write(tmp_path / "a.tsv", "\t".join(columns) + "\n" + "\t".join(columns) + "\n")
    assert sources.fields(config(path)) == tuple(fields)
    assert load(path) == [fields | {"label": "label"}]


def test_columns_and_label_can_be_named(tmp_path):
    path = write(tmp_path / "a.tsv", "text\tb\tlabel\tc\nT\tB\tL\tC\n")
    named = config(path, columns=("c", "b"), label="text")
    assert sources.fields(named) == ("text", "pair")
    assert list(sources.load(named, "train")) == [{"text": "C", "pair": "B", "label": "T"}]


def test_translation_by_language_or_role(tmp_path):
    languages = write(tmp_path / "a.tsv", "source\tde\ttarget\ten\nweb\tHaus\tnews\thouse\n")
    roles = write(tmp_path / "b.csv", "target,source\nHaus,house\n")
    for path in (languages, roles):
        assert load(path, objective="translation") == [{"source": "house", "target": "Haus"}]
    swapped = load(languages, objective="translation", columns=("de", "en"))
    assert swapped == [{"source": "Haus", "target": "house"}]


def test_columns_make_documents_of_a_table(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"body": "one"}\n{"body": "two"}\n')
    rows = load(path, objective="causal_lm", columns=("body",))
    assert rows == [{"text": "one"}, {"text": "two"}]
    with pytest.raises(DataError, match=r"data.train has the table .*a.jsonl: name its text col"):
        load(path, objective="causal_lm")  # Training must not read JSON as text.


def test_tables_are_joined_and_held_out_by_text(tmp_path):
    def table(name, rows):
        return write(tmp_path / name, "text\tlabel\n" + "".join(f"t{n}\t{n % 3}\n" for n in rows))

    paths = table("a.tsv", range(499)), table("b.tsv", range(300, 997))
    held = config(*paths, valid=(), test=(), holdout=0.1)
    parts = {split: list(sources.load(held, split)) for split in sources.SPLITS}
    everything = sorted(e["text"] for part in parts.values() for e in part)
    assert everything == sorted(f"t{n}" for n in [*range(499), *range(300, 997)])
    texts = {split: {e["text"] for e in part} for split, part in parts.items()}
    assert len(set.union(*texts.values())) == sum(map(len, texts.values()))
    assert all(60 < len(texts[split]) < 140 for split in ("valid", "test"))


@pytest.mark.parametrize(
    ("name", "text", "names"),
    [
        ("a.tsv", "text\tkind\na\tb\n", r"data.label is 'label', but .*a.tsv has .* text, kind"),
        ("a.tsv", "a\tlabel\na\tb\n", r"a.tsv has the columns a, label, not text"),
        ("a.tsv", "text\tlabel\na\tb\nc\n", r"a.tsv, line 3 has 1 columns, but the header has 2"),
        ("a.tsv", "text\tlabel\na\tb\tc\n", r"line 2 has 3 columns"),
        ("a.tsv", "text\tlabel\na\tb\n\nc\td\n", r"line 3 has 1 columns"),
        ("a.tsv", "text\tlabel\na\t \n", r"line 2 has no label in column 'label'"),
        ("a.tsv", "text\ttext\na\tb\n", r"has two columns 'text'"),
        ("a.csv", 'a,"b\nc"\nd,e\n', r"a.csv has the columns a, 'b\\nc', not text"),
        ("a.tsv", "", r"a.tsv is empty"),
        ("a.tsv", "\n", r"a.tsv has no header"),
        ("a.csv", 'text,label\n"a\nb",c\n"d",e,f\n', r"a.csv, line 4 has 3 columns"),
        ("a.csv", 'text,label\n"a"b,c\n', r"line 2 begins a row that is not CSV"),
        ("a.csv", 'text,label\na,b\n"a,c\nd,e\n', r"line 3 begins a row that is not CSV"),
        ("a.jsonl", '{"text": "a", "label": "b"}\n{"text": "a"}\n', r"line 2 has no 'label', only"),
        ("a.jsonl", '{"text": "a", "label": "b"}\n{"text"\n', r"line 2 is not JSON \("),
        ("a.jsonl", '{"text": "a", "label": "b"}\n[1]\n', r"line 2 is not a JSON object"),
        ("a.jsonl", '["text", "label"]\n', r"line 1 is not a JSON object"),
        ("a.jsonl", "null\n", r"line 1 is not a JSON object"),
        ("a.jsonl", "text\n", r"a.jsonl, line 1 is not JSON \("),
        ("a.jsonl", '{"text": 5, "label": "b"}\n', r"line 1 has 5 as 'text'"),
        ("a.jsonl", '{"text": "a", "label": null}\n', r"line 1 has no label"),
        ("a.jsonl", '{"text": "a", "label": {}}\n', r"line 1 has {} as 'label'"),
        ("a.jsonl", '{"text": "\\ud83d", "label": 1}\n', r"line 1 has half of a surrogate pair"),
        ("a.jsonl", '{"text": "a", "label": NaN}\n', r"line 1 has NaN as 'label': give a class"),
        ("a.jsonl", '{"text": "a", "label": -1e999}\n', r"line 1 has -Infinity as 'label'"),
        ("a.jsonl", '{"text": NaN, "label": "b"}\n', r"line 1 has NaN as 'text': give a text"),
        ("a.jsonl", '{"text": %s}\n' % ("[" * 99_999), r"line 1 is not JSON \(it has too many"),
        (
            "a.jsonl",
            '{"text": "a", "label": %s}\n' % ("9" * 5000),
            r"line 1 is not JSON \(it has a num",
        ),
        (
            "a.jsonl",
            '{"text": "a", "label": "b"}\n{"n": %s}' % ("9" * 5000),
            r"line 2 is not JSON \(it has a num",
        ),
        ("a.jsonl", '{"text": "a", "label": "b"}\n\n{}\n', r"line 2 is not JSON \("),
        ("a.tsv", "text\tlabel\ra\tb\r", r"a.tsv, line 1 has line ends of \\r alone: convert them"),
        ("a.csv", "text,label\ra,b\r", r"a.csv, line 1 has line ends of \\r alone: convert them"),
        (
            "a.csv",
            "text,label\na,b\rc,d\r",
            r"a.csv, line 2 has line ends of \\r alone: convert them",
        ),
        ("a.txt", "text\tlabel\n", r"a.txt is not a table \(.tsv, .csv, .jsonl\)"),
    ],
)
def test_broken_tables_name_file_line_and_what_there_is(tmp_path, name, text, names):
    path = write(tmp_path / name, text)
    with pytest.raises(DataError, match=names) as error:
        load(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("objective", ["classification", "regression"])
def test_labels_of_json_that_are_no_numbers_of_json_are_refused(tmp_path, objective):
    path = write(tmp_path / "a.jsonl", '{"text": "a", "label": 1}\n{"text": "b", "label": NaN}\n')
    with pytest.raises(DataError, match=r"a.jsonl, line 2 has NaN as 'label'"):
        load(path, objective=objective)


@pytest.mark.parametrize("end", ["\n", "\n\n", "\r\n \r\n", "\n\n\n  "])
@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("a.tsv", ("text\tlabel", "a\tb", "\tc")),
        ("a.csv", ("text,label", "a,b", ",c")),
        ("a.jsonl", ('{"text": "a", "label": "b"}', '{"text": "", "label": "c"}')),
    ],
)
def test_blank_lines_at_the_end_are_no_rows(tmp_path, name, lines, end):
    path = write(tmp_path / name, "\n".join(lines) + end)
    assert load(path) == [{"text": "a", "label": "b"}, {"text": "", "label": "c"}]


def test_a_blank_line_is_a_row_where_a_tsv_has_one_column(tmp_path):
    path = write(tmp_path / "a.tsv", "text\na\n\n")
    assert load(path, objective="causal_lm", columns=("text",)) == [{"text": "a"}, {"text": ""}]


@pytest.mark.parametrize("name", ["a.tsv", "a.csv", "a.jsonl"])
def test_an_error_lists_few_of_many_columns(tmp_path, name):
    names = [f"column{i}" for i in range(100_000)]
    header = {"a.tsv": "\t".join(names), "a.csv": ",".join(names)}.get(name)
    path = write(tmp_path / name, header or json.dumps(dict.fromkeys(names, "")))
    for more in ({}, {"columns": ("text",)}, {"columns": ("column1",), "label": "kind"}):
        with pytest.raises(DataError, match=r"column11, \.\.\. \(100,000 in all\)") as error:
            load(path, **more)
        assert len(str(error.value)) < 600


def test_an_error_shows_the_beginning_of_a_long_value(tmp_path):
    rows = [{"text": list(range(99_999)), "label": "b"}, {"text": "a", "label": "x" * 99_999}]
    for row, objective in zip(rows, ("classification", "regression"), strict=True):
        path = write(tmp_path / "a.jsonl", json.dumps(row))
        with pytest.raises(DataError, match=r"line 1 has .*\.\.\.") as error:
            load(path, objective=objective)
        assert len(str(error.value)) < 400


def test_a_cell_may_be_longer_than_the_131072_characters_that_python_reads_unless_told(tmp_path):
    path = write(tmp_path / "a.csv", f"text,label\n{'a ' * 80_000},b\n")
    assert len(load(path)[0]["text"]) == 160_000


def test_invalid_utf8_names_the_line(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_bytes("text\tlabel\na\tb\nschön\tb\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"a.tsv, line 3: byte 4 .*0xf6.*UTF-8"):
        load(str(path))


@pytest.mark.parametrize("label", ["high", "nan", "1e999", ""])
def test_regression_needs_finite_numbers(tmp_path, label):
    path = write(tmp_path / "a.tsv", f"sentence\tscore\na\t-1.5\nb\t{label}\n")
    with pytest.raises(DataError, match=r"a.tsv, line 3 has (the|no) label"):
        load(path, objective="regression")
    fine = write(tmp_path / "b.tsv", "sentence\tscore\na\t-1.5\n")
    assert load(fine, objective="regression") == [{"text": "a", "label": "-1.5"}]


def test_all_tables_have_the_columns_of_the_first(tmp_path):
    train = write(tmp_path / "train.tsv", "text\tlabel\na\tb\n")
    valid = write(tmp_path / "valid.tsv", "sentence\tlabel\na\tb\n")
    with pytest.raises(DataError, match=r"valid.tsv has no column 'text', only sentence, label"):
        load(train, valid=(valid,), split="valid")


@pytest.mark.parametrize(
    ("objective", "columns", "names"),
    [
        ("classification", ("a",), r"data.columns has 'a', but .* text, label"),
        ("translation", ("text",), r"translation reads 2"),
        ("causal_lm", ("text", "label"), r"causal_lm reads 1"),
    ],
)
def test_named_columns_must_exist_and_fit(tmp_path, objective, columns, names):
    path = write(tmp_path / "a.tsv", "text\tlabel\na\tb\n")
    with pytest.raises(DataError, match=names):
        load(path, objective=objective, columns=columns)


def test_two_tables_are_no_parallel_text(tmp_path):
    path = write(tmp_path / "a.tsv", "en\tde\na\tb\n")
    with pytest.raises(DataError, match="give one table, or two files of plain lines"):
        load(path, path, objective="translation")


def test_rows_are_read_from_disk_when_asked_for(tmp_path, monkeypatch):
    path = write(tmp_path / "a.csv", "text,label\n" + '"x\ny",1\n' * 7)
    table = Table(path, {"text": "text"}, numbers=False)
    taken = []
    rows = tables._rows
    monkeypatch.setattr(
        tables, "_rows", lambda path, lines: taken.extend(lines) or rows(path, lines)
    )
    assert table[5] == {"text": "x\ny"}
    assert taken == ['"x\ny",1\n']
