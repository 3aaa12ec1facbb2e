"""A run lives in one directory: its config, tokenizer, environment, metrics and checkpoints."""

import dataclasses
import fcntl
import json
import math
import os
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from etils import epath

from heedful.data.config import DataConfig
from heedful.data.reading import parse_json, require_characters
from heedful.data.tokenizer import Tokenizer
from heedful.data.writing import write_whole
from heedful.model.config import ModelConfig
from heedful.train.config import TrainConfig, TrainError
from heedful.train.hosts import is_first
from heedful.train.renamed import with_new_names

# Where a run goes on, and what is done with it in the end: what is trained stays the same.
MAY_DIFFER = (
    "train.mesh.", "train.checkpoints ", "train.decode.", "train.samples ", "data.test "
)  # fmt: skip
# What a run writes beside its config.
FILES = (
    "config.json", "tokenizer.json", "special_tokens.json", "environment.json", "metrics.jsonl",
    "fingerprints.jsonl", "result.json", "translations.test.txt", "checkpoints",
    "evaluations",
)  # fmt: skip


GLOB = "*?[\\"
BUCKETS = ("gs:/", "s3:/")


@dataclass(frozen=True)
class Run:
    """The three configs of a run, resolved, and where it lies."""

    directory: Path
    model: ModelConfig
    data: DataConfig
    train: TrainConfig

    @classmethod
    def open(cls, directory: str | Path) -> "Run":
        """A run that was started before; raises TrainError when there is none.

        Its relative paths are those of where it was started, if there is such a file.
        """
        directory = Path(directory)
        path = directory / "config.json"
        if not path.is_file():
            lacks = "has no config.json" if directory.is_dir() else "does not exist"
            raise TrainError(f"{directory} is no run directory: it {lacks}")
        try:
            require_characters(values := parse_json(path.read_text("utf-8")))
            if not isinstance(values, dict):
                raise TypeError("it is no object")
            return cls.of(directory, values)._from_here(values.get("started_in"))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise TrainError(f"{path} cannot be read as the config of a run: {error}") from error

    @classmethod
    def of(cls, directory: Path, values: dict[str, Any]) -> "Run":
        """The run whose `values` these are; what they do not have has its default."""
        values = with_new_names(values)
        return cls(
            directory,
            from_json(ModelConfig, values["model"], "model"),
            from_json(DataConfig, values["data"], "data"),
            from_json(TrainConfig, values["train"], "train"),
        )

    def _from_here(self, started_in: str | None) -> "Run":
        """The same run where this process does not work in the folder it was started in."""
        if started_in is None or os.path.realpath(started_in) == os.path.realpath("."):
            return self

        def there(path: str) -> str:
            found = Path(started_in) / path
            return str(found) if found.exists() else path

        data, train = data_paths(self.data, there), train_paths(self.train, there)
        return dataclasses.replace(self, data=data, train=train)

    @property
    def checkpoints(self) -> epath.Path:
        return epath.Path(self.train.checkpoints or self.directory / "checkpoints")

    @property
    def metrics(self) -> Path:
        return self.directory / "metrics.jsonl"

    @property
    def fingerprints(self) -> Path:
        return self.directory / "fingerprints.jsonl"

    @property
    def tokenizer_path(self) -> Path:
        return self.directory / "tokenizer.json"

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.tokenizer_path, self.model.vocab_size)

    def start(self, tokenizer: Tokenizer) -> None:
        """Writes what describes the run, unless the directory holds this very run already.

        It may go on as `MAY_DIFFER` says. A start that has come to no checkpoint is begun anew.
        Raises TrainError when the directory holds a run of another config, or no run but files that
        one would replace, and when its checkpoints are not where this one looks for them.
        """
        require_plain(self.checkpoints)
        if str(self.directory).startswith(BUCKETS) and not self.directory.exists():
            raise TrainError(
                f"--run-dir {self.directory} is no folder of this machine: give the bucket to "
                "train.checkpoints, and a folder to --run-dir"
            )
        if not is_begun(self.directory) and is_first():
            self._begin(tokenizer)
            return
        there = Run.open(self.directory)
        if others := self.others(there):
            raise TrainError(
                f"{self.directory} holds a run of another config ({others}): "
                "give another --run-dir, or the same config to resume it"
            )
        moved = there.checkpoints != self.checkpoints
        if moved and _has_steps(there.checkpoints) and not _has_steps(self.checkpoints):
            raise TrainError(
                f"{self.directory} has its checkpoints in {there.checkpoints} and none in "
                f"{self.checkpoints}: give the first to train.checkpoints, or move them"
            )
        if there != self:
            self._write_config()

    def _begin(self, tokenizer: Tokenizer) -> None:
        """Writes the config first: what a start without it leaves behind is taken for no run."""
        self.directory.mkdir(parents=True, exist_ok=True)
        release = self.lock()
        try:
            self._write_config()
            tokenizer.save(self.tokenizer_path)
            (self.directory / "environment.json").unlink(missing_ok=True)
        finally:
            release()

    def _write_config(self) -> None:
        values = {**self.values(), "started_in": os.getcwd()}
        write_json(self.directory / "config.json", values)

    def lock(self) -> Callable[[], None]:
        """Keeps other processes from training here until what it returns is called, or this ends.

        Raises TrainError where another one does.
        """
        held = os.open(self.directory, os.O_RDONLY)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise TrainError(
                f"another process trains in {self.directory}: stop it, or give another --run-dir"
            ) from error
        except OSError:  # A file system without locks.
            pass
        return lambda: os.close(held)

    def values(self) -> dict[str, Any]:
        """The three configs as JSON values."""
        parts = {"model": self.model, "data": self.data, "train": self.train}
        return {name: to_json(part) for name, part in parts.items()}

    def others(self, there: "Run") -> str:
        """What differs from the configs of another run, if any, and may not."""
        found = differences(self.values(), there.values())
        others = [line for line in found if not line.startswith(MAY_DIFFER)]
        return "; ".join(others[:3]) + ("; ..." if len(others) > 3 else "")


