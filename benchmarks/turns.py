"""Processes that are measured in turns: each answers a line of standard input with one of JSON.

No library that is measured is imported here.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.worker import highest_resident, seconds

ROOT = Path(__file__).parent.parent


class Process:
    """A process that answers; it is killed when an answer takes longer than `patience` seconds."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], patience: float):
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.patience = patience

    def ask(self, request: str = "") -> dict[str, Any]:
        """Returns the next answer, or why there is none."""
        process = self.process
        assert process.stdin and process.stdout and process.stderr
        timer = threading.Timer(self.patience, process.kill)
        timer.start()
        try:
            if request:
                process.stdin.write(request + "\n")
                process.stdin.flush()
            if answer := process.stdout.readline():
                return json.loads(answer)
            timely = timer.is_alive()
            last = process.stderr.read().strip().splitlines()
            last = last or [f"the process ended with {process.wait()} and no message"]
            return {"skipped": last[-1][:200] if timely else f"over {self.patience:.0f} s"}
        except BrokenPipeError:
            return {"skipped": "the process has ended"}
        finally:
            timer.cancel()

    def close(self) -> None:
        assert self.process.stdin and self.process.stdout and self.process.stderr
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        self.process.stderr.close()


def answer_with(
    prepare: Callable[[], tuple[Callable[[], object], dict[str, Any]]],
    peak: Callable[[], int] = highest_resident,
) -> None:
    """The other end: says what `prepare` tells beside a function, then times that, line by line.

    `peak` gives the bytes that were held at most.
    It runs once before the time is taken: after a pause, caches and memory that the system has
    taken back are not what they are in the middle of work.
    """
    answers, sys.stdout = sys.stdout, sys.stderr  # Libraries may print.
    run, facts = prepare()
    print(json.dumps(facts), file=answers, flush=True)
    for _ in sys.stdin:
        run()
        print(json.dumps({"seconds": seconds(run), "peak": peak()}), file=answers)
        answers.flush()
