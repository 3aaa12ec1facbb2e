"""Test wrong and damaged inputs: exit code 2 and one line, or a right result (`make test-slow`)."""

import base64
import dataclasses
import gzip
import json
import math
import shutil
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import fuzz
import pytest
import toy
from fuzz import Case, Outcome

from heedful.train.cli.arguments import DecodeArguments, TrainArguments

pytestmark = pytest.mark.slow

VALUES = {
    int: ("0", "-1", "1000000000", "nan", "inf", "", "text"),
    float: ("0", "-1", "1e9", "nan", "inf", "", "text"),
}


def explain(failures: list[tuple[Case, str]]) -> str:
    return f"{len(failures)} cases fail:\n" + "\n".join(f"{c.name}: {why}" for c, why in failures)


# Flags ------------------------------------------------------------------------------------------


def numeric(kind: type, prefix: str = "--") -> Iterator[tuple[str, type]]:
    """Yield each numeric flag of a config, and its type."""
    hints = typing.get_type_hints(kind)
    for entry in dataclasses.fields(kind):
        flag, hint = prefix + entry.name.replace("_", "-"), hints[entry.name]
        if dataclasses.is_dataclass(hint):
            yield from numeric(typing.cast(type, hint), f"{flag}.")
            continue
        found = {hint, *typing.get_args(hint)} & {int, float}
        if found:
            yield flag, found.pop()


# The context in which a flag has an effect: the kind of data, and other flags.
CONTEXTS = {
    "--model.attention.performer.": ("causal", "--model.attention.core performer"),
    "--model.attention.linformer.": (
        "labels",
        "--model.attention.core linformer --model.attention.linformer.rank 4"
        " --model.attention.linformer.max-length 16",
    ),
    "--model.attention.global-tokens": (
        "labels", "--model.attention.core longformer --model.attention.window 4"
    ),
    "--model.attention.dilation": ("causal", "--model.attention.window 4"),
    "--model.positions.rotary.": (
        "causal",
        "--model.positions.kind rotary --model.positions.rotary.scaling llama3"
        " --model.positions.rotary.factor 2",
    ),
    "--model.positions.max-length": ("causal", "--model.positions.kind learned"),
    "--model.positions.": ("causal", "--model.positions.kind relative"),
    "--model.lora.": ("causal", "--model.lora.rank 2"),
    "--model.encoder-layers": ("pairs", ""),
    "--model.head.": ("labels", ""),
    "--model.type-vocab-size": ("labels", ""),
    "--data.listops.": (
        "listops", "--data.listops.examples 64 --data.listops.held-out 16"
        " --data.listops.min-length 3 --data.listops.max-length 14",
    ),
    "--data.noise": ("masked", ""),
    "--data.span-length": ("spans", ""),
    "--train.optimizer.initial-lr": ("causal", "--train.optimizer.warmup-steps 1"),
    "--train.optimizer.final-lr": ("causal", "--train.optimizer.schedule cosine"),
    "--train.optimizer.layer-decay": ("labels", ""),
    "--train.optimizer.head-lr": ("labels", ""),
}  # fmt: skip
DECODES = {
    "--decode.length": "--decode.beam 2",
    "--decode.top": "--decode.temperature 1",
    "--decode.min-p": "--decode.temperature 1",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, list[str]]:
    """Return the flags of runs of one step, by the kind of data."""
    folder = tmp_path_factory.mktemp("data")
    text, table = toy.files(toy.write_text(folder)), toy.files(toy.write_table(folder))
    kinds = {
        "causal": ("shakespeare_char", text),
        "masked": ("bert_tiny", text),
        "spans": ("t5_tiny", text),
        "labels": ("sentiment_tiny", table),
        "listops": ("listops_tiny", []),
        "pairs": ("translate_tiny", toy.write_corpus(folder)),
    }
    return {
        kind: [
            *toy.flags(flags, Path("RUN"), steps=1, every=1, config=config),
            "--train.optimizer.warmup-steps", "0", "--train.samples", "0",
        ]
        for kind, (config, flags) in kinds.items()
    }  # fmt: skip


