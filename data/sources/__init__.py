"""Load the examples of a source and a split, with access by number."""

from collections.abc import Sequence

from heedful import own_code
from heedful.data.config import DataConfig
from heedful.data.errors import DataError
from heedful.data.examples import SPLITS, Example
from heedful.data.sources import files, homeassistant, listops, sentiment, shakespeare, texts, tfds
from heedful.data.sources.source import Source
from heedful.names import did_you_mean

SOURCES: dict[str, Source] = {
    "homeassistant": homeassistant.SOURCE,
    "shakespeare": shakespeare.SOURCE,
    "sentiment": sentiment.SOURCE,
    "listops": listops.SOURCE,
    "files": files.SOURCE,
    "tfds": tfds.SOURCE,
    "texts": texts.SOURCE,
}


def fields(config: DataConfig) -> tuple[str, ...]:
    """Return the names of the text fields of the examples, in order.

    If an objective has optional fields, such as the second text of a pair, the header of the
    training table or the features of a tfds dataset decide about these fields.
    """
    return _source(config).fields(config)


def classes(config: DataConfig) -> tuple[str, ...]:
    """Return the class names in the order that the source defines; () for other sources."""
    return _source(config).classes(config)


def load(config: DataConfig, split: str) -> Sequence[Example]:
    """Return the examples of a split in the order of the source.

    An example is a dict of texts by field. If the objective has labels, `label` is the name of a
    class or a finite number, as text.

    No example is left out, so that line i of a test file is example i. If the texts belong to a
    fixed version of a dataset, the attribute `identity` of the sequence names the version. Raises
    DataError for an unknown source, an objective that the source does not serve, missing or damaged
    data, and an empty split.
    """
    if split not in SPLITS:
        raise DataError(f"unknown split {split!r}: give one of {', '.join(SPLITS)}")
    source = _source(config)
    examples = source.load(config, split)
    if not len(examples):
        fix = source.if_empty.format(split=split)
        raise DataError(f"split {split!r} of data.source {config.source!r} is empty: {fix}")
    return examples


def _source(config: DataConfig) -> Source:
    """Return the source that a config names; raise DataError if it does not fit the config."""
    name, colon, _ = config.source.partition(":")
    spelled = {
        name: name + (each.argument and f":{each.argument}")
        for name, each in SOURCES.items()
        if each.is_stored
    }
    source = SOURCES.get(name)
    if source is None and own_code.is_import_path(config.source):
        source = own_code.resolve(config.source, "data.source", Source, DataError)
    elif source is None or bool(colon) != bool(source.argument):
        close = did_you_mean(name, SOURCES)
        raise DataError(
            f"data.source is {config.source!r}: {close}give one of "
            f"{', '.join(spelled.values())}, or an import path, my_package.my_source:SOURCE"
        )
    if not source.serves(config.objective_spec):
        fitting = [text for n, text in spelled.items() if SOURCES[n].serves(config.objective_spec)]
        raise DataError(
            f"data.source {config.source!r} has no examples for data.objective "
            f"{config.objective!r}: set data.source to {_either(fitting)}, or data.objective to "
            f"{', '.join(source.objectives)}"
        )
    for name in ("columns", "label"):
        if not source.reads_columns and getattr(config, name) != getattr(DataConfig, name):
            reading = " and ".join(text for n, text in spelled.items() if SOURCES[n].reads_columns)
            raise DataError(
                f"data.{name} is for data.source {reading}, not {config.source}: leave data.{name} "
                "out"
            )
    return source


def _either(names: list[str]) -> str:
    """Join names as "a, b or c"."""
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
