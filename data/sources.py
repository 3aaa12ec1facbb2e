"""Where examples come from: a source's name and a split in, random-access text examples out."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from heedful.data import files, homeassistant, listops, sentiment, shakespeare, tfds
from heedful.data.config import TEXT_OBJECTIVES, DataConfig, DataError, Objective
from heedful.data.examples import SPLITS, Example, fields_of


class Source(NamedTuple):
    """A source that is named by one word; `load(config, split)` returns its examples."""

    load: Callable[[DataConfig, str], Sequence[Example]]
    objectives: tuple[Objective, ...]


_LABELLED: tuple[Objective, ...] = ("classification", "regression")
SOURCES = {
    "homeassistant": Source(homeassistant.load, ("translation",)),
    "shakespeare": Source(shakespeare.load, TEXT_OBJECTIVES),
    "sentiment": Source(sentiment.load, (*TEXT_OBJECTIVES, *_LABELLED)),
    "listops": Source(listops.load, ("classification",)),
    "files": Source(files.load, (*TEXT_OBJECTIVES, "translation", *_LABELLED)),
}


def fields(config: DataConfig) -> tuple[str, ...]:
    """Returns the names of the text fields that the examples of this config have, in order.

    They are source and target for translation, else text, with pair for pairs of texts. For files
    with labels this reads the header of the training table, for tfds the names of the features.
    """
    _check(config)
    if config.source == "files":
        return files.fields(config)
    if config.source.startswith("tfds:"):
        return tfds.fields(config)
    return fields_of(config.objective, 1)


def classes(config: DataConfig) -> tuple[str, ...]:
    """Returns the classes that a source has in an order of its own; () for the others."""
    _check(config)
    return tfds.classes(config) if config.source.startswith("tfds:") else ()


def load(config: DataConfig, split: str) -> Sequence[Example]:
    """Returns the examples of a split in their order.

    An example is a dict of text by field: source and target (translation); text, one document
    (causal_lm, masked_lm, prefix_lm, span_corruption); or text, with pair for pairs of texts, and
    label, the name of a class or a finite number (classification, regression).

    Nothing is left out here, blank lines included, so that line i of a test file is example i.
    A sequence whose texts are fixed by a version has them named in its attribute `identity`.
    Raises DataError for an unknown source, an objective that does not fit it, missing or broken
    data, and an empty split.
    """
    if split not in SPLITS:
        raise DataError(f"unknown split {split!r}: give one of {', '.join(SPLITS)}")
    _check(config)
    is_tfds = config.source.startswith("tfds:")
    examples = (tfds.load if is_tfds else SOURCES[config.source].load)(config, split)
    if not len(examples):
        fix = "choose another source or other languages"
        if config.source == "files":
            fix = f"give files to data.{split}, or another share to data.holdout"
        elif is_tfds:
            fix = "give another share to data.holdout, or choose another dataset"
        raise DataError(f"split {split!r} of data.source {config.source!r} is empty: {fix}")
    return examples


def _check(config: DataConfig) -> None:
    if config.source.startswith("tfds:"):
        return
    if config.source not in SOURCES:
        known = ", ".join([*SOURCES, "tfds:NAME/CONFIG"])
        raise DataError(f"data.source is {config.source!r}: give one of {known}")
    if config.objective not in SOURCES[config.source].objectives:
        fitting = [
            name for name, source in SOURCES.items() if config.objective in source.objectives
        ]
        raise DataError(
            f"data.source {config.source!r} has nothing for data.objective {config.objective!r}: "
            f"set data.source to {', '.join(fitting)} or tfds:NAME/CONFIG, or the objective to "
            f"{', '.join(SOURCES[config.source].objectives)}"
        )
    for name in ("columns", "label"):
        if config.source != "files" and getattr(config, name) != getattr(DataConfig, name):
            raise DataError(
                f"data.{name} is for data.source files and tfds:NAME/CONFIG, not {config.source}: "
                "leave it out"
            )