def train_cases(data: dict[str, list[str]], folder: Path) -> Iterator[Case]:
    for flag, kind in numeric(TrainArguments):
        contexts = (found for prefix, found in CONTEXTS.items() if flag.startswith(prefix))
        name, more = next(contexts, ("causal", ""))
        for value in VALUES[kind]:
            run = folder / f"{flag.strip('-')}={value or 'empty'}"
            arguments = [str(run) if a == "RUN" else a for a in data[name]]
            stop = str(run / "metrics.jsonl") if (flag, value) == STOPPED else ""
            yield Case(
                name=f"{flag}={value}",
                arguments=["train", *arguments, *more.split(), f"{flag}={value}"],
                stop=stop,
            )


STOPPED = ("--train.steps", "1000000000")


def finite(value: object) -> bool:
    if isinstance(value, dict):
        return all(map(finite, value.values()))
    return not isinstance(value, float) or math.isfinite(value)


def judge_training(case: Case, outcome: Outcome) -> str:
    """Return a description of the error; empty if the run was refused or gave finite numbers."""
    if outcome.problem:
        return outcome.short
    if case.stop:
        return "" if outcome.code == 75 else outcome.short
    if outcome.code == 0:
        run = Path(case.arguments[case.arguments.index("--run-dir") + 1])
        result = json.loads((run / "result.json").read_text())
        return "" if finite(result) else f"code 0 with {result}"
    return "" if outcome.is_refusal else outcome.short


def test_every_numeric_flag_is_refused_in_one_line_or_trains(data, tmp_path):
    failures = [
        (case, wrong)
        for case, outcome in fuzz.run_all(train_cases(data, tmp_path))
        if (wrong := judge_training(case, outcome))
    ]
    assert not failures, explain(failures)


def test_every_flag_of_decoding_is_refused_in_one_line_or_writes(run, tmp_path):
    def cases() -> Iterator[Case]:
        for flag, kind in numeric(DecodeArguments):
            more = next((m for prefix, m in DECODES.items() if flag.startswith(prefix)), "")
            for value in VALUES[kind]:
                arguments = ["generate", str(run), "red cat", "--decode.max-tokens", "3"]
                yield Case(
                    name=f"{flag}={value}", arguments=[*arguments, *more.split(), f"{flag}={value}"]
                )

    failures = [
        (case, outcome.short)
        for case, outcome in fuzz.run_all(cases())
        if outcome.code != 0 and not outcome.is_refusal
    ]
    assert not failures, explain(failures)


# Files of a run ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Train one step of a model that transformers has too, and export the run."""
    folder = tmp_path_factory.mktemp("original")
    text = toy.files(toy.write_text(folder))
    flags = toy.flags(text, folder / "run", steps=1, every=1, config="gpt2_small")
    flags += [
        "--data.tokenizer.kind", "chars", "--train.average-last", "1",
        "--train.optimizer.warmup-steps", "0",
        "--model.dtype", "float32", "--model.positions.max-length", "64",
    ]  # fmt: skip
    (folder / "flags.json").write_text(json.dumps(flags))
    cases = [
        Case(name="train", arguments=["train", *flags]),
        Case(name="export", arguments=["export", str(folder / "run"), str(folder / "hf")]),
    ]
    for case in cases:  # The export needs the run.
        ((_, outcome),) = fuzz.run_all([case])
        assert outcome.code == 0, (case.name, outcome)
    return folder / "run"


