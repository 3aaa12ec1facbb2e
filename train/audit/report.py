"""`heedful masks`: audit the masks of a model, draw them, and print the findings."""

import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from heedful.data.config import DataConfig
from heedful.data.tokenizer import Tokenizer
from heedful.model.attention import CORES, choose
from heedful.model.config import ModelConfig, ModelError
from heedful.train.audit.audit import Audit, audit
from heedful.train.audit.picture import MAX_TEXT, as_text, write_png
from heedful.train.audit.subject import Subject, with_core
from heedful.train.config import TrainConfig
from heedful.train.errors import TrainError, require
from heedful.train.inspection.pictures import SOFTWARE, require_ours
from heedful.train.start import require_fit


def masks(
    name: str,
    model: ModelConfig,
    data: DataConfig,
    console: Console,
    *,
    trained: tuple[Any, Tokenizer] | None = None,
    length: int | None = None,
    cores: bool = False,
    output: Path,
) -> bool:
    """Audit the masks, print the findings and draw a picture; return True without findings.

    `trained` is (parameters, tokenizer) of a run, `length` is the length of the rows, and `cores`
    audits all other attention cores too. Raises TrainError for a length below 8, and if `output` is
    a file that heedful did not write.
    """
    require(length is None or length >= 8, f"--length {length}: give at least 8")
    require_ours(output)
    require_fit(model, data, TrainConfig(label_smoothing=0.0))
    began = time.perf_counter()
    with console.status("auditing the masks"):
        audited = audit(Subject.of(model, data, length, trained))
    if audited.subject.batch["inputs"].shape[1] <= MAX_TEXT:
        console.print(as_text(audited))
    is_clean = _print(audited, console, began)
    write_png(audited, f"{name}: {_description(audited)}".replace("; ", "\n"), output, SOFTWARE)
    for core in CORES if cores else ():
        if _cores(audited) == [core]:
            continue
        began = time.perf_counter()
        try:
            other = with_core(model, core)
            require_fit(other, data, TrainConfig(label_smoothing=0.0))
            result = audit(Subject.of(other, data, length, trained))
        except (ModelError, TrainError) as error:
            console.print(f"core {core}: cannot run this model: {error}")
            continue
        is_clean &= _print(result, console, began)
    console.print(f"picture: {output}")
    return is_clean


def audit_before_training(model: ModelConfig, data: DataConfig, console: Console) -> None:
    """Run the small audit; raise TrainError for any finding."""
    began = time.perf_counter()
    try:
        result = audit(Subject.of(model, data), small=True)
    except ModelError as error:
        # The small model cannot run; the model to train may still be able to.
        console.print(f"masks: not audited: {error}", style="yellow")
        return
    if result.findings:
        listed = "\n".join(map(str, result.findings))
        raise TrainError(
            "the audit of the masks failed: heedful masks shows the details, --no-audit skips the "
            f"audit\n{listed}"
        )
    console.print(f"masks: audited, {_verdict(result, began)}")


def _print(result: Audit, console: Console, began: float) -> bool:
    console.print(f"{_description(result)}; audited: {', '.join(result.methods)}")
    for line in result.unsupported:
        console.print(f"not audited: {line}", style="yellow")
    for finding in result.findings:
        console.print(str(finding), style="red")
    console.print(f"masks: audited, {_verdict(result, began)}\n")
    return not result.findings


def _description(result: Audit) -> str:
    """Describe the core and the model that were audited."""
    return f"core {', '.join(_cores(result))}; {result.subject.note}"


def _cores(result: Audit) -> list[str]:
    model, length = result.subject.model, result.subject.batch["inputs"].shape[1]
    names = dict.fromkeys(model.attention.core_of(site) for site in model.sites)
    return [choose(name, jax.default_backend(), length)[0] for name in names]


def _verdict(result: Audit, began: float) -> str:
    kinds = [finding.kind for finding in result.findings]
    counts = {"leaks": "leak", "blind": "blindness", "other differences": "difference"}
    text = ", ".join(f"{kinds.count(kind)} {name}" for name, kind in counts.items())  # type: ignore
    rows, length = np.shape(result.subject.batch["inputs"])
    return f"{text} ({rows} rows of {length}, {time.perf_counter() - began:.1f} s)"
