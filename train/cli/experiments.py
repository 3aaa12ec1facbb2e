"""Read the experiment that a command names: a config of ours, a Python file, or JSON or YAML."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heedful import own_code
from heedful.configs import base
from heedful.configs.base import Experiment
from heedful.data.errors import DataError
from heedful.data.reading import parse_json
from heedful.model.config import ModelError
from heedful.names import did_you_mean
from heedful.train.config_json import from_json
from heedful.train.errors import TrainError
from heedful.train.renamed import with_new_names

FORM = "define get_config() -> heedful.configs.base.Experiment in it"


@dataclass(frozen=True, kw_only=True)
class Named:
    """An experiment as a command names it."""

    experiment: Experiment
    name: str
    """Name as the user gave it."""
    label: str
    """Short name, as for the run directory: NAME, NAME:ROW, or the same with a file's stem."""
    description: str = ""
    """Text for the help: the docstring of the file."""
    rows: tuple[str, ...] = ()
    """Variations that the file has besides."""
    file: Path | None = None
    """The user's file; None: a config of heedful."""


def is_experiment(name: str) -> bool:
    """Tell if a name is that of an experiment, not of a run directory."""
    return base.has(name) or _python_file(name) is not None


def load(name: str) -> Named:
    """Return the experiment NAME, NAME:ROW, path/to/file.py or path/to/file.py:ROW.

    Raises TrainError if there is no such experiment or row, or if a file cannot be used.
    """
    if (found := _python_file(name)) is None:
        experiment, description = base.load(name)
        return Named(experiment=experiment, name=name, label=name, description=description)
    file, row = found
    try:
        module = own_code.load_file(file)
    except own_code.NotUsable as error:
        raise TrainError(str(error)) from error
    if not callable(make := getattr(module, "get_config", None)):
        raise TrainError(f"{file} has no function get_config; {FORM}")
    rows = tuple(map(str, getattr(module, "ROWS", ())))
    if row is not None and row not in rows:
        known = f"choose one of {', '.join(rows)}" if rows else "this file has no ROWS"
        raise TrainError(f"unknown row '{row}' of {file}: {did_you_mean(row, rows)}{known}")
    try:
        experiment = own_code.call(make, *([] if row is None else [row]))
    except own_code.NotUsable as error:
        raise TrainError(str(error)) from error
    if not isinstance(experiment, Experiment):
        raise TrainError(f"{file}: get_config returns a {type(experiment).__name__}; {FORM}")
    return Named(
        experiment=experiment,
        name=name,
        label=file.stem if row is None else f"{file.stem}:{row}",
        description=module.__doc__ or "",
        rows=rows,
        file=file,
    )


def read(file: Path) -> Named:
    """Return the experiment in a JSON or YAML file; fields that the file leaves out have defaults.

    The config.json of a run is read, too. Raises TrainError for a file that cannot be used.
    """
    from heedful.train.run import Run

    values = _values(file)
    own_code.search_in(file.parent)
    if file.name == "config.json" and "started_in" in values:
        run = Run.open(file.parent)
        experiment = Experiment(model=run.model, data=run.data, train=run.train)
    else:
        try:
            full = {"model": {}, "data": {}, "train": {}} | with_new_names(values)
            experiment = from_json(Experiment, full)
        except (DataError, ModelError, TrainError, TypeError) as error:
            raise TrainError(f"{file}: {str(error).lstrip('.')}") from None
    return Named(experiment=experiment, name=f"--config {file}", label=file.stem, file=file)


def _python_file(name: str) -> tuple[Path, str | None] | None:
    """Return (file, row or None) of file.py or file.py:ROW; None for another name."""
    found = re.fullmatch(r"(.*\.py)(?::(.*))?", name)
    return found and (Path(found[1]).expanduser(), found[2])


def _values(file: Path) -> dict[str, Any]:
    from ruamel.yaml import YAML, YAMLError

    # YAML 1.2: 1e-3 is a number and `no` is a text; a field that is given twice is an error.
    load = parse_json if file.suffix == ".json" else YAML(typ="safe", pure=True).load
    try:
        text = file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise TrainError(f"--config {file}: {reason}; give a JSON or YAML file") from None
    try:
        values = load(text)
        json.dumps(values)  # Dates of YAML, for example, are no values of a config.
    except (YAMLError, TypeError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        reason = " ".join(str(getattr(error, "problem", None) or error).split())
        raise TrainError(f"{file}{line}: {reason}; correct the file") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise TrainError(f"{file} has no fields: give model, data and train, with their fields")
    return values