def flipped(content: bytes, rng: Random) -> bytes:
    changed = bytearray(content)
    for _ in range(1 + len(content) // 2000):
        if changed:
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


DAMAGES: dict[str, Callable[[bytes, Random], bytes]] = {
    "emptied": lambda content, rng: b"",
    "truncated": lambda content, rng: content[: rng.randrange(len(content) or 1)],
    "flipped": flipped,
    "replaced": lambda content, rng: rng.randbytes(len(content)),
}
OF_JSON: dict[str, Callable[[bytes, Random], bytes]] = {
    "flipped again": flipped,
    "an empty list": lambda content, rng: b"[]",
    "of many levels": lambda content, rng: b"[" * 99_999,
}
COMMANDS: dict[str, Callable[[Path], list[str]]] = {
    "evaluate": lambda run: ["evaluate", str(run)],
    "generate": lambda run: ["generate", str(run), "red cat", "--decode.max-tokens", "9"],
    "attention": lambda run: ["attention", str(run), "red", "--output", str(run.parent / "a.png")],
    "export": lambda run: ["export", str(run), str(run.parent / "hf")],
    "train": lambda run: ["train", *flags_of(run)],
}


def flags_of(run: Path) -> list[str]:
    flags = json.loads((run.parent / "flags.json").read_text())
    flags[flags.index("--run-dir") + 1] = str(run)
    return flags


def made(case: Case, outcome: Outcome, folder: Path) -> object:
    """Return the result of a command, which must be the same for other copies of the run."""
    command = case.arguments[0]
    if command == "generate":
        return outcome.out
    if command == "attention":
        return (folder / "a.png").read_bytes()
    if command == "export":
        return {path.name: path.read_bytes() for path in (folder / "hf").iterdir()}
    return json.loads((folder / "run" / "result.json").read_text())


def copies(run: Path, folder: Path, part: str) -> Iterator[tuple[str, Path, Path]]:
    """Yield (name of the damage, damaged copy of the part, its folder) for each file and damage."""
    rng = Random(0)
    files = sorted(path.relative_to(run.parent / part) for path in (run.parent / part).rglob("*"))
    files = [file for file in files if (run.parent / part / file).is_file()]
    for file in files:
        is_json = file.suffix in (".json", ".jsonl")
        for damage, change in (DAMAGES | (OF_JSON if is_json else {})).items():
            home = folder / f"{len(list(folder.iterdir()))}"
            copy = Path(shutil.copytree(run.parent / part, home / part))
            shutil.copy(run.parent / "flags.json", home)
            (copy / file).write_bytes(change((copy / file).read_bytes(), rng))
            yield f"{file} {damage}", copy, home


def test_a_damaged_file_of_a_run_is_named_or_changes_nothing(run, tmp_path):
    whole = Path(shutil.copytree(run, tmp_path / "whole" / "run"))
    shutil.copy(run.parent / "flags.json", tmp_path / "whole")
    cases = [Case(name=name, arguments=make(whole)) for name, make in COMMANDS.items()]
    expected = {}
    for case, outcome in fuzz.run_all(cases):
        assert outcome.code == 0, (case.name, outcome)
        expected[case.name] = made(case, outcome, whole.parent)
    (tmp_path / "copies").mkdir()
    homes, cases = [], []
    for number, (what, copy, home) in enumerate(copies(run, tmp_path / "copies", "run")):
        command = [*COMMANDS][number % len(COMMANDS)]
        cases.append(Case(name=f"{command}: {what}", arguments=COMMANDS[command](copy)))
        homes.append(home)
    failures = []
    for (case, outcome), home in zip(fuzz.run_all(cases), homes, strict=True):
        if outcome.code == 0 and not outcome.problem:
            # Nothing records that a changed config.json does not belong to the run.
            is_other = "config.json flipped" in case.name
            if not is_other and made(case, outcome, home) != expected[case.arguments[0]]:
                failures.append((case, f"another result, and only: {outcome.short}"))
        elif not outcome.is_refusal:
            failures.append((case, outcome.short))
    assert not failures, explain(failures)


# Readers ----------------------------------------------------------------------------------------

TEXT = "a red cat sings\nthe small bird, grün\n"
GOOD = {
    "documents": ("a.txt", TEXT),
    "parallel": ("a.en", TEXT),
    "pairs": ("a.tsv", "en\tde\nred\trot\ncat\tkatze\n"),
    "labels": ("a.csv", 'text,label\nred cat,a\n"a ""blue"" dog",b\n'),
    "numbers": ("a.jsonl", '{"text": "red cat", "label": 1.5}\n{"text": "dog", "label": 2}\n'),
    "tokenizer": ("vocab.txt", "[PAD]\n[UNK]\n[CLS]\n[SEP]\na\nred\ncat\n##s\n"),
}
HALF = '{"text": "\\ud800", "label": "\\udfff", "en": "\\ud800", "de": "\\udfff"}\n'
CONTENTS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda good: b"",
    "blank": lambda good: b"\n\n  \n",
    "zeros": lambda good: bytes(99),
    "a mark": lambda good: b"\xef\xbb\xbf",
    "marked": lambda good: b"\xef\xbb\xbf" + good,
    "gzip": lambda good: gzip.compress(good, mtime=0),
    "UTF-16": lambda good: good.decode().encode("utf-16"),
    "UTF-16 without a mark": lambda good: good.decode().encode("utf-16-le"),
    "Latin-1": lambda good: good + "grün".encode("latin-1"),
    "carriage returns": lambda good: good.replace(b"\n", b"\r"),
    "Windows": lambda good: good.replace(b"\n", b"\r\n"),
    "blank lines": lambda good: good + b"\n\n",
    "levels": lambda good: good + b"[" * 99_999,
    "a large number": lambda good: good + b'{"text": "a", "label": ' + b"9" * 5000 + b"}",
    "halves": lambda good: HALF.encode(),
    "surrogates": lambda good: good + b"\xed\xa0\x80\n",
    "columns": lambda good: b"\t".join(b"c%d" % i for i in range(99_999)),
    "a long line": lambda good: good + b"red " * 99_999,
}


