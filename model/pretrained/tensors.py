"""Read and write safetensors files, in one file or in shards."""

import filecmp
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from heedful.model.config import ModelError

SINGLE_FILE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
FLOATS = ("F32", "F16", "BF16")
PICKLES = ("*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt")
SIGNATURES = {
    b"PK\x03\x04": "a zip archive of torch.save: convert it with safetensors",
    b"\x80": "a pickle: convert it with safetensors",
    b"version https://git-lfs": "a pointer of Git LFS: run git lfs pull",
    b"GGUF": "a GGUF file: use the safetensors of the same model",
    b"<": "a web page: download the file itself",
}


def read_json(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file; raise ModelError if the file is missing or not an object."""
    if not path.is_file():
        raise ModelError(f"{path} does not exist: give a directory that has this file")
    try:
        values = json.loads(path.read_text("utf-8"))
    except RecursionError as error:
        raise ModelError(
            f"{path} is not readable JSON, it has too many nested levels: fetch the file again"
        ) from error
    except ValueError as error:
        raise ModelError(f"{path} is not JSON ({error}): fetch the file again") from error
    if not isinstance(values, dict):
        raise ModelError(f"{path} is JSON, but not an object: fetch the file again")
    return values


class Tensors:
    """The tensors in a directory, read one by one as float32; pickles raise ModelError.

    Methods raise ModelError, which names the file and the tensor.
    """

    def __init__(self, directory: Path):
        self._files: dict[Path, Any] = {}
        self._paths: dict[str, Path] = {}
        if (directory / SINGLE_FILE).is_file():
            self.source = directory / SINGLE_FILE
            self._paths = dict.fromkeys(self._names(self.source), self.source)
        elif (directory / INDEX).is_file():
            self.source = directory / INDEX
            self._read_index()
        else:
            pickled = [path.name for pattern in PICKLES for path in directory.glob(pattern)]
            if pickled:
                raise ModelError(
                    f"{directory} has its weights in {pickled[0]}, a pickle, and reading a pickle "
                    "can run any code: convert it to safetensors (in transformers: "
                    "from_pretrained(...).save_pretrained(...))"
                )
            raise ModelError(
                f"{directory} has neither {SINGLE_FILE} nor {INDEX}: fetch the weights of the "
                "model in safetensors"
            )

    def _read_index(self) -> None:
        weight_map = read_json(self.source).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ModelError(
                f'{self.source} has no "weight_map" of tensor names to file names: fetch the file '
                "again"
            )
        for name, file in weight_map.items():
            path = self.source.parent / str(file)
            if path.parent != self.source.parent or not path.is_file():
                raise ModelError(
                    f"{self.source} names {file}, which is not in the same directory: fetch {file}"
                )
            if name not in self._names(path):
                raise ModelError(
                    f"{path} has no tensor {name}, which {self.source.name} names: fetch both "
                    "files again"
                )
            self._paths[name] = path

    def _open(self, path: Path) -> Any:
        if path not in self._files:
            try:
                self._files[path] = safe_open(path, "np")
            except (SafetensorError, OSError) as error:
                raise ModelError(
                    f"{path} is not a safetensors file: {_reason(path, error)}"
                ) from error
        return self._files[path]

    def _names(self, path: Path) -> list[str]:
        return list(self._open(path).keys())

    @property
    def names(self) -> set[str]:
        return set(self._paths)

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise ModelError if a tensor has another shape; the values are not read."""
        path = self._paths[name]
        actual = tuple(self._open(path).get_slice(name).get_shape())
        if actual != shape:
            raise ModelError(
                f"{path}: {name} has shape {actual}, but {CONFIG} asks for {shape}: use the "
                f"{CONFIG} that these weights were saved with"
            )

    def read(self, name: str) -> np.ndarray:
        """Return a tensor as float32; raise ModelError for other types, NaN and infinity."""
        path = self._paths[name]
        dtype = self._open(path).get_slice(name).get_dtype()
        if dtype not in FLOATS:
            raise ModelError(
                f"{path}: {name} has type {dtype}: convert it to one of {', '.join(FLOATS)}"
            )
        values = self.raw(name).astype(np.float32, copy=False)
        if not np.isfinite(values).all():
            raise ModelError(
                f"{path}: {name} has NaN or infinite values: fetch the file again, or use weights "
                "from before training diverged"
            )
        return values

    def raw(self, name: str) -> np.ndarray:
        """Return a tensor in the type of the file."""
        return self._open(self._paths[name]).get_tensor(name)


def _reason(path: Path, error: Exception) -> str:
    """Return why safetensors cannot read a file, and the fix."""
    with path.open("rb") as file:
        start = file.read(64)
    has_header = start[8:9] == b"{"  # The header's length takes the first 8 bytes.
    for magic, what in SIGNATURES.items():
        if start.startswith(magic) and not has_header:
            return f"it is {what}"
    return f"it is truncated or damaged ({error}): fetch it again"


def shards(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """Split names into shards, in order; a shard has at most `limit` bytes, or a single tensor."""
    result: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if result[-1] and used + size > limit:
            result.append([])
            used = 0
        result[-1].append(name)
        used += size
    return result


def save(
    directory: Path,
    config: dict[str, Any],
    sizes: dict[str, int],
    make: Callable[[str], np.ndarray],
    max_shard_bytes: int,
) -> None:
    """Write config.json, and a tensor make(name) of sizes[name] bytes for each name.

    Files appear in the directory when all files are complete, config.json last. A directory that
    holds the same export is not changed. Raises ModelError if the directory holds another export or
    cannot be written.
    """
    parts = shards(sizes, max_shard_bytes)
    files = [SINGLE_FILE]
    if len(parts) > 1:
        files = [f"model-{i:05}-of-{len(parts):05}.safetensors" for i in range(1, len(parts) + 1)]
    try:
        home = directory if directory.is_dir() else directory.parent
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=home, prefix=".tmp-") as scratch:
            draft = Path(scratch)
            for file, names in zip(files, parts, strict=True):
                tensors = {name: make(name) for name in names}
                save_file(tensors, draft / file, metadata={"format": "pt"})
            if len(parts) > 1:
                weight_map = {n: f for f, names in zip(files, parts, strict=True) for n in names}
                index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
                _write_json(draft / INDEX, index)
                files.append(INDEX)
            _write_json(draft / CONFIG, config)
            for file in files:  # safetensors creates files that only their owner can read
                (draft / file).chmod((draft / CONFIG).stat().st_mode)
            _publish(draft, directory, [*files, CONFIG])
    except OSError as error:
        raise ModelError(
            f"cannot write {directory} ({error.strerror or error}): choose another directory"
        ) from error


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", "utf-8")


def _publish(draft: Path, directory: Path, files: Iterable[str]) -> None:
    """Move the files to the directory, unless it holds another export."""
    files = list(files)
    if directory.is_dir():
        weights = {path.name for path in directory.glob("*.safetensors*")} | {CONFIG}
        for name in sorted(weights | set(files)):
            existing = directory / name
            if existing.exists() and not (
                name in files and filecmp.cmp(draft / name, existing, shallow=False)
            ):
                raise ModelError(
                    f"{directory} has {name} of another export: choose another directory, or "
                    "delete all files of that export"
                )
    directory.mkdir(exist_ok=True)
    for name in files:
        with (draft / name).open("rb") as file:
            os.fsync(file.fileno())
        shutil.move(draft / name, directory / name)
