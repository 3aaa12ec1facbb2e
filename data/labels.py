"""Labels as numbers: the index of a class, or the number to predict."""

from collections.abc import Sequence
from contextlib import suppress

import numpy as np

from heedful.data import sources
from heedful.data.config import DataConfig
from heedful.data.errors import DataError, listed, short


def classes(config: DataConfig) -> tuple[str, ...]:
    """Return the names of the classes, in the order of their indices; () without classes.

    They come from the config, or else from the source, or else from the training data (sorted).
    Raises DataError for fewer than two classes.
    """
    if config.objective_spec.label != "class":
        return ()
    names = config.classes or sources.classes(config)
    if not names:
        names = tuple(sorted({example["label"] for example in sources.load(config, "train")}))
    if len(names) < 2:
        raise DataError(
            f"{', '.join(map(repr, names))} is the only class: give data.classes two or more, "
            "or training data with them"
        )
    return names


def numbers(labels: Sequence[str], names: Sequence[str], split: str) -> np.ndarray:
    """Return labels as indices of classes, int32 [E], or, without `names`, as numbers, float32 [E].

    Raises DataError for a class that is not in `names`, and for a label that is not a finite
    number.
    """
    if names:
        number = {name: i for i, name in enumerate(names)}
        for label in labels:
            if label not in number:
                raise DataError(
                    f"split {split!r} has the label {short(label)!r}, which is not among the "
                    f"classes {listed(names)}: correct the data, or set data.classes to all of them"
                )
        return np.array([number[label] for label in labels], np.int32)
    values = np.full(len(labels), np.nan, np.float32)
    for i, label in enumerate(labels):
        with suppress(ValueError):
            values[i] = float(label)
        if not np.isfinite(values[i]):
            raise DataError(
                f"example {i} of split {split!r} has the label {short(label)!r}, which is not "
                "a finite number: correct it, or choose another data.objective"
            )
    return values
