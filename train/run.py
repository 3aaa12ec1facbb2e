"""A run: a directory with its config, tokenizer, environment, metrics and checkpoints."""

import dataclasses
import fcntl
import os
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from etils import epath

from heedful.data.config import DataConfig
from heedful.data.reading import parse_json, require_characters
from heedful.data.tokenizer import Tokenizer
from heedful.model.config import ModelConfig
from heedful.train.code_record import CodeMissing, require_code
from heedful.train.config import TrainConfig
from heedful.train.config_json import differences, from_json, to_json, write_json
from heedful.train.errors import TrainError
from heedful.train.hosts import is_first
from heedful.train.paths import data_paths, train_paths
from heedful.train.renamed import with_new_names

# Settings that may change when a run resumes, as they do not affect the training of a step.
MAY_DIFFER = (
    "train.mesh.", "train.checkpoints ", "train.decode.", "train.samples ", "train.patience ",
    "train.tracker ", "data.test ",
)  # fmt: skip
# Files and folders that a run writes.
FILES = (
    "config.json", "tokenizer.json", "special_tokens.json", "environment.json", "metrics.jsonl",
    "fingerprints.jsonl", "result.json", "translations.test.txt", "checkpoints",
    "evaluations", "tracker.json",
)  # fmt: skip


RESULTS = ("result.json", "translations.test.txt")
GLOB = "*?[\\"
BUCKETS = ("gs:/", "s3:/")


