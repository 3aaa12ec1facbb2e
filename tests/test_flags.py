"""Test flags of dataclasses: early flags are found before parsing, and a mistake is one line."""

import dataclasses
import os
import pty
import re
import subprocess
import sys
from dataclasses import dataclass, field

import pytest

from heedful.model.config import LayerConfig, ModelConfig, PositionConfig, RotaryConfig
from heedful.train.cli.flags import early, parse
from heedful.train.cli.usage import USAGE
from heedful.train.config import OptimizerConfig, TrainConfig
from heedful.train.errors import TrainError


@dataclass(frozen=True, kw_only=True)
class Arguments:
    train: TrainConfig = field(default_factory=TrainConfig)
    stride: int | None = None


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        ([], None),
        (["--init-from", "a"], "a"),
        (["--init-from=a=b"], "a=b"),
        (["--init_from", "a"], "a"),
        (["--init-from", "a", "--init-from", "b"], "b"),  # as the parser does
        (["--train.steps", "3", "--init-from", "a", "--run-dir", "b"], "a"),
        (["--init-from-nowhere", "a"], None),
        (["--init-from"], None),
    ],
)
def test_a_flag_that_decides_about_others_is_found_early(arguments, value):
    assert early(arguments, "--init-from") == value


def test_flags_change_what_they_name_and_nothing_else():
    flags = ["--train.optimizer.freeze", "embedding", "blocks.0", "--stride", "7"]
    expected = TrainConfig(optimizer=OptimizerConfig(freeze=("embedding", "blocks.0")))
    assert parse(Arguments(), flags, "x") == Arguments(train=expected, stride=7)
    assert parse(Arguments(), [], "x") == Arguments()


PATTERN = (
    LayerConfig(window=16, rotary=RotaryConfig(base=1e6, scaling="linear", factor=8)),
    LayerConfig(window="all", positions=False),
    LayerConfig(),
)


def test_a_layer_of_a_pattern_is_a_word_that_says_what_differs():
    words = [str(layer) for layer in PATTERN]
    assert words == [
        "window=16,rotary.base=1000000.0,rotary.scaling=linear,rotary.factor=8",
        "window=all,positions=False",
        "model",
    ]
    model = ModelConfig(positions=PositionConfig(kind="rotary"))
    assert parse(model, ["--pattern", *words], "x") == dataclasses.replace(model, pattern=PATTERN)
    given = dataclasses.replace(model, pattern=PATTERN)
    assert (parse(given, [], "x"), parse(given, ["--pattern"], "x")) == (given, model)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("16", "16: give field=value, such as window=16, or model"),
        ("width=3", "pattern.width is unknown"),
        ("window=wide", "pattern.window = 'wide': it must be of type int"),
        ("window=-1", "pattern.window = -1: give at least 0, all, or None"),
        ("rotary.base=0", "positions.rotary.base must be positive, not 0"),
        ("rotary=3", "pattern.rotary is not an object"),
        ("rotary=3,rotary.base=2", "rotary"),
    ],
)
def test_a_layer_that_cannot_be_is_named(word, said):
    with pytest.raises(TrainError) as error:
        parse(ModelConfig(), ["--pattern", "model", word], "heedful x")
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--train.stesp", "3"], ["--train.stesp", "--train.steps"]),
        (["--train.steps", "many"], ["--train.steps", "'many'"]),
        (["--train.steps"], ["--train.steps"]),
        (["--train.steps", "0"], ["train.steps must be positive, not 0"]),
        (["--train.metric", "rouge"], ["--train.metric", "rouge", "accuracy"]),
        (["--train.optimizer.freeze", "("], ["freeze has '(', which is no regular expression"]),
        (["stray"], ["stray"]),
    ],
)
def test_a_mistake_is_one_line(flags, words):
    with pytest.raises(TrainError) as error:
        parse(Arguments(), flags, "heedful x")
    message = str(error.value)
    assert "\n" not in message and not re.search("[─│╭╮╰╯]", message)
    assert "heedful x --help" in message
    for word in words:
        assert word in message, message


def test_the_help_fits_80_columns():
    assert max(map(len, USAGE.splitlines())) <= 80


@pytest.mark.parametrize("old", ["--train.optimizer.head-lr", "--train.optimizer.head_lr=2"])
def test_a_flag_of_before_names_its_new_name(old):
    with pytest.raises(
        TrainError, match=r"another name now: give --train.optimizer.head-lr-multip"
    ):
        parse(Arguments(), [old, "2"], "heedful x")


def test_a_mistake_is_one_line_in_a_terminal_too():
    """The parser colours its messages in a terminal."""
    ours, theirs = pty.openpty()
    code = (
        "from heedful.train.config import TrainConfig; from heedful.train.cli.flags import parse\n"
        "try: parse(TrainConfig(), ['--steps', 'many'], 'heedful x')\n"
        "except ValueError as error: print(repr(str(error)))"
    )
    environment = {**os.environ, "TERM": "xterm-256color"}
    subprocess.run([sys.executable, "-c", code], stdout=theirs, env=environment, check=True)
    said = os.read(ours, 10_000).decode()
    os.close(theirs)
    os.close(ours)
    assert said == (
        "\"Error parsing --steps: invalid literal for int() with base 10: 'many' ; it is --steps "
        "INT Number of updates of the parameters. (default: 10000) (heedful x --help lists all "
        'flags)"\r\n'
    )