class Home:
    """The directory of a run while it trains, held open: a move or a deletion is noticed."""

    def __init__(self, directory: Path):
        self._directory, self._handle = directory, os.open(directory, os.O_RDONLY)

    def close(self) -> None:
        os.close(self._handle)

    def is_lost(self) -> bool:
        """Tell if another directory, or none, has its name."""
        try:
            return not self._is(self._directory)
        except (FileNotFoundError, NotADirectoryError):
            return True
        except OSError:  # A share that does not answer for a while.
            return False

    def found(self) -> Path | None:
        """Where it has been moved to, if the system says so; None: it has been deleted."""
        try:
            path = Path(os.readlink(f"/proc/self/fd/{self._handle}"))
            return path if self._is(path) else None
        except OSError:
            return None

    def _is(self, path: Path) -> bool:
        return os.path.samestat(os.stat(path), os.fstat(self._handle))


def require_plain(checkpoints: epath.Path) -> None:
    """Raises TrainError for a place from which orbax, which globs, reads other files or none."""
    path = str(checkpoints if "://" in str(checkpoints) else checkpoints.absolute())
    if found := [character for character in GLOB if character in path]:
        raise TrainError(
            f"{path} has {found[0]} in its name: checkpoints cannot be read back from a path with "
            f"one of {' '.join(GLOB)}; rename that folder, or give another --run-dir or "
            "train.checkpoints"
        )