@dataclass(frozen=True)
class Run:
    """The directory and the three configs of a run, with all values resolved."""

    directory: Path
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    experiment_file: Path | None = None
    """The user's file with the experiment that was started; None: there is no such file."""

    @classmethod
    def open(cls, directory: str | Path) -> "Run":
        """Return a run that was started before; raise TrainError if there is none.

        A relative path in its configs is resolved in the folder where the run was started, if it
        exists there; other paths stay as they are.
        """
        directory = Path(directory)
        path = directory / "config.json"
        if not path.is_file():
            lacks = "has no config.json" if directory.is_dir() else "does not exist"
            raise TrainError(
                f"{directory} is no run directory: it {lacks}; give the directory of a run"
            )
        try:
            require_characters(values := parse_json(path.read_text("utf-8")))
            if not isinstance(values, dict):
                raise TypeError("it is not a JSON object")
            values = with_new_names(values)
            require_code(directory, values)
            run = cls.of(directory, values)
            if (file := values.get("experiment_file")) is not None:
                run = dataclasses.replace(run, experiment_file=Path(file))
            return run._from_here(values.get("started_in"))
        except CodeMissing:
            raise
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise TrainError(
                f"{path} cannot be read as the config of a run: {error}; restore the file"
            ) from error

    @classmethod
    def of(cls, directory: Path, values: dict[str, Any]) -> "Run":
        """Return the run with these config `values` (JSON); a missing field gets its default."""
        values = with_new_names(values)
        return cls(
            directory,
            from_json(ModelConfig, values["model"], "model"),
            from_json(DataConfig, values["data"], "data"),
            from_json(TrainConfig, values["train"], "train"),
        )

    def _from_here(self, started_in: str | None) -> "Run":
        """Return the same run for a process in another folder than `started_in`."""
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
        """Write the files that describe the run, unless the directory has this run already.

        Settings in `MAY_DIFFER` may change. A run without a checkpoint starts again. Raises
        TrainError if the directory has a run of another config, or other files that a run would
        overwrite, or if the checkpoints of the existing run are in another folder.
        """
        require_plain(self.checkpoints)
        if str(self.directory).startswith(BUCKETS) and not self.directory.exists():
            raise TrainError(
                f"--run-dir {self.directory} is not a local folder: give the bucket to "
                "train.checkpoints, and a local folder to --run-dir"
            )
        if not is_begun(self.directory) and is_first():
            self._begin(tokenizer)
            return
        there = Run.open(self.directory)
        if others := self.others(there):
            raise TrainError(
                f"{self.directory} holds a run of another config ({others}): give another "
                f"--run-dir, or resume it with heedful train {self.directory}{self._anew(there)}"
            )
        moved = there.checkpoints != self.checkpoints
        if moved and _has_steps(there.checkpoints) and not _has_steps(self.checkpoints):
            raise TrainError(
                f"{self.directory} has its checkpoints in {there.checkpoints} and none in "
                f"{self.checkpoints}: set train.checkpoints to the first folder, or move them to "
                "the second"
            )
        reached = max(steps_of(there.checkpoints), default=0)
        if self.train.steps < min(reached, there.train.steps):
            raise TrainError(
                f"train.steps = {self.train.steps:,}, but {self.directory} has reached step "
                f"{reached:,}: give more steps, or another --run-dir"
            )
        if there != self:
            release = self.lock()
            try:
                self._write_config()
            finally:
                release()

    def _begin(self, tokenizer: Tokenizer) -> None:
        """Write the first files; the config comes first, as it marks the directory of a run."""
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
        if self.experiment_file is not None:
            values["experiment_file"] = str(self.experiment_file.absolute())
        write_json(self.directory / "config.json", values)

    def keep_result(self, step: int) -> None:
        """Move the result of an earlier end of the run, at `step`, to a folder of evaluations."""
        found = [path for name in RESULTS if (path := self.directory / name).is_file()]
        names = (f"step={step}", *(f"step={step}.{n}" for n in range(2, 1000)))
        folders = (self.directory / "evaluations" / name for name in names)
        if found:
            folder = next(folder for folder in folders if not folder.exists())
            folder.mkdir(parents=True)
            for path in found:
                path.rename(folder / path.name)

    def lock(self) -> Callable[[], None]:
        """Keep other processes from training in the directory; return a function that ends this.

        Raises TrainError if another process trains in the directory.
        """
        held = os.open(self.directory, os.O_RDONLY)
        try:
            for wait in (True, False):  # `is_locked` holds the lock for a moment.
                try:
                    fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if not wait:
                        raise
                    time.sleep(0.1)
        except BlockingIOError as error:
            os.close(held)
            raise TrainError(
                f"another process trains in {self.directory}: stop it, or give another --run-dir"
            ) from error
        except OSError:  # A file system without locks.
            pass
        return lambda: os.close(held)

    def is_locked(self) -> bool:
        """Tell if a process trains in the directory."""
        held = os.open(self.directory, os.O_RDONLY)
        try:
            fcntl.flock(held, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # A file system without locks.
            pass
        finally:
            os.close(held)
        return False

    def values(self) -> dict[str, Any]:
        """Return the three configs as JSON values."""
        parts = {"model": self.model, "data": self.data, "train": self.train}
        return {name: to_json(part) for name, part in parts.items()}

    def others(self, there: "Run") -> str:
        """Describe the differences from another run that are not allowed; "": there are none.

        train.steps may differ if the learning rates of the steps do not depend on it: the steps so
        far are then those of both runs.
        """
        allowed = MAY_DIFFER
        if not self.train.optimizer.follows_steps:
            allowed += ("train.steps ",)
        found = differences(self.values(), there.values())
        others = [line for line in found if not line.startswith(allowed)]
        if any(line.startswith("train.steps ") for line in others):
            others.append(
                f"the {self.train.optimizer.schedule} schedule depends on train.steps, so that the "
                "steps so far would have had other learning rates"
            )
        return "; ".join(others[:3]) + ("; ..." if len(others) > 3 else "")

    def _anew(self, there: "Run") -> str:
        """Return advice to start a new run with this config from the parameters of `there`.

        "": the parameters of `there` do not fit this model.
        """
        if self.model != there.model:
            return ""
        found = differences(self.values(), there.values())
        flags = " ".join(sorted(_flag(line.split()[0], self) for line in found))
        return (
            "; or start a new run from its parameters with heedful train "
            f"{there.directory} --init-from {there.directory} --run-dir NEW {flags}"
        )


def _flag(name: str, run: Run) -> str:
    """Return the flag that sets the field `name` to its value in the run."""
    value: Any = run
    for part in name.split("."):
        value = getattr(value, part)
    *sections, field = name.replace("_", "-").split(".")
    if isinstance(value, bool):
        return f"--{'.'.join([*sections, field if value else f'no-{field}'])}"
    words = map(str, value) if isinstance(value, tuple) else [str(value)]
    return shlex.join([f"--{'.'.join([*sections, field])}", *words])


def require_plain(checkpoints: epath.Path) -> None:
    """Raise TrainError for a path with characters of glob patterns, which orbax cannot read."""
    path = str(checkpoints if "://" in str(checkpoints) else checkpoints.absolute())
    if found := [character for character in GLOB if character in path]:
        raise TrainError(
            f"{path} has {found[0]} in its name: checkpoints cannot be read from a path with one "
            f"of {' '.join(GLOB)}; rename the folder, or give another --run-dir or "
            "train.checkpoints"
        )


def is_begun(directory: Path) -> bool:
    """Tell if the directory has a run with a checkpoint or a result.

    Raises TrainError if `directory` is a file, or has no run but files that a run would overwrite.
    """
    if directory.is_file():
        raise TrainError(f"{directory} is a file: give a directory to --run-dir")
    if not (directory / "config.json").is_file():
        if found := [name for name in FILES if _is_something(directory / name)]:
            raise TrainError(
                f"{directory} has no config.json, but {', '.join(found)}, which a run would "
                "overwrite: give another --run-dir, or, if this is a run, restore its config.json"
            )
        return False
    there = Run.open(directory)
    own = epath.Path(directory / "checkpoints")
    corrupt = there.checkpoints.parent / f"{there.checkpoints.name}.corrupt"
    folders = {there.checkpoints, own, corrupt}
    return any(map(_has_steps, folders)) or (directory / "result.json").exists()


def _is_something(path: Path) -> bool:
    """Tell if `path` is a file, a link, or a folder that is not empty."""
    return any(path.iterdir()) if path.is_dir() else os.path.lexists(path)


def _has_steps(checkpoints: epath.Path) -> bool:
    return bool(steps_of(checkpoints))


def steps_of(checkpoints: epath.Path) -> list[int]:
    """Return the steps of the complete checkpoints in a folder, sorted."""
    try:
        if not checkpoints.is_dir():
            return []
        return sorted(int(path.name) for path in checkpoints.iterdir() if path.name.isdigit())
    except (ImportError, OSError) as error:
        raise TrainError(
            f"train.checkpoints {checkpoints} cannot be reached ({error}): check the path, its "
            "permissions and the network"
        ) from error


def with_defaults(values: dict[str, Any]) -> dict[str, Any]:
    """Return the three configs of another version (JSON values) with the fields of this version.

    If this version cannot read the configs, only renamed fields change.
    """
    try:
        return Run.of(Path(), values).values()
    except (AttributeError, KeyError, TypeError, ValueError):
        return with_new_names(values)
