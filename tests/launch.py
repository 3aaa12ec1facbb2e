"""Start runs in processes of their own, which tests watch, kill and compare."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import pytest

from heedful.train.checkpoint import Checkpoints
from heedful.train.config import MeshConfig
from heedful.train.run import Run
from heedful.train.sharding import make_mesh
from heedful.train.state import set_up

ROOT = Path(__file__).parent.parent


class Process(subprocess.Popen):
    """A heedful command; its output goes to a file, so that it never waits for a reader."""

    def __init__(self, arguments: Sequence[str], devices: int = 1, stdin: str = "", **environment):
        inherited = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
        flag = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._input = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._input.write(stdin)
        self._input.seek(0)
        super().__init__(
            [sys.executable, "-m", "heedful", *arguments], cwd=ROOT, text=True,
            env=inherited | flag | environment,
            stdin=self._input, stdout=self._log, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def said(self) -> str:
        self._log.seek(0)
        return self._log.read()

    def finish(self, code: int = 0, seconds: float = 300) -> str:
        """Wait for the end of the process and return its output."""
        try:
            self.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            pytest.fail(f"not ended after {seconds} s: {self.said()}")
        assert self.returncode == code, self.said()
        return self.said()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def group(
    arguments: Sequence[str], processes: int, devices: int, stdin: str = "", **environment: str
) -> list[Process]:
    """Start `processes` processes that compute together, each with `devices` devices."""
    flags = [
        "--coordinator", f"localhost:{free_port()}", "--processes", str(processes), "--process"
    ]  # fmt: skip
    return [
        Process(
            [*arguments, *flags, str(index)],
            devices,
            # Only the first process has an input.
            stdin if index == 0 else "",
            **environment,
        )
        for index in range(processes)
    ]


def finish(processes: Sequence[Process], code: int = 0) -> list[str]:
    return [process.finish(code) for process in processes]


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def wait_for_step(run: Path, step: int, process: Process) -> None:
    path = run / "metrics.jsonl"
    deadline = time.time() + 120
    while time.time() < deadline and process.poll() is None:
        if path.exists():
            steps = [json.loads(line)["step"] for line in path.read_text().splitlines()[:-1]]
            if steps and steps[-1] >= step:
                return
        time.sleep(0.005)
    pytest.fail(f"step {step} not reached: {process.said()}")


def checkpoint(directory: Path, step: int) -> tuple[list[np.ndarray], dict]:
    """Return the arrays of the training state at a step, and the position in the data."""
    run = Run.open(directory)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    abstract = set_up(run.model, run.train, mesh).abstract
    state, position = Checkpoints(run.checkpoints, run.tokenizer().fingerprint).restore(
        step, abstract
    )
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)], position


def same_bits(ours: list[np.ndarray], theirs: list[np.ndarray]) -> None:
    assert len(ours) == len(theirs) > 10
    for a, b in zip(ours, theirs, strict=True):
        assert a.tobytes() == b.tobytes()
