"""Record the user's own code that a run needs: the files of its import paths and their SHA-256."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from heedful import own_code
from heedful.train.errors import TrainError


class CodeMissing(TrainError):
    """Error: a run needs a module of the user that cannot be found or used."""


FIELDS = (
    "model.attention.core", "model.attention.decoder_core", "model.attention.cross_core",
    "data.objective", "data.source", "train.optimizer.kind", "train.optimizer.schedule",
)  # fmt: skip
"""Config fields whose value may be an import path."""


def import_paths(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (field, import path) of the config `values` (JSON) of a run."""
    for field in FIELDS:
        value: Any = values
        for name in field.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        is_name = not isinstance(value, str) or value.startswith("tfds:")
        if not is_name and own_code.is_import_path(value):
            yield field, value


def record(values: dict[str, Any], experiment_file: Path | None) -> dict[str, dict[str, Any]]:
    """Return {"own_code": {name: SHA-256}, "own_code_files": {name: path}}; {} without own code.

    Names are those of modules, and that of the experiment file. The modules are imported.
    """
    files = {} if experiment_file is None else {experiment_file.name: experiment_file}
    for field, path in import_paths(values):
        own_code.resolve(path, field, object, TrainError)
        files |= own_code.files(path.partition(":")[0])
    if not files:
        return {}
    return {
        "own_code": {name: own_code.sha256(file) for name, file in files.items()},
        "own_code_files": {name: str(file.absolute()) for name, file in files.items()},
    }


def require_code(directory: Path, values: dict[str, Any]) -> None:
    """Find the own code of the run in `directory`, and import it.

    Modules are found in the folder in which the run was started and in that of its experiment file,
    too. Raises CodeMissing, with the file and the hash of the record, if code cannot be found.
    """
    for name in ("started_in", "experiment_file"):
        if isinstance(place := values.get(name), str):
            own_code.search_in(Path(place) if name == "started_in" else Path(place).parent)
    for field, path in import_paths(values):
        try:
            own_code.resolve(path, field, object, TrainError)
        except TrainError as error:
            known, name = _recorded(directory), path.partition(":")[0]
            was = ""
            if (file := known["own_code_files"].get(name)) is not None:
                digest = known["own_code"].get(name)
                was = f" (restore it: the run was trained with {file}, SHA-256 {digest})"
            raise CodeMissing(f"{directory} needs code of its own: {error}{was}") from None


def changes(directory: Path, values: dict[str, Any]) -> list[str]:
    """Describe the own code of a run that differs from the record, one line for each module."""
    known = _recorded(directory)
    now = record(values, None).get("own_code", {})
    return [
        f"{known['own_code_files'].get(name, name)} has changed since the run was trained"
        for name, digest in known["own_code"].items()
        if name in now and now[name] != digest
    ]


def _recorded(directory: Path) -> dict[str, Any]:
    """Return the newest record of own code of a run; an unreadable record is empty."""
    try:
        environments = json.loads((directory / "environment.json").read_bytes())
        newest = environments[-1]
        return {name: dict(newest[name]) for name in ("own_code", "own_code_files")}
    except (OSError, ValueError, TypeError, KeyError, IndexError, RecursionError):
        return {"own_code": {}, "own_code_files": {}}
