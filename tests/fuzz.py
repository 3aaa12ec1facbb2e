"""Run commands and readers in processes that may die, hang or ask for too much memory.

A worker reads cases, one per line of JSON, and answers each with one line. A worker is replaced
when it has died or when a case does not end. A case fails if it ends its worker.
"""

import base64
import contextlib
import io
import json
import os
import queue
import resource
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
WORKERS = 2
SECONDS = 300  # A case that runs longer hangs. The limit is high because the machine may be busy.
RENEW = 60  # Cases per worker: compiled programs stay in the memory of a worker.
MEMORY = 5 << 30  # bytes that a case may ask for


@dataclass(frozen=True, kw_only=True)
class Case:
    """A command line, or the name of a reader in `READERS` with its input."""

    name: str
    arguments: Sequence[str] = ()
    stdin: str = ""
    """Standard input in base 64."""
    reader: str = ""
    stop: str = ""
    """Path of a file: SIGTERM is sent as soon as the file has a line. Empty: no signal is sent."""


@dataclass(frozen=True)
class Outcome:
    """The end of a case: exit code and output; a `problem` is a traceback, a death or a hang."""

    code: int | None
    out: str
    err: str
    problem: str = ""

    @property
    def is_refusal(self) -> bool:
        """True for exit code 2 with one error as the last line; notes may precede it."""
        # When a training diverges, the norms are printed below the error, indented.
        lines = [line for line in self.err.splitlines() if not line.startswith("  ")]
        wrong = [line.startswith("heedful: error: ") for line in lines]
        is_one = sum(wrong) == 1 and wrong[-1] and "Traceback" not in self.err
        return self.code == 2 and is_one

    @property
    def short(self) -> str:
        if self.problem:
            return " ... ".join(self.problem.strip().splitlines()[-4:])[-700:]
        return (
            f"code {self.code}, {self.err.strip()[-500:] or self.out.strip()[-200:] or 'silence'}"
        )


def run_all(cases: Iterable[Case]) -> list[tuple[Case, Outcome]]:
    """Run the cases on several workers; return each case, in order, with its outcome."""
    cases, workers = list(cases), queue.SimpleQueue()
    for _ in range(WORKERS):
        workers.put(_Worker())

    def run(case: Case) -> Outcome:
        worker = workers.get()
        try:
            return worker.run(case)
        finally:
            workers.put(worker)

    with ThreadPoolExecutor(WORKERS) as threads:
        outcomes = list(threads.map(run, cases))
    for _ in range(WORKERS):
        workers.get().end()
    return list(zip(cases, outcomes, strict=True))


class _Worker:
    def __init__(self):
        self._process: subprocess.Popen | None = None
        self._count = 0

    def run(self, case: Case) -> Outcome:
        if self._process is None or self._count >= RENEW:
            self._start()
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        self._count += 1
        process.stdin.write(json.dumps(asdict(case)) + "\n")
        process.stdin.flush()
        ready, _, _ = select.select([process.stdout], [], [], SECONDS)
        line = process.stdout.readline() if ready else ""
        if line:
            outcome = Outcome(*json.loads(line))
            if outcome.problem:
                self.end()
            return outcome
        self.end()
        self._log.seek(0)
        said = self._log.read()[-2000:]
        if not ready:
            return Outcome(None, "", "", f"no end after {SECONDS} s: {said}")
        return Outcome(None, "", "", f"died with {process.returncode}: {said}")

    def _start(self) -> None:
        self.end()
        self._count, self._log = 0, tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        inherited = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__))], cwd=ROOT, text=True, env=inherited,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
        )  # fmt: skip

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


# In a worker ------------------------------------------------------------------------------------


def _examples(**values) -> Callable[[str], object]:
    def read(path: str) -> object:
        from heedful.data import sources
        from heedful.data.config import DataConfig

        paths = tuple(path.split(","))
        config = DataConfig(source="files", train=paths, valid=paths, test=paths, **values)
        sources.fields(config)
        return [dict(example) for example in sources.load(config, "train")]

    return read


def _tokenizer(path: str) -> object:
    from heedful.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(path)
    (ids,) = tokenizer.encode_batch(["a red cat sings"])
    return [ids.tolist(), tokenizer.decode(ids)]


def _model(path: str) -> object:
    import numpy as np
    from rich.console import Console

    from heedful.train.conversion.source import open_source

    source = open_source(f"hf:{path}", Console(quiet=True))
    import jax

    return [float(np.abs(np.asarray(leaf)).sum()) for leaf in jax.tree.leaves(source.params())]


READERS: dict[str, Callable[[str], object]] = {
    "documents": _examples(objective="causal_lm"),
    "parallel": _examples(objective="translation"),
    "pairs": _examples(objective="translation"),
    "labels": _examples(objective="classification"),
    "numbers": _examples(objective="regression"),
    "tokenizer": _tokenizer,
    "model": _model,
}


def _work() -> None:
    answers, cases = os.fdopen(os.dup(1), "w"), os.fdopen(os.dup(0))
    sys.path[:0] = [str(ROOT)]
    import jax

    from heedful.train import cli

    jax.config.update("jax_disable_most_optimizations", True)
    cli._quiet()
    for line in cases:
        case = Case(**json.loads(line))
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            most = pages * resource.getpagesize() + MEMORY
            resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))
            code, problem = _run(cli.run, case)
            said = []
            for stream, file in ((sys.stdout, out), (sys.stderr, err)):
                stream.flush()
                file.seek(0)
                said.append(file.read().decode("utf-8", "backslashreplace"))
        answers.write(json.dumps([code, *said, problem]) + "\n")
        answers.flush()


def _run(command: Callable[[list[str]], int], case: Case) -> tuple[int | None, str]:
    from heedful.data.errors import DataError
    from heedful.model.config import ModelError
    from heedful.train.errors import TrainError

    sys.stdin = io.TextIOWrapper(io.BytesIO(base64.b64decode(case.stdin)), "utf-8")
    if case.stop:
        threading.Thread(target=_stop_when, args=(Path(case.stop),), daemon=True).start()
    try:
        if not case.reader:
            return command(list(case.arguments)), ""
        print(json.dumps(READERS[case.reader](*case.arguments)))
        return 0, ""
    except (DataError, ModelError, TrainError) as error:  # raised by a reader
        print(f"heedful: error: {error}", file=sys.stderr)
        return 2, ""
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 1, ""
    except BaseException:
        return None, traceback.format_exc()


def _stop_when(path: Path) -> None:
    for _ in range(SECONDS * 10):
        with contextlib.suppress(OSError):
            if path.read_text():
                os.kill(os.getpid(), signal.SIGTERM)
                return
        time.sleep(0.1)


if __name__ == "__main__":
    _work()
