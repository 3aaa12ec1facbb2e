"""The source `texts`: texts that a Python program gave, and that no file of a run holds."""

from collections.abc import Sequence

from heedful.data.config import DataConfig
from heedful.data.errors import DataError
from heedful.data.examples import Example, fields_of
from heedful.data.sources.source import Source


def load(config: DataConfig, split: str) -> Sequence[Example]:
    """Raise DataError: only the program that gave the texts has them."""
    raise DataError(
        "data.source 'texts' stands for texts of a Python program, which are not stored: make them "
        "again with heedful.Dataset.from_texts and give them to fit or evaluate, or write them to "
        "files and set data.source to 'files'"
    )


SOURCE = Source(
    load=load,
    fields=lambda config: fields_of(config.objective_spec, len(config.columns)),
    reads_columns=True,
    is_stored=False,
)
