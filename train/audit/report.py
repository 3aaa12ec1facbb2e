"""`heedful masks`: draws the masks, audits them, and says what is wrong."""

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
from heedful.train.audit.picture import TEXT, as_text, write_png
from heedful.train.audit.subject import Subject, with_core
from heedful.train.config import TrainConfig, TrainError, require
from heedful.train.inspection.attention_picture import SOFTWARE, require_ours
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
    """Prints and draws what the audit finds; returns whether it has found nothing."""
    require(length is None or length >= 8, f"--length must be at least 8, not {length}")
    require_ours(output)
    require_fit(model, data, TrainConfig(label_smoothing=0.0))
    began = time.perf_counter()
    with console.status("auditing the masks"):
        audited = audit(Subject.of(model, data, length, trained))
    if audited.subject.batch["inputs"].shape[1] <= TEXT:
        console.print(as_text(audited))
    clean = _say(audited, console, began)
    write_png(audited, f"{name}: {_what(audited)}".replace("; ", "\n"), output, SOFTWARE)
    for core in CORES if cores else ():
        if _cores(audited) == [core]:
            continue
        began = time.perf_counter()
        try:
            other = with_core(model, core)
            require_fit(other, data, TrainConfig(label_smoothing=0.0))
            found = audit(Subject.of(other, data, length, trained))
        except (ModelError, TrainError) as error:
            console.print(f"core {core}: cannot run this model: {error}", markup=False)
            continue
        clean &= _say(found, console, began)
    console.print(f"picture: {output}", markup=False)
    return clean


def audit_before_training(model: ModelConfig, data: DataConfig, console: Console) -> None:
    """The small audit; raises TrainError where something is wrong."""
    began = time.perf_counter()
    try:
        found = audit(Subject.of(model, data), small=True)
    except ModelError as error:
        # What keeps a small model from running may not concern the one that is trained.
        console.print(f"masks: not audited: {error}", style="yellow", markup=False)
        return
    if found.findings:
        listed = "\n".join(map(str, found.findings))
        raise TrainError(
            f"the audit of the masks has found something wrong: heedful masks shows it, "
            f"--no-audit trains all the same\n{listed}"
        )
    console.print(f"masks: audited, {_verdict(found, began)}", markup=False)


def _say(found: Audit, console: Console, began: float) -> bool:
    console.print(f"{_what(found)}; audited: {', '.join(found.ways)}", markup=False)
    for line in found.left_out:
        console.print(f"not audited: {line}", style="yellow", markup=False)
    for finding in found.findings:
        console.print(str(finding), style="red", markup=False)
    console.print(f"masks: audited, {_verdict(found, began)}\n", markup=False)
    return not found.findings


def _what(found: Audit) -> str:
    """The core and the model that were audited."""
    return f"core {', '.join(_cores(found))}; {found.subject.note}"


def _cores(found: Audit) -> list[str]:
    model, length = found.subject.model, found.subject.batch["inputs"].shape[1]
    names = dict.fromkeys(model.attention.core_of(site) for site in model.sites)
    return [choose(name, jax.default_backend(), length)[0] for name in names]


def _verdict(found: Audit, began: float) -> str:
    kinds = [finding.kind for finding in found.findings]
    counts = {"leaks": "leak", "blind": "blindness", "other differences": "difference"}
    said = ", ".join(f"{kinds.count(kind)} {name}" for name, kind in counts.items())  # type: ignore
    rows, length = np.shape(found.subject.batch["inputs"])
    return f"{said} ({rows} rows of {length}, {time.perf_counter() - began:.1f} s)"
