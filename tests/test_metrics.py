"""Test files of JSON lines and events: their content after a kill or on a full disk."""

import json
import multiprocessing
import os
import resource
import struct
import sys
import threading
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import Progress
from tensorboardX.proto.event_pb2 import Event  # type: ignore[attr-defined]
from tensorboardX.record_writer import masked_crc32c

from heedful.train.errors import TrainError
from heedful.train.growing_files import Lines, read_lines
from heedful.train.messages import lasting
from heedful.train.metrics import MetricsWriter, scores


def test_later_lines_and_what_was_cut_short_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    whole = json.dumps({"step": 4, "parameters": {"a": "0"}})
    for cut in (whole[:-1], whole[:20]):  # The first part ends in a brace.
        path.write_text('{"step": 1}\n{"step": 3}\n{"step": 2}\n' + cut)
        assert [line["step"] for line in read_lines(path)] == [1, 3, 2]
        lines = Lines(path, from_step=2)
        lines.write({"step": 3, "loss": 1.5})
        lines.close()
        assert read_lines(path) == [{"step": 1}, {"step": 2}, {"step": 3, "loss": 1.5}]


def fill_lines(path: Path) -> None:
    lines, text = Lines(path, from_step=0), "x" * 500
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, former[1]))  # instead of a full disk
    for step in range(1, 9):
        lines.write({"step": step, "text": text})
    resource.setrlimit(resource.RLIMIT_FSIZE, former)
    lines.write({"step": 9})
    lines.close()


def test_a_full_disk_ends_nothing_and_is_told_once(tmp_path, capfd):
    path = tmp_path / "metrics.jsonl"
    process = multiprocessing.get_context("spawn").Process(target=fill_lines, args=(path,))
    process.start()
    process.join()
    assert process.exitcode == 0
    said = capfd.readouterr().err
    assert said.count("metrics.jsonl cannot be written (File too large)") == 1
    assert "training goes on" in said
    assert [line["step"] for line in read_lines(path)] == list(range(1, 10))


def test_lines_that_cannot_be_read_are_kept_and_that_is_said(tmp_path, capfd):
    path = tmp_path / "metrics.jsonl"
    text = (
        b'{"step": 1}\n\xff\n[2]\n{"step": "3"}\nnull\n' + b"[" * 100_000 + b'\n{"step": 2}\n{"st'
    )
    path.write_bytes(text)
    assert read_lines(path) == [{"step": 1}, {"step": 2}]
    Lines(path, from_step=2).close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == text
    assert "metrics.jsonl.damaged" in capfd.readouterr().err
    Lines(path, from_step=2).close()
    assert len(list(tmp_path.iterdir())) == 2 and not capfd.readouterr().err


def test_scores_are_found_in_the_metrics(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert scores(path, "loss") == {}
    path.write_text(
        '{"step": 2, "loss": 9.0}\n{"step": 4, "valid_loss": 1.5, "valid_f1": 0.5}\nx\n'
    )
    assert scores(path, "loss") == {4: -1.5} and scores(path, "f1") == {4: 0.5}
    path.write_text('{"step": 6, "valid_loss": null}')
    assert scores(path, "loss") == {6: -sys.float_info.max}


# Events ------------------------------------------------------------------------------------------


def events(folder: Path) -> list[Event]:
    """Read the events of a folder as TensorBoard does, and check each checksum."""
    (path,) = folder.glob("events.out.tfevents.*")
    data, found = path.read_bytes(), []
    while data:
        (size,) = struct.unpack("<Q", data[:8])
        record = data[12 : 12 + size]
        sums = struct.unpack("<I", data[8:12]) + struct.unpack("<I", data[12 + size : 16 + size])
        assert sums == (masked_crc32c(data[:8]), masked_crc32c(record))
        found.append(Event.FromString(record))
        data = data[16 + size :]
    return found


def test_events_are_what_tensorboard_reads(tmp_path):
    writer = MetricsWriter(tmp_path, from_step=4)
    writer.write(6, {"loss": 1.5, "lr": 0.25})
    writer.close()
    version, start, *values = events(tmp_path)
    assert version.file_version == "brain.Event:2"
    assert start.step == 5 and start.session_log.status == start.session_log.START
    found = [(e.step, e.summary.value[0].tag, e.summary.value[0].simple_value) for e in values]
    assert found == [(6, "loss", 1.5), (6, "lr", 0.25)] and all(e.wall_time for e in values)


def fill_events(folder: Path) -> None:
    writer = MetricsWriter(folder, from_step=0)
    writer.write(1, {"loss": 0.5})
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, former[1]))  # within a record
    for step in range(2, 101):
        writer.write(step, {"loss": step / 2})
    assert threading.active_count() == 1
    resource.setrlimit(resource.RLIMIT_FSIZE, former)
    writer.close()


def test_a_full_disk_neither_holds_up_nor_loses_events(tmp_path, capfd):
    process = multiprocessing.get_context("spawn").Process(target=fill_events, args=(tmp_path,))
    process.start()
    process.join(60)
    process.kill()
    assert process.exitcode == 0
    assert capfd.readouterr().err.count("cannot be written (File too large)") == 2
    assert [event.step for event in events(tmp_path)] == [0, 1, *range(1, 101)]
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [*range(1, 101)]


def test_a_disk_that_is_full_from_the_beginning_is_told(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("heedful.train.growing_files.write_whole", full)
    with pytest.raises(TrainError, match=r"metrics.jsonl cannot be written \(No space .*free disk"):
        Lines(path, from_step=1)
    assert read_lines(path) == [{"step": 1}]


def test_a_log_on_a_full_disk_ends_nothing(tmp_path):
    with Path("/dev/full").open("w") as full:
        console = Console(markup=False, file=full)
        with lasting(console), Progress(console=console) as bar:
            task = bar.add_task("training", total=3)
            for step in range(3):
                console.print("x" * 10_000)
                bar.update(task, completed=step)
        assert console.file is full
        with pytest.raises(OSError, match="No space left"):
            console.print("x" * 10_000)
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())
