"""Labels as numbers: the index of a class, or the number to predict."""

from collections.abc import Sequence
from contextlib import suppress

import numpy as np

from heedful.data import sources
from heedful.data.config import DataConfig
from heedful.data.errors import DataError, listed, short


def classes(config: DataConfig) -> tuple[str, ...]:
    """Return the names of the classes, in the order of their indices; () without classes.

    The names come from data.classes, or else from the source, or else from the training data
    (sorted). Raises DataError for fewer than two classes.
    """
    if config.objective_spec.label != "class":
        return ()
    names = config.classes or sources.classes(config)
    if not names:
        names = tuple(sorted({example["label"] for example in sources.load(config, "train")}))
    if len(names) < 2:
        raise DataError(
            f"{', '.join(map(repr, names))} is the only class: name two or more in data.classes, "
            "or give training data with two or more"
        )
    return names


def numbers(labels: Sequence[str], names: Sequence[str], split: str) -> np.ndarray:
    """Return labels [E] as int32 indices in the classes `names`; without names, as float32 numbers.

    E is the number of examples. Raises DataError for a class that is not in `names`, and for a
    number that is not finite.
    """
    if names:
        number = {name: i for i, name in enumerate(names)}
        for label in labels:
            if label not in number:
                raise DataError(
                    f"split {split!r} has the label {short(label)!r}, which is not among the "
                    f"classes {listed(names)}: correct the data, or name all in data.classes"
                )
        return np.array([number[label] for label in labels], np.int32)
    values = np.full(len(labels), np.nan, np.float32)
    for i, label in enumerate(labels):
        with suppress(ValueError):
            values[i] = float(label)
        if not np.isfinite(values[i]):
            raise DataError(
                f"example {i} of split {split!r} has the label {short(label)!r}, which is not "
                "a finite number: correct the label, or choose another data.objective"
            )
    return values
