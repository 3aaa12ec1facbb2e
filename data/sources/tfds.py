"""The source `tfds:NAME/CONFIG`: texts, pairs and labels of TensorFlow Datasets."""

import hashlib
import importlib
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from heedful.data import packages
from heedful.data.config import DataConfig
from heedful.data.errors import DataError, listed
from heedful.data.examples import (
    Example,
    Subset,
    fields_of,
    label_column,
    select,
    shares,
    text_columns,
)
from heedful.data.sources.source import Source

_CHUNK = 1000  # Records that are read at a time.
# With other names, which have a namespace or arguments, tfds may import code of the dataset.
_NAME = re.compile(r"[a-zA-Z]\w*(/\w[\w.+-]*)?(:[\d*]+\.[\d*]+\.[\d*]+)?", re.ASCII)


class Records(Sequence[Example]):
    """Records of a prepared split.

    read: for each field of an example, the feature, and a function from its value to text.
    """

    def __init__(
        self, records: Any, read: Mapping[str, tuple[str, Callable[[Any], str]]], identity: str
    ):
        self.records = records
        self.read = read
        # A prepared version never changes, so that its name identifies the texts.
        features = [(field, feature) for field, (feature, _) in read.items()]
        self.identity = f"{identity} {features} {len(records)}"

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Example:
        record = self.records[range(len(self))[index]]  # tfds itself raises no IndexError.
        return {field: read(record[feature]) for field, (feature, read) in self.read.items()}


def fields(config: DataConfig) -> tuple[str, ...]:
    """Return the text fields; the text features of the dataset decide: one text, or a pair."""
    return fields_of(config.objective_spec, len(_texts(config, _builder(config))))


def classes(config: DataConfig) -> tuple[str, ...]:
    """Return the class names of the label feature, in its order; () without names.

    The order matters for the F1 score of GLUE, which is the F1 score of the second class.
    """
    builder = _builder(config)
    label = label_column(config, list(builder.info.features), f"{config.source!r} has")
    return tuple(getattr(builder.info.features[label], "names", None) or ())


def load(config: DataConfig, split: str) -> Sequence[Example]:
    """Return the examples of a split; prepare the dataset in TFDS_DATA_DIR if needed.

    If a dataset has no test split, or a test split without labels (GLUE), its validation split
    becomes test, and valid is a share (data.holdout) of train, chosen by a hash of the text.
    Messages on stderr say so. For MNLI the matched splits are used. Raises DataError for an unknown
    name, for features that do not fit, and if the preparation fails.
    """
    builder = _builder(config)
    texts = _texts(config, builder)
    read: dict[str, tuple[str, Callable[[Any], str]]] = {
        field: (feature, bytes.decode)
        for field, feature in zip(fields_of(config.objective_spec, len(texts)), texts, strict=True)
    }
    label = label_column(config, list(builder.info.features), f"{config.source!r} has")
    if label:
        read["label"] = (label, _label_reader(config, label, builder.info.features[label]))
    try:
        builder.download_and_prepare()
    except Exception as error:
        raise DataError(
            f"{config.source!r} cannot be prepared in {builder.data_dir} ({_first_line(error)}): "
            "prepare it on a machine with a network and set TFDS_DATA_DIR to its data folder"
        ) from error
    names = _split_names(config, builder, label)
    held = [name for name in ("valid", "test") if names[name] is None]
    name = names[split] or "train"
    records = builder.as_data_source(split=name)
    examples = Records(records, read, f"tfds:{builder.info.full_name} {name}")
    if split in held:
        _say(f"{config.source}: {split} is {config.holdout:.3g} of its train (data.holdout)")
    elif split == "test" and not name.startswith("test"):
        _say(f"{config.source}: test is its {name}, because it has no test split with labels")
    if split in held or (held and split == "train"):
        chosen = select(_shares(builder, records, texts[0]), split, held, config.holdout)
        part = f"{examples.identity} {split} without {held} of {config.holdout}"
        return Subset(examples, chosen, part)
    return examples


