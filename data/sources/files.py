"""The source `files`: the user's parallel texts, tables and documents."""

from collections.abc import Sequence

from heedful.data.config import DataConfig
from heedful.data.errors import DataError
from heedful.data.examples import (
    Example,
    Joined,
    Subset,
    fields_of,
    label_column,
    select,
    shares,
    text_columns,
)
from heedful.data.sources.source import Source
from heedful.data.tables import SUFFIXES, Table, header, is_table
from heedful.data.text_files import Parallel, documents


def fields(config: DataConfig) -> tuple[str, ...]:
    """Return the text fields; the header of the training table decides: one text, or a pair."""
    objective = config.objective_spec
    if objective.optional_fields:
        return tuple(name for name in _columns(config, config.train[0]) if name != "label")
    return objective.fields


def load(config: DataConfig, split: str) -> Sequence[Example]:
    """Return the examples of the files data.SPLIT, or else examples held out of data.train."""
    paths = getattr(config, split) or config.train
    held = [name for name in ("valid", "test") if not getattr(config, name)]
    if split != "train" and split not in held:
        held = []  # All examples of data.SPLIT belong to the split.
    objective = config.objective_spec
    if objective.is_text and not config.columns:
        if tables := [path for path in paths if is_table(path)]:
            raise DataError(
                f"data.{split} has the table {tables[0]}: name its text column in data.columns, or "
                "rename the file to .txt to read it as plain text"
            )
        return documents(paths, split, held, config.holdout)
    if objective.is_parallel and len(paths) == 2:
        if config.columns or any(map(is_table, paths)):
            raise DataError(
                f"data.{split} is {' '.join(paths)}: give one table, or two files of plain lines; "
                "with data.columns, give one table for every split"
            )
        examples = Parallel(paths)
    else:
        # If parallel texts have no training table, each split has its own columns for the fields.
        named = config.train[0] if is_table(config.train[0]) else paths[0]
        columns, numbers = _columns(config, named), objective.label == "number"
        examples = Joined([Table(_table(path), columns, numbers=numbers) for path in paths])
    if not held:
        return examples
    first = fields(config)[0]
    parts = shares(example[first] for example in examples)
    return Subset(examples, select(parts, split, held, config.holdout))


def _columns(config: DataConfig, path: str) -> dict[str, str]:
    """Return the column of each field, from the header of a table."""
    known, has = header(_table(path)), f"{path} has the columns"
    texts = text_columns(config, known, has)
    label = label_column(config, known, has)
    columns = dict(zip(fields_of(config.objective_spec, len(texts)), texts, strict=True))
    return columns | ({"label": label} if label else {})


def _table(path: str) -> str:
    if not is_table(path):
        raise DataError(
            f"{path} is not a table ({SUFFIXES}): give two files of plain lines or one table for "
            "translation, and tables for classification, regression and data.columns"
        )
    return path


SOURCE = Source(
    load=load,
    fields=fields,
    reads_columns=True,
    if_empty="give files to data.{split}, or another share to data.holdout",
)
