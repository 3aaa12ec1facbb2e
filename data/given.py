"""Examples that a program gives: texts, or token ids, with their labels."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from heedful.data.config import DataConfig
from heedful.data.errors import DataError, require, short
from heedful.data.examples import SPLITS, Subset, select, shares
from heedful.data.objectives import Objective

Given = dict[str, Any]
"""An example: texts (or ids, int32 [tokens]) by field, and the label as text."""


def named_examples(
    items: Iterable[Any], config: DataConfig, vocab_size: int | None = None
) -> list[Given]:
    """Return the examples with the names of their fields; see `Dataset.from_texts` for the forms.

    With `vocab_size`, texts are arrays of ids below this number. Raises DataError.
    """
    require(
        not isinstance(items, str | Mapping),
        f"the texts are one {type(items).__name__}: give a list of texts",
    )
    objective, examples = config.objective_spec, []
    for number, item in enumerate(items):
        example = _named(item, objective, number)
        for field in example:
            if field == "label":
                example[field] = str(example[field])
            elif vocab_size is None:
                kind = type(example[field]).__name__
                require(
                    isinstance(example[field], str),
                    f"text {number} has a {field} of type {kind}: give a string",
                )
            else:
                example[field] = _ids(example[field], vocab_size, number)
        examples.append(example)
    require(bool(examples), "there are no texts: give at least one")
    with_pair = [number for number, example in enumerate(examples) if "pair" in example]
    require(
        len(with_pair) in (0, len(examples)),
        f"{len(with_pair)} of {len(examples)} texts have a second text, the first is text "
        f"{(with_pair or [0])[0]}: give one to all or to none",
    )
    return examples


def _named(item: Any, objective: Objective, number: int) -> Given:
    """Return one example by field; raise DataError for another form."""
    label = ("label",) if objective.label else ()
    forms = [objective.fields + label]
    if objective.optional_fields:
        forms.append(objective.fields + objective.optional_fields + label)
    if isinstance(item, Mapping):
        form = next((form for form in forms if set(form) == set(item)), None)
        values = [item[name] for name in form or ()]
    else:
        is_pair = isinstance(item, tuple | list) and len(forms[0]) > 1
        values = list(item) if is_pair else [item]
        form = next((form for form in forms if len(form) == len(values)), None)
    if form is None:
        known = " or ".join(f"({', '.join(form)})" if len(form) > 1 else "a text" for form in forms)
        raise DataError(f"text {number} is {short(repr(item))}: this task needs {known}")
    return dict(zip(form, values, strict=True))


def _ids(value: Any, vocab_size: int, number: int) -> np.ndarray:
    ids = np.asarray(value)
    require(
        ids.ndim == 1 and (ids.dtype.kind in "iu" or not ids.size),
        f"array {number} is {ids.dtype}{list(ids.shape)}: give token ids, integers [tokens]",
    )
    require(
        not ids.size or (ids.min() >= 0 and ids.max() < vocab_size),
        f"array {number} has ids from {ids.min(initial=0)} to {ids.max(initial=0)}: the tokenizer "
        f"has ids from 0 to {vocab_size - 1}",
    )
    return ids.astype(np.int32)


def fields_given(examples: Sequence[Given], objective: Objective) -> tuple[str, ...]:
    """Return the names of the text fields that the examples have, in order."""
    return tuple(
        name for name in objective.fields + objective.optional_fields if name in examples[0]
    )


def labelled_classes(examples: Sequence[Given], objective: Objective) -> tuple[str, ...]:
    """Return the classes of the examples, sorted; () for an objective without classes."""
    if objective.label != "class":
        return ()
    return tuple(sorted({example["label"] for example in examples}))


def held_part(examples: list[Given], field: str, split: str, holdout: float) -> Sequence[Given]:
    """Return the examples of a split, chosen by a hash of their first text; holdout 0: all."""
    require(split in SPLITS, f"unknown split {split!r}: give one of {', '.join(SPLITS)}")
    if not holdout:
        return examples
    texts = (example[field] for example in examples)
    spelled = (x if isinstance(x, str) else " ".join(map(str, x)) for x in texts)
    part = Subset(examples, select(shares(spelled), split, ("valid", "test"), holdout))
    require(
        len(part) > 0,
        f"holdout = {holdout} leaves no text for the split {split!r}: give more texts, or another "
        "share",
    )
    return part
