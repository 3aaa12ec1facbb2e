"""Labels as a model sees them: the number of a class, or the number to predict."""

from collections.abc import Sequence
from contextlib import suppress

import numpy as np

from heedful.data import sources
from heedful.data.config import DataConfig
from heedful.data.errors import DataError, listed, short


def classes(config: DataConfig) -> tuple[str, ...]:
    """Returns the classes of a classification, in the order of their numbers; () for other tasks.

    They are those of the config, or else those that the source names in an order of its own, or
    else those of the training data, sorted. Raises DataError when there are not at least two.
    """
    if config.objective_spec.label != "class":
        return ()
    found = config.classes or sources.classes(config)
    if not found:
        found = tuple(sorted({example["label"] for example in sources.load(config, "train")}))
    if len(found) < 2:
        raise DataError(
            f"{', '.join(map(repr, found))} is the only class: give data.classes two or more, "
            "or training data with them"
        )
    return found


def numbers(labels: Sequence[str], names: Sequence[str], split: str) -> np.ndarray:
    """Returns the labels as numbers of classes, int32 [E]; without names as they are, float32 [E].

    Raises DataError for a class that is not among the names and for what is no finite number.
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
                f"example {i} of split {split!r} has the label {short(label)!r}, which is no "
                "finite number: correct it, or choose another data.objective"
            )
    return values