def is_begun(directory: Path) -> bool:
    """Tell if a run lies here that has something to lose: a checkpoint, or a result.

    Raises TrainError for a file, and for a folder that is no run but holds files of the same names.
    """
    if directory.is_file():
        raise TrainError(f"{directory} is a file: give a directory to --run-dir")
    if not (directory / "config.json").is_file():
        if found := [name for name in FILES if _is_something(directory / name)]:
            raise TrainError(
                f"{directory} has no config.json, but {', '.join(found)}, which a run would "
                "replace: give another --run-dir or, where this is a run that has lost its "
                "config.json, put that back"
            )
        return False
    there = Run.open(directory)
    own = epath.Path(directory / "checkpoints")
    corrupt = there.checkpoints.parent / f"{there.checkpoints.name}.corrupt"
    folders = {there.checkpoints, own, corrupt}
    return any(map(_has_steps, folders)) or (directory / "result.json").exists()


def _is_something(path: Path) -> bool:
    """Tell if a file, a link, or a folder that is not empty stands there."""
    return any(path.iterdir()) if path.is_dir() else os.path.lexists(path)


def _has_steps(checkpoints: epath.Path) -> bool:
    try:
        return checkpoints.is_dir() and any(path.name.isdigit() for path in checkpoints.iterdir())
    except (ImportError, OSError) as error:
        raise TrainError(f"train.checkpoints {checkpoints} cannot be reached: {error}") from error


def data_paths(data: DataConfig, change: Callable[[str], str]) -> DataConfig:
    """The config with every path changed."""
    files = {name: tuple(map(change, getattr(data, name))) for name in ("train", "valid", "test")}
    path = data.tokenizer.path and change(data.tokenizer.path)
    return dataclasses.replace(
        data, tokenizer=dataclasses.replace(data.tokenizer, path=path), **files
    )


def train_paths(train: TrainConfig, change: Callable[[str], str]) -> TrainConfig:
    """The config with every path changed; what is no path stays."""
    init_from, checkpoints = train.init_from, train.checkpoints
    if init_from is not None and not init_from.startswith("package:"):
        kind, colon, path = init_from.rpartition("hf:")
        init_from = kind + colon + change(path)
    if checkpoints is not None and "://" not in checkpoints:
        checkpoints = change(checkpoints)
    return dataclasses.replace(train, init_from=init_from, checkpoints=checkpoints)


def to_json(config: Any) -> Any:
    """A config as JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_json(cls: Any, value: Any, name: str = "") -> Any:
    """The config of class `cls` that `to_json` turned into `value`; raises TypeError for others."""
    if dataclasses.is_dataclass(cls):
        if not isinstance(value, dict):
            raise TypeError(f"{name} is no object")
        hints = typing.get_type_hints(cls)
        if unknown := sorted(value.keys() - hints.keys()):
            raise TypeError(f"{name}.{unknown[0]} is unknown: another version has written it")
        return cls(**{k: from_json(hints[k], v, f"{name}.{k}") for k, v in value.items()})  # type: ignore[operator]
    choices = typing.get_args(cls)
    if typing.get_origin(cls) is tuple:
        if not isinstance(value, list):
            raise TypeError(f"{name} = {value!r}: it must be a list")
        return tuple(from_json(choices[0], item, name) for item in value)
    if isinstance(cls, types.UnionType):
        inner = next(choice for choice in choices if choice is not type(None))
        return value if value is None else from_json(inner, value, name)
    kinds = {float: (int, float), int: int, str: str, bool: bool}
    is_other = isinstance(value, bool) and cls is not bool
    if cls in kinds and (is_other or not isinstance(value, kinds[cls])):
        raise TypeError(f"{name} = {value!r}: it must be of type {cls.__name__}")
    return value


def differences(ours: Any, theirs: Any, name: str = "") -> Iterator[str]:
    """What differs between two configs as JSON values, field by field."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in ours.keys() | theirs.keys():
            yield from differences(ours.get(key), theirs.get(key), f"{name}.{key}".lstrip("."))
    elif ours != theirs:
        yield f"{name} is {theirs!r} there and {ours!r} here"


def write_json(path: Path, value: Any) -> None:
    """Writes the file whole or not at all."""
    write_whole(path, json.dumps(finite(value), indent=1, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """JSON values with null in the place of NaN and infinities, which JSON lacks."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
