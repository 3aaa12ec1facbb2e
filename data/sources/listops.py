"""The source `listops`: generated, nested operations on digits; the value is one of ten classes.

ListOps (arXiv:1804.06028) in the long form of Long Range Arena (arXiv:2011.04006 §2.2.1), with the
distribution of its generator (github.com/google-research/long-range-arena, data/listops.py).
`[MAX 2 9 [MIN 4 7 ] 0 ]` has the value 9, and 10 tokens. There are 15 different tokens: `[MIN`,
`[MAX`, `[MED`, `[SM`, `]` and the digits. There are no parentheses: Long Range Arena's generator
writes them around every pair, and its pipeline removes them.
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

OPERATION = 0.25
"""Probability that an argument is an operation, not a digit."""
PATIENCE = 100_000
"""Largest number of draws without a new expression of allowed length."""


def _median(values: list[int]) -> int:
    """Return the median; for an even number of values, the mean of the middle two, rounded down."""
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
    """Return the expressions of a split, generated once for each value of config.listops.

    All expressions of all splits are different. The expressions of valid and test do not depend on
    the number of training examples; a smaller training set is the beginning of a larger one.
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
    """Draw an expression of allowed length that is not in `seen`, and add its hash to `seen`."""
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
        f"{PATIENCE:,} draws gave no new expression with more than data.listops.min_length "
        f"{config.min_length} and fewer than data.listops.max_length {config.max_length} tokens: "
        "set them farther apart, choose fewer data.listops.examples, or raise "
        "data.listops.max_depth or data.listops.max_arguments"
    )


def draw(rng: random.Random, config: ListOpsConfig) -> tuple[str, int]:
    """Draw an expression and return it with its value; raise _TooLongError at max_length tokens.

    Operators, numbers of arguments, and digits are drawn uniformly. The outermost operation has
    depth 1; digits have at most depth `max_depth`.
    """
    uniform = rng.random  # Other methods may change between versions of Python.
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