def _builder(config: DataConfig) -> Any:
    name = config.source.removeprefix("tfds:")
    if not _NAME.fullmatch(name):
        raise DataError(
            f"data.source {config.source!r} is not tfds:NAME, tfds:NAME/CONFIG or either with "
            ":VERSION (such as 1.0.0), and other names may run code of the dataset: choose a name "
            "in https://www.tensorflow.org/datasets/catalog; TFDS_DATA_DIR sets the data folder"
        )
    import tensorflow_datasets  # Slow to import and needed by this source only.

    try:
        # tfds imports its older builders (GLUE, WMT) itself, but stops at the first one that needs
        # a package that is not installed (h5py).
        for topic in ("text", "translate"):
            importlib.import_module(f"tensorflow_datasets.{topic}")
        # The format array_record can be read by index, and without TensorFlow.
        return tensorflow_datasets.builder(
            name,
            data_dir=os.environ.get("TFDS_DATA_DIR"),
            file_format="array_record",
        )
    except Exception as error:  # tfds raises errors of many types.
        raise DataError(
            f"data.source {config.source!r} cannot be opened ({_first_line(error)}): "
            "choose a name in https://www.tensorflow.org/datasets/catalog"
        ) from error


def _texts(config: DataConfig, builder: Any) -> tuple[str, ...]:
    import tensorflow_datasets

    known = [
        name
        for name, feature in builder.info.features.items()
        if isinstance(feature, tensorflow_datasets.features.Text)
    ]
    return text_columns(config, known, f"{config.source!r} has the texts")


def _label_reader(config: DataConfig, label: str, feature: Any) -> Callable[[Any], str]:
    """Return a function from a value of the feature to a class name, or to a number as text."""
    if feature.shape != ():
        raise DataError(
            f"data.label {label!r} of {config.source!r} is not a single value: choose another "
            "data.label"
        )
    number = np.dtype(feature.np_dtype).kind
    is_class = hasattr(feature, "int2str")
    wanted = config.objective_spec.label
    if wanted == "number" and (is_class or number not in "fiu"):
        raise DataError(
            f"data.label {label!r} of {config.source!r} is not a number: "
            "set data.objective to classification, or choose another data.label"
        )
    if wanted == "class" and number == "f":
        raise DataError(
            f"data.label {label!r} of {config.source!r} is a number: "
            "set data.objective to regression, or choose another data.label"
        )

    def read(value: Any) -> str:
        known = (
            0 <= value < feature.num_classes if is_class else number != "f" or np.isfinite(value)
        )
        if not known:
            raise DataError(
                f"{config.source!r} has an example without a label ({label!r} is {value}): "
                "choose another dataset"
            )
        if is_class:
            return feature.int2str(int(value))
        if isinstance(value, bytes):
            return value.decode()
        # The shortest text of the float32: 3.8, not 3.7999999523.
        return str(feature.np_dtype(value))

    return read


def _split_names(config: DataConfig, builder: Any, label: str | None) -> dict[str, str | None]:
    """Return the dataset's name for train, valid and test; None: it is held out of train."""
    known = list(builder.info.splits)
    if "train" not in known:
        raise DataError(
            f"{config.source!r} has no split 'train', only {listed(known)}: choose another dataset"
        )
    valid, test = (
        next((name for name in (prefix, f"{prefix}_matched") if name in known), None)
        for prefix in ("validation", "test")
    )
    if test and label:
        records = builder.as_data_source(split=test)
        if all(records[i][label] == -1 for i in range(min(100, len(records)))):
            test = None
    if test is None:
        valid, test = None, valid
    return {"train": "train", "valid": valid, "test": test}


def _shares(builder: Any, records: Any, feature: str) -> np.ndarray:
    """Return the hash in [0, 1) of every text, float64 [texts]; the cache keeps the hashes."""
    name = f"{builder.info.full_name} {feature}"

    def write(folder: Path) -> None:
        _say(f"reading {name} once to hold out a share")
        chunks = (range(i, min(i + _CHUNK, len(records))) for i in range(0, len(records), _CHUNK))
        texts = (
            record[feature].decode()
            for chunk in chunks
            for record in records.__getitems__(list(chunk))
        )
        np.save(folder / "shares.npy", shares(texts))

    key = hashlib.sha256(f"{name} {len(records)}".encode()).hexdigest()
    folder = packages.build_once(packages.cache() / "shares" / key, write)
    return np.load(folder / "shares.npy")


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]


SOURCE = Source(
    load=load,
    fields=fields,
    classes=classes,
    argument="NAME/CONFIG",
    reads_columns=True,
    if_empty="give another share to data.holdout, or choose another dataset",
)