def reader_cases(run: Path, folder: Path) -> Iterator[Case]:
    rng = Random(0)
    for reader, (name, text) in GOOD.items():
        contents = {what: make(text.encode()) for what, make in CONTENTS.items()}
        contents |= {f"random {i}": rng.randbytes(99) for i in range(9)}
        contents |= {f"flipped {i}": flipped(text.encode(), rng) for i in range(30)}
        for what, content in contents.items():
            home = folder / f"{reader} {what}"
            home.mkdir()
            (home / name).write_bytes(content)
            (home / "b.de").write_text(TEXT)
            paths = str(home / name) + (f",{home / 'b.de'}" if reader == "parallel" else "")
            yield Case(name=f"{reader}: {what}", reader=reader, arguments=[paths])
    for what, copy, _ in copies(run, folder, "hf"):
        yield Case(name=f"model: {what}", reader="model", arguments=[str(copy)])
    text = TEXT.encode()
    contents = {what: make(text) for what, make in CONTENTS.items() if what != "a long line"}
    contents |= {f"random {i}": rng.randbytes(20) for i in range(5)}
    for what, content in contents.items():
        yield Case(
            name=f"standard input: {what}",
            arguments=["generate", str(run), "--decode.max-tokens", "3"],
            stdin=base64.b64encode(content).decode(),
        )


def wrong(case: Case, outcome: Outcome) -> str:
    """Return a description of the error; empty if the input was refused or read correctly."""
    if outcome.problem or outcome.code != 0:
        return "" if outcome.is_refusal else outcome.short
    if case.stdin:
        text = base64.b64decode(case.stdin).removeprefix(b"\xef\xbb\xbf").decode()
        lines = text.removesuffix("\n").split("\n") if text else []
        return "" if len(outcome.out.splitlines()) == len(lines) else f"{outcome.out!r}"
    if case.reader not in ("documents", "parallel"):
        return ""
    found = json.loads(outcome.out)
    text = Path(case.arguments[0].split(",")[0]).read_bytes().decode("utf-8-sig")
    if case.reader == "documents":
        expected = [{"text": text.replace("\r\n", "\n")}]
        return "" if found == expected else f"{found}"
    lines = text.removesuffix("\n").split("\n")
    return "" if [row["source"] for row in found] == [s.rstrip("\r") for s in lines] else f"{found}"


def test_whatever_is_read_is_named_or_read_right(run, tmp_path):
    cases = list(reader_cases(run, tmp_path))
    failures = [
        (case, why) for case, outcome in fuzz.run_all(cases) if (why := wrong(case, outcome))
    ]
    assert not failures, explain(failures)
