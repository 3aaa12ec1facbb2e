"""Test that files are written completely or not at all, and never through a link."""

import os
import stat

import pytest

from heedful.data.writing import write_whole


def test_what_a_link_leads_to_stays_as_it_is(tmp_path):
    own = tmp_path / "own.txt"
    own.write_text("mine")
    for target in (own, tmp_path / "nothing.txt"):
        path = tmp_path / "result.json"
        path.unlink(missing_ok=True)
        path.symlink_to(target)
        write_whole(path, "theirs")
        assert not path.is_symlink() and path.read_text() == "theirs"
    assert own.read_text() == "mine" and not (tmp_path / "nothing.txt").exists()


def test_a_file_of_another_name_is_left_alone(tmp_path):
    for name in ("result.partial", "result.tmp"):
        (tmp_path / name).write_text("mine")
    write_whole(tmp_path / "result.json", b"\xff")
    assert (tmp_path / "result.json").read_bytes() == b"\xff"
    assert {path.name for path in tmp_path.iterdir()} == {
        "result.json", "result.partial", "result.tmp"
    }  # fmt: skip
    assert (tmp_path / "result.partial").read_text() == "mine"


def test_what_was_there_stays_where_it_cannot_be_written(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    write_whole(path, "before")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*/result\.json'"):
        write_whole(path, "after")
    assert path.read_text() == "before" and [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_others_may_read_it_as_the_user_allows(tmp_path):
    mask = os.umask(0o027)
    try:
        write_whole(tmp_path / "result.json", "{}")
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "result.json").stat().st_mode) == 0o640
