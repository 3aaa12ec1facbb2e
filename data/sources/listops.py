"""The source `listops`: nested operations on digits, whose value is one of ten classes; made here.

ListOps (arXiv:1804.06028) in the long form of Long Range Arena (arXiv:2011.04006 §2.2.1), with the
distribution of its generator (github.com/google-research/long-range-arena, data/listops.py).
`[MAX 2 9 [MIN 4 7 ] 0 ]` has the value 9. Each of its 10 words is a token; there are 15 in all:
`[MIN`, `[MAX`, `[MED`, `[SM`, `]` and the digits. There are no parentheses: the generator of Long
Range Arena writes some around every pair, and its pipeline takes them out again.
"""

import hashlib
import random
import sys
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path

from heedful.data import packages
from heedful.data.config import DataConfig, ListOpsConfig
from heedful.data.errors import DataError
from heedful.data.sources.source import Source
from heedful.data.tables import Table

OPERATION = 0.25  # Probability that an argument is an operation and not a digit.
PATIENCE = 100_000  # Draws in a row that may give nothing new that fits.


def _median(values: list[int]) -> int:
    """Of an even number of values, the mean of the middle two, rounded down."""
    values, n = sorted(values), len(values)
    return (values[(n - 1) // 2] + values[n // 2]) // 2


OPERATORS: list[tuple[str, Callable[[list[int]], int]]] = [
    ("[MIN", min),
    ("[MAX", max),
    ("[MED", _median),
    ("[SM", lambda values: sum(values) % 10),
]
DIGITS = [str(digit) for digit in range(10)]


class _TooLongError(Exception):
    pass


def load(config: DataConfig, split: str) -> Table:
    """Returns the expressions of a split, which are computed once for the same config.listops.

    No expression is there twice, in whatever split. Those of valid and test do not depend on the
    number of training examples, and fewer of these are the first of more.
    """
    name = "-".join(map(str, astuple(config.listops)))
    folder = packages.build_once(
        packages.cache() / "listops" / f"1-{name}", lambda draft: _write(config.listops, draft)
    )
    columns = {"text": "text", "label": "label"}
    return Table(str(folder / f"{split}.tsv"), columns, numbers=False)


def _write(config: ListOpsConfig, folder: Path) -> None:
    rng, seen = random.Random(config.seed), set()
    sizes = {"valid": config.held_out, "test": config.held_out, "train": config.examples}
    for split, size in sizes.items():
        with (folder / f"{split}.tsv").open("w") as file:
            file.write("label\ttext\n")
            for number in range(size):
                text, value = _new(rng, config, seen)
                file.write(f"{value}\t{text}\n")
                if number % 10_000 == 9_999:
                    message = f"listops: {number + 1:,} of {size:,} expressions for {split}"
                    print(message, file=sys.stderr, flush=True)


def _new(rng: random.Random, config: ListOpsConfig, seen: set[bytes]) -> tuple[str, int]:
    """Draws until an expression fits and has not been seen, which it is from then on."""
    for _ in range(PATIENCE):
        try:
            text, value = draw(rng, config)
        except _TooLongError:
            continue
        key = hashlib.sha256(text.encode()).digest()
        if config.min_length <= text.count(" ") and key not in seen:
            seen.add(key)
            return text, value
    raise DataError(
        f"{PATIENCE:,} draws gave no new expression of more than data.listops.min_length "
        f"{config.min_length} and fewer than data.listops.max_length {config.max_length} tokens: "
        "set them farther apart, ask for fewer examples, or raise data.listops.max_depth or "
        "data.listops.max_arguments"
    )


def draw(rng: random.Random, config: ListOpsConfig) -> tuple[str, int]:
    """Draws an operation and returns it with its value; raises _TooLongError at max_length tokens.

    Operators, their number of arguments and digits are uniform; digits are at most `max_depth`
    deep, the outermost operation being at depth 1.
    """
    uniform = rng.random  # The other methods may change with the version of Python.
    tokens: list[str] = []

    def operation(depth: int) -> int:
        name, evaluate = OPERATORS[int(uniform() * len(OPERATORS))]
        tokens.append(name)
        values = []
        for _ in range(2 + int(uniform() * (config.max_arguments - 1))):
            if depth + 1 < config.max_depth and uniform() < OPERATION:
                values.append(operation(depth + 1))
            else:
                digit = int(uniform() * 10)
                tokens.append(DIGITS[digit])
                values.append(digit)
        tokens.append("]")
        if len(tokens) >= config.max_length:
            raise _TooLongError
        return evaluate(values)

    value = operation(1)
    return " ".join(tokens), value


SOURCE = Source(load=load, serves=lambda objective: objective.label == "class")
