"""Record the environment of a run and fingerprints of its parameters."""

import functools
import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from heedful.train import code_record
from heedful.train.config_json import differences, write_json
from heedful.train.growing_files import Lines, keep_damaged, read_lines
from heedful.train.hosts import is_first
from heedful.train.observers import Observer
from heedful.train.run import Run, with_defaults

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("model", "data", "train")
PACKAGES = ("flax", "optax", "orbax-checkpoint", "grain", "numpy", "tokenizers", "safetensors")
PACKAGE_FAMILIES = ("jax", "libtpu", "nvidia-")  # compilers, runtimes, kernels
VARIABLES = ("XLA_", "LIBTPU_", "JAX_", "NCCL_", "CUBLAS_", "CUDNN_", "NVIDIA_TF32", "NPROC")
INCIDENTAL = ("from_step", "command", "own_code_files")
"""Keys of an environment that do not affect results."""


def environment(run: Run, mesh: Mesh, data: Mapping[str, str]) -> dict[str, Any]:
    """Return everything in this process that results depend on; `data`: fingerprints by split."""
    device = mesh.devices.flat[0]
    return {
        "command": sys.argv,
        "config": run.values(),
        "data": {**data, "tokenizer": run.tokenizer().fingerprint},
        "code": _code(),
        **code_record.record(run.values(), run.experiment_file),
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
    """Return the environments of a run in order, each with its first step as "from_step"."""
    return _environments(directory)[0]


def _environments(directory: Path) -> tuple[list[dict[str, Any]], str | None]:
    """Return (environments, None), or ([], the problem) for a damaged file."""
    path = directory / "environment.json"
    if not path.exists():
        return [], None
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        return [], str(error)
    values = [{"from_step": 0, **values}] if isinstance(values, dict) else values
    is_valid = lambda one: isinstance(one, dict) and type(one.get("from_step")) is int  # noqa: E731
    if isinstance(values, list) and all(map(is_valid, values)):
        return [_of_today(one) for one in values], None
    return [], "it is not a list of environments"


def _of_today(environment: dict[str, Any]) -> dict[str, Any]:
    if "config" not in environment:
        return environment
    return {**environment, "config": with_defaults(environment["config"])}


def data_record(run: Run) -> dict[str, str]:
    """Return the known fingerprints of the run's data, by split.

    The test data may change after training: its fingerprint is left out if `data.test` has changed.
    """
    last = (environments(run.directory) or [{}])[-1]
    known = dict(last.get("data", {}))
    if last.get("config", {}).get("data", {}).get("test") != list(run.data.test):
        known.pop("test", None)
    return known


def add_environment(run: Run, now: dict[str, Any], from_step: int, console: Console) -> None:
    """Add `now` to the record if it differs from the last environment; print the differences."""
    known, problem = _environments(run.directory)
    if problem and is_first():
        keep_damaged(run.directory / "environment.json", problem)
    new = changes(known[-1], now) if known else []
    for change in new:
        console.print(f"resuming in another environment: {change}", style="yellow")
    if (new or not known) and is_first():
        write_json(run.directory / "environment.json", [*known, {"from_step": from_step, **now}])


def changes(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Describe the differences between two environments, one line each."""
    if "test" not in then.get("data", {}):  # Older records lack the test data.
        now = {**now, "data": {k: v for k, v in now.get("data", {}).items() if k != "test"}}
    new, old = (
        {name: value for name, value in environment.items() if name not in INCIDENTAL}
        for environment in (now, then)
    )
    return sorted(differences(new, old))


class FingerprintWriter(Observer):
    """Observer that writes `fingerprints.jsonl` on the first process, and tells other observers.

    A line has the `step`, the bits of `loss` and `weight` (sums over the batch; missing at step 0),
    and in `parameters` the fingerprint of each parameter by name. Bits and fingerprints are
    hexadecimal. On every process, `observers` receive the line.
    """

    def __init__(
        self, run: Run, from_step: int, names: Sequence[str], observers: Sequence[Observer]
    ):
        """Drop the lines of steps after `from_step`: the run repeats these steps."""
        self._names, self._observers, self._lines = names, observers, None
        if is_first():
            self._lines = Lines(run.fingerprints, from_step)

    def on_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        if "fingerprint" in metrics:
            self.write(step, metrics["fingerprint"], metrics)

    def write(self, step: int, words: jax.Array, metrics: Mapping[str, Any] | None = None) -> None:
        """Write the hash words of the parameters, and the sums in the `metrics` of a step."""
        line: dict[str, Any] = {"step": step}
        for name in ("loss", "weight") if metrics else ():
            line[name] = np.asarray(metrics[name], ">f4").tobytes().hex()  # type: ignore[index]
        line["parameters"] = named_words(self._names, words)
        if self._lines is not None:
            self._lines.write(line)
        for observer in self._observers:
            observer.on_fingerprint(line)

    def close(self) -> None:
        if self._lines is not None:
            self._lines.close()


def named_words(names: Sequence[str], words: jax.Array | np.ndarray) -> dict[str, str]:
    """Return the fingerprint of each parameter in hexadecimal, from its two hash words."""
    rows = np.asarray(words).astype(">u4")
    return {name: row.tobytes().hex() for name, row in zip(names, rows, strict=True)}


def fingerprints(run: Run) -> dict[int, dict[str, Any]]:
    """Read `fingerprints.jsonl` by step; an incomplete last line is left out."""
    if not run.fingerprints.exists():
        return {}
    lines = read_lines(run.fingerprints)
    return {line["step"]: line for line in lines if isinstance(line.get("parameters"), dict)}


def _code() -> dict[str, Any]:
    """Return the commit of the clone, if this is a clone, and a hash of the sources."""
    digest = hashlib.sha256()
    for path in sorted(path for part in SOURCES for path in (ROOT / part).rglob("*.py")):
        digest.update(f"{path.relative_to(ROOT)} {path.stat().st_size} ".encode())
        digest.update(path.read_bytes())
    commit = dirty = None
    if _git("rev-parse", "--show-toplevel") == str(
        ROOT
    ):  # The clone itself, not a repository around it.
        commit, dirty = _git("rev-parse", "HEAD"), bool(_git("status", "--porcelain", *SOURCES))
    return {"commit": commit, "dirty": dirty, "sources": digest.hexdigest()}


def _git(*arguments: str) -> str | None:
    try:
        result = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, encoding="utf-8", errors="replace"
        )
    except OSError:  # git is not installed.
        return None
    return result.stdout.strip() if result.returncode == 0 else None


@functools.cache  # To read all metadata takes half a second.
def _packages() -> dict[str, str]:
    versions = {dist.name.lower().replace("_", "-"): dist.version for dist in distributions()}
    matters = lambda name: name in PACKAGES or name.startswith(PACKAGE_FAMILIES)  # noqa: E731
    return {name: versions[name] for name in sorted(versions) if matters(name)}


def _processor() -> dict[str, Any]:
    """Describe the processor: its type affects kernels, its number of cores the split of work."""
    name, cores = platform.processor(), os.cpu_count()
    if sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        name, cores = (models or [name])[0], len(os.sched_getaffinity(0))
    return {"name": name, "cores": cores}
