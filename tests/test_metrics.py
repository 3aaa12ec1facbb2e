"""Files of JSON lines: what a kill or a full disk leaves of them."""

import json
import multiprocessing
import resource
from pathlib import Path

from train.metrics import Lines, read_lines


def test_later_lines_and_what_was_cut_short_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    whole = json.dumps({"step": 4, "parameters": {"a": "0"}})
    for cut in (whole[:-1], whole[:20]):  # The first one ends in a brace.
        path.write_text('{"step": 1}\n{"step": 3}\n{"step": 2}\n' + cut)
        assert [line["step"] for line in read_lines(path)] == [1, 3, 2]
        lines = Lines(path, from_step=2)
        lines.write({"step": 3, "loss": 1.5})
        lines.close()
        assert read_lines(path) == [{"step": 1}, {"step": 2}, {"step": 3, "loss": 1.5}]


def fill(path: Path) -> None:
    lines, text = Lines(path, from_step=0), "x" * 500
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, former[1]))  # stands for a full disk
    for step in range(1, 9):
        lines.write({"step": step, "text": text})
    resource.setrlimit(resource.RLIMIT_FSIZE, former)
    lines.write({"step": 9})
    lines.close()


def test_a_full_disk_ends_nothing_and_is_told_once(tmp_path, capfd):
    path = tmp_path / "metrics.jsonl"
    process = multiprocessing.get_context("spawn").Process(target=fill, args=(path,))
    process.start()
    process.join()
    assert process.exitcode == 0
    said = capfd.readouterr().err
    assert said.count("metrics.jsonl cannot be written (File too large)") == 1
    assert "training goes on" in said
    assert [line["step"] for line in read_lines(path)] == list(range(1, 10))
