"""What a run depends on besides its config, and fingerprints of the bits that it went through."""

import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from heedful.train.hosts import is_first
from heedful.train.metrics import Lines, keep_damaged, read_lines
from heedful.train.renamed import with_new_names
from heedful.train.run import Run, differences, write_json

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("model", "data", "train")
PACKAGES = ("flax", "optax", "orbax-checkpoint", "grain", "numpy", "tokenizers", "safetensors")
PACKAGE_FAMILIES = ("jax", "libtpu", "nvidia-")  # compilers, runtimes and kernels of the devices
VARIABLES = ("XLA_", "LIBTPU_", "JAX_", "NCCL_", "CUBLAS_", "CUDNN_", "NVIDIA_TF32", "NPROC")
INCIDENTAL = ("from_step", "command")
"""Parts of an environment that change no result."""


def environment(run: Run, mesh: Mesh, data: Mapping[str, str]) -> dict[str, Any]:
    """All that a result depends on; `data` are fingerprints by split. Of process 0 where many."""
    device = mesh.devices.flat[0]
    return {
        "command": sys.argv,
        "config": run.values(),
        "data": {**data, "tokenizer": run.tokenizer().fingerprint},
        "code": _code(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "packages": _packages(),
        "variables": {k: v for k, v in sorted(os.environ.items()) if k.startswith(VARIABLES)},
        "devices": {
            "kind": device.device_kind,
            "runtime": device.client.platform_version,
            "mesh": dict(mesh.shape),
            "processes": jax.process_count(),
        },
    }


def environments(directory: Path) -> list[dict[str, Any]]:
    """Those that the run has been trained in, in order, each with the step that it began from."""
    return _environments(directory)[0]


def _environments(directory: Path) -> tuple[list[dict[str, Any]], str | None]:
    """The environments on record, and the fault of a file that cannot be read, without any."""
    path = directory / "environment.json"
    if not path.exists():
        return [], None
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        return [], str(error)
    found = [{"from_step": 0, **found}] if isinstance(found, dict) else found
    is_one = lambda each: isinstance(each, dict) and type(each.get("from_step")) is int  # noqa: E731
    if isinstance(found, list) and all(map(is_one, found)):
        return [{**each, "config": with_new_names(each.get("config", {}))} for each in found], None
    return [], "it holds no environments"


def data_record(run: Run) -> dict[str, str]:
    """Fingerprints of the data that the run was trained on, by split, as far as they are known.

    Without that of the test where another one is given now, which a run may.
    """
    last = (environments(run.directory) or [{}])[-1]
    known = dict(last.get("data", {}))
    if last.get("config", {}).get("data", {}).get("test") != list(run.data.test):
        known.pop("test", None)
    return known


def add_environment(run: Run, now: dict[str, Any], from_step: int, console: Console) -> None:
    """Adds an environment to the record, and says what is new, unless it is that of before."""
    known, problem = _environments(run.directory)
    if problem and is_first():
        keep_damaged(run.directory / "environment.json", problem)
    new = changes(known[-1], now) if known else []
    for change in new:
        console.print(f"resuming in another environment: {change}", style="yellow")
    if (new or not known) and is_first():
        write_json(run.directory / "environment.json", [*known, {"from_step": from_step, **now}])


def changes(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two environments, a line each."""
    if "test" not in then.get("data", {}):  # in records of before
        now = {**now, "data": {k: v for k, v in now.get("data", {}).items() if k != "test"}}
    ours, theirs = (
        {name: value for name, value in environment.items() if name not in INCIDENTAL}
        for environment in (now, then)
    )
    return sorted(differences(ours, theirs))


@runtime_checkable
class RunObserver(Protocol):
    """Sees what is recorded, and may end the run by raising."""

    def environment(self, now: dict[str, Any]) -> None:
        """Called before the first step."""

    def fingerprint(self, line: dict[str, Any]) -> None: ...


class FingerprintWriter:
    """Appends to `fingerprints.jsonl`, on one process only; every process tells its witness.

    A line is `step`, the bits of `loss` and `weight` (sums over the batch; not at step 0) and of
    the `parameters`, by name, what `fingerprint.words` makes of them: all in hex.
    """

    def __init__(self, run: Run, from_step: int, names: Sequence[str], witness: RunObserver | None):
        """Lines of steps after `from_step` are dropped: the run goes through them again."""
        self._names, self._witness, self._lines = names, witness, None
        if is_first():
            self._lines = Lines(run.fingerprints, from_step)

    def write(self, step: int, words: jax.Array, metrics: Mapping[str, Any] | None = None) -> None:
        line: dict[str, Any] = {"step": step}
        for name in ("loss", "weight") if metrics else ():
            line[name] = np.asarray(metrics[name], ">f4").tobytes().hex()  # type: ignore[index]
        line["parameters"] = named_words(self._names, words)
        if self._lines is not None:
            self._lines.write(line)
        if self._witness is not None:
            self._witness.fingerprint(line)

    def close(self) -> None:
        if self._lines is not None:
            self._lines.close()


def named_words(names: Sequence[str], words: jax.Array | np.ndarray) -> dict[str, str]:
    """The words of each parameter, in hex."""
    rows = np.asarray(words).astype(">u4")
    return {name: row.tobytes().hex() for name, row in zip(names, rows, strict=True)}


def fingerprints(run: Run) -> dict[int, dict[str, Any]]:
    """The lines of a run's `fingerprints.jsonl` by step; a line cut short by a kill is left out."""
    if not run.fingerprints.exists():
        return {}
    lines = read_lines(run.fingerprints)
    return {line["step"]: line for line in lines if isinstance(line.get("parameters"), dict)}


def _code() -> dict[str, Any]:
    """The commit of the clone, if it is one, and a hash of the sources, whatever git says."""
    digest = hashlib.sha256()
    for path in sorted(path for part in SOURCES for path in (ROOT / part).rglob("*.py")):
        digest.update(f"{path.relative_to(ROOT)} {path.stat().st_size} ".encode())
        digest.update(path.read_bytes())
    commit = dirty = None
    if _git("rev-parse", "--show-toplevel") == str(ROOT):  # not a repository around it
        commit, dirty = _git("rev-parse", "HEAD"), bool(_git("status", "--porcelain", *SOURCES))
    return {"commit": commit, "dirty": dirty, "sources": digest.hexdigest()}


def _git(*arguments: str) -> str | None:
    try:
        found = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, encoding="utf-8", errors="replace"
        )
    except OSError:  # no git here
        return None
    return found.stdout.strip() if found.returncode == 0 else None


def _packages() -> dict[str, str]:
    versions = {found.name.lower().replace("_", "-"): found.version for found in distributions()}
    wanted = lambda name: name in PACKAGES or name.startswith(PACKAGE_FAMILIES)  # noqa: E731
    return {name: versions[name] for name in sorted(versions) if wanted(name)}


def _processor() -> dict[str, Any]:
    """Kernels are chosen by the instructions of a processor, and work is split over its cores."""
    name, cores = platform.processor(), os.cpu_count()
    if sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        name, cores = (models or [name])[0], len(os.sched_getaffinity(0))
    return {"name": name, "cores": cores}
