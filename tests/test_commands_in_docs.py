"""Test that the real parser takes each `heedful ...` command of README, RESULTS, docs and examples.

Nothing is trained: the test ends where a command has parsed its flags.
"""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from heedful import own_code
from heedful.data.config import DataConfig
from heedful.data.objectives import OBJECTIVES
from heedful.model.config import ModelConfig
from heedful.train import cli, hosts
from heedful.train.cli import commands, flags, prepare
from heedful.train.config import DecodeConfig, TrainConfig, TrainError
from heedful.train.conversion import generation_config, source
from heedful.train.inspection import cores
from heedful.train.run import Run

ROOT = Path(__file__).parent.parent
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *(path for folder in ("docs", "examples") for path in sorted((ROOT / folder).rglob("*.md"))),
]
NOT_SHELL = ("python", "json", "yaml", "toml", "text")
PLACEHOLDERS = {
    r"\bCONFIG\|RUN\b|\bCONFIG\b": "translate_tiny",
    r"(?<![\w/])RUN\b": "runs/run",
    r"\b(?:FOLDER|DIR)\b": "folder",
    r"\bFILE\b": "file.yaml",
    r":ROW\b": ":heads_1",
    r"\bHOST:PORT\b": "localhost:1234",
    r"\b[NMI]\b|\$\w+": "1",
}
EXPERIMENT = """
from heedful.configs.base import Experiment, load
ROWS = {"heads_1": 1, "row": 2, "small": 3}
get_config = lambda row=None: load("translate_tiny")[0]
"""


def commands_in(page: str) -> Iterator[list[str]]:
    """Yield the words after `heedful` of each command in a page of Markdown."""
    text = ""
    for number, part in enumerate(re.split(r"^ *```", page, flags=re.MULTILINE)):
        if number % 2 == 0:
            text += part
        elif not part.startswith(NOT_SHELL):
            for line in part.partition("\n")[2].replace("\\\n", " ").splitlines():
                yield from _commands(line)
    for code in re.findall(r"`([^`]+)`", text):
        if code.startswith("heedful "):
            yield from _commands(" ".join(code.split()))


def _commands(line: str) -> Iterator[list[str]]:
    """Yield the commands in a line for a shell, also those within quotes."""
    if not re.search(r"\bheedful [a-z-]", line):  # Output, or heedful COMMAND.
        return
    for pattern, value in PLACEHOLDERS.items():
        line = re.sub(pattern, value, line)
    line = re.sub(r"\[[^\]]*\]| \.\.\.", "", line)  # Optional parts.
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split = True
    words: list[str] | None = None
    for word in [*lexer, ";"]:
        if set(word) <= set("|&;<>"):
            if words:
                yield words
            words = None
        elif words is not None:
            words.append(word)
        elif word.rpartition("/")[2] == "heedful":
            words = []
        elif " " in word:
            yield from _commands(word)


CASES = sorted(
    {(path.name, tuple(words)) for path in PAGES for words in commands_in(path.read_text("utf-8"))}
)


class Parsed(Exception):
    """Raised when a command has parsed its flags."""


@pytest.fixture
def stand_ins(monkeypatch, tmp_path):
    """Let each command end after its flags; each run exists, and so does all own code."""
    parse = flags.parse

    def parse_only(*arguments: Any) -> None:
        parse(*arguments)
        raise Parsed

    train = TrainConfig(decode=DecodeConfig(beam=1))
    run = Run(Path("runs/run"), ModelConfig(), DataConfig(), train)
    opened = SimpleNamespace(
        model=ModelConfig(architecture="decoder_only"), tokenizer=SimpleNamespace(ends=()),
        generation={}, generation_file=None, label="imported",
    )  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(flags, "parse", parse_only)
    monkeypatch.setattr(Run, "open", classmethod(lambda cls, directory: run))
    monkeypatch.setattr(own_code, "resolve", lambda *arguments: OBJECTIVES["translation"])
    monkeypatch.setattr(source, "open_source", lambda *arguments: opened)
    monkeypatch.setattr(generation_config, "follow", lambda *args: (DecodeConfig(beam=1), [], []))
    monkeypatch.setattr(commands, "with_pretrained_body", lambda model, *arguments: model)
    monkeypatch.setattr(cores, "table", lambda: "")
    monkeypatch.setattr(cli, "_join", lambda arguments: flags.take(arguments, hosts.FLAGS)[1])
    for module in (commands, prepare):
        monkeypatch.setattr(module, "keep_compiled", lambda: None)
    return tmp_path


def try_parser(words: list[str], folder: Path) -> None:
    """Raise an error if the command has an unknown name or flag."""
    if len(words) == 1:  # The name of a command, in a sentence.
        assert f"\n  {words[0]} " in cli.USAGE or words[0] == "--version"
        return
    for word in words:
        name = re.sub(r"(\.py):\w+$", r"\1", word)
        path = folder / name
        if path.suffix in (".py", ".yaml", ".json"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(EXPERIMENT if path.suffix == ".py" else "{}")
        elif word.startswith("runs/"):
            path.mkdir(parents=True, exist_ok=True)
    try:
        cli._dispatch(words)
    except Parsed:
        return
    except SystemExit as end:  # The help.
        assert not end.code


@pytest.mark.parametrize(
    ("page", "words"), CASES, ids=lambda x: x if isinstance(x, str) else " ".join(x)[:70]
)
def test_a_command_in_the_docs_is_one(page: str, words: tuple[str, ...], stand_ins):
    try_parser(list(words), stand_ins)


def test_commands_are_found_wherever_they_stand():
    page = """
Use `heedful plan CONFIG --search`, or `heedful COMMAND`.
```
heedful train a \\
  --x 1    # a comment
echo "Hello, world" | heedful translate RUN > out.txt
srun --nodes 4 heedful train b & wait
ssh host --command="cd heedful && .venv/bin/heedful train c --y 'two words'"
  heedful    Das Passwort
```
```python
heedful train d
```
"""
    assert sorted(commands_in(page)) == [
        ["plan", "translate_tiny", "--search"],
        ["train", "a", "--x", "1"],
        ["train", "b"],
        ["train", "c", "--y", "two words"],
        ["translate", "runs/run"],
    ]


@pytest.mark.parametrize(
    "line",
    [
        "heedful trian translate_tiny",
        "heedful train transalte_tiny",
        "heedful train translate_tiny --train.stesp 3",
        "heedful train translate_tiny --train.steps many",
        "heedful evaluate RUN --deocde.beam 1",
        "heedful train vaswani_table3:heads_3",
    ],
)
def test_a_misspelt_command_fails(line: str, stand_ins):
    (words,) = _commands(line)
    with pytest.raises(TrainError):
        try_parser(words, stand_ins)
