"""Test trackers: the real packages offline, if they are installed, and failures of any kind."""

import importlib.util
import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import toy
from PIL import Image

from heedful.model.config import ModelConfig
from heedful.train import trackers
from heedful.train.config import TrainConfig, TrainError
from heedful.train.run import MAY_DIFFER, Run
from heedful.train.trackers import require_tracker, tracked

TRACKERS = ("wandb", "trackio")
SCRIPT = """
import sys
from pathlib import Path
import toy
from heedful.data.config import DataConfig
from heedful.model.config import ModelConfig
from heedful.train.config import TrainConfig
from heedful.train.run import Run
from heedful.train.trackers import tracked

tracker, directory = sys.argv[1], Path(sys.argv[2])
run = Run(directory, ModelConfig(width=48), DataConfig(), TrainConfig(tracker=tracker))
with tracked(run, toy.QUIET) as observer:
    observer.on_log(2, {"loss": 2.5})
    observer.on_evaluation(2, {"loss": 1.75})
    observer.on_result({"test_loss": 1.625, "checkpoints": [2]}, directory)
"""


def send(tracker: str, folder: Path) -> Path:
    """Send a run to the tracker from a process of its own, twice: the second resumes the first."""
    directory = folder / "run"
    directory.mkdir()
    Image.new("RGB", (5, 5)).save(directory / "loss.png")
    environment = {
        **os.environ, "WANDB_MODE": "offline", "TRACKIO_DIR": str(folder / "store"),
        "PYTHONPATH": os.pathsep.join(["tests", os.environ.get("PYTHONPATH", "")]),
    }  # fmt: skip
    for _ in range(2):
        command = [sys.executable, "-c", SCRIPT, tracker, str(directory)]
        subprocess.run(command, env=environment, check=True, cwd=Path(__file__).parents[1])
    return directory


@pytest.mark.slow
def test_wandb_gets_the_run_offline(tmp_path):
    pytest.importorskip("wandb")
    directory = send("wandb", tmp_path)
    name = json.loads((directory / "tracker.json").read_text())["name"]
    first, second = sorted((directory / "wandb").glob("offline-run-*"))
    assert all(each.name.endswith(name) for each in (first, second))
    sent = next(first.glob("*.wandb")).read_bytes()
    for words in (b"width", b"48", b"loss", b"2.5", b"valid_loss", b"1.75", b"test_loss", b"1.625"):
        assert words in sent
    assert list(first.rglob("loss_*.png"))


@pytest.mark.slow
def test_trackio_gets_the_run_in_a_local_folder(tmp_path):
    pytest.importorskip("trackio")
    directory = send("trackio", tmp_path)
    name = json.loads((directory / "tracker.json").read_text())["name"]
    store = tmp_path / "store"
    with sqlite3.connect(store / "heedful.db") as database:
        rows = database.execute("select run_name, metrics from metrics").fetchall()
        (config,) = database.execute("select config from configs").fetchall()
    assert json.loads(config[0])["model"]["width"] == 48
    sent = {"loss": 2.5}, {"valid_loss": 1.75}, {"result/test_loss": 1.625}
    for (run, values), expected in zip(rows, 2 * sent, strict=True):
        assert run == name and expected.items() <= json.loads(values).items()
    assert list((store / "media").rglob("*.png"))


@pytest.mark.parametrize("name", TRACKERS)
def test_a_missing_package_names_its_extra(name, monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TrainError, match=rf"pip install 'heedful\[{name}\]'"):
        require_tracker(name)
    require_tracker(None)


class Service:
    """Tracker that keeps what it gets, and fails after `room` messages."""

    name = "mine"

    def __init__(self, room: int):
        self.got: list[Any] = []
        self.room = room

    def log(self, step: int, values: dict[str, float]) -> None:
        if len(self.got) == self.room:
            raise ConnectionError("the network is down\nand so on")
        self.got.append((step, values))

    def finish(self, result: dict[str, Any], pictures: list[Path]) -> None:
        self.got.append((result, [path.name for path in pictures]))

    def close(self, is_complete: bool) -> None:
        self.got.append(is_complete)


def tracked_by(service: Any, monkeypatch, directory: Path) -> Any:
    monkeypatch.setattr(trackers, "_Wandb", lambda run: service() if callable(service) else service)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    run = Run(
        directory, ModelConfig(), toy.data(directory, "causal_lm"), TrainConfig(tracker="wandb")
    )
    return tracked(run, toy.QUIET)


def test_a_tracker_gets_metrics_pictures_and_the_result(monkeypatch, tmp_path):
    service = Service(9)
    (tmp_path / "loss.png").touch()
    with tracked_by(service, monkeypatch, tmp_path) as observer:
        observer.on_log(1, {"loss": 2.0})
        observer.on_evaluation(1, {"loss": 3.0})
        observer.on_result({"test_loss": float("nan")}, tmp_path)
    result = ({"test_loss": None}, ["loss.png"])
    assert service.got == [(1, {"loss": 2.0}), (1, {"valid_loss": 3.0}), result, True]


def test_a_tracker_that_fails_does_not_end_training(monkeypatch, tmp_path):
    service = Service(1)
    with tracked_by(service, monkeypatch, tmp_path) as observer:
        for step in (1, 2, 3):
            observer.on_log(step, {"loss": 2.0})
    assert service.got == [(1, {"loss": 2.0}), True]


def test_a_run_that_fails_is_closed_as_failed(monkeypatch, tmp_path):
    service = Service(1)
    with pytest.raises(KeyError), tracked_by(service, monkeypatch, tmp_path):
        raise KeyError
    assert service.got == [False]


def test_a_tracker_that_does_not_start_is_one_line(monkeypatch, tmp_path):
    def start() -> None:
        raise OSError("no API key\nand so on")

    with pytest.raises(TrainError) as error, tracked_by(start, monkeypatch, tmp_path):
        pass
    assert str(error.value) == (
        "train.tracker = wandb does not start (no API key); run wandb login, or set "
        "WANDB_MODE=offline, or leave train.tracker out"
    )


def test_a_run_may_resume_with_another_tracker():
    assert "train.tracker ".startswith(MAY_DIFFER)
