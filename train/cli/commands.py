"""What each command of the command line does with a run."""

import dataclasses
import json
import os
import re
from functools import partial
from pathlib import Path
from typing import Any

from heedful.data.config import DataConfig
from heedful.data.text_files import one_line
from heedful.model.config import ModelConfig
from heedful.train.cli import flags
from heedful.train.cli.arguments import (
    AttentionArguments,
    ClassifyArguments,
    ConfigMasksArguments,
    DecodeArguments,
    EvaluateArguments,
    ImportArguments,
    InspectArguments,
    LoadArguments,
    MasksArguments,
    PlanArguments,
    ReproduceArguments,
    TrainArguments,
    VerifyArguments,
)
from heedful.train.cli.flags import early
from heedful.train.cli.terminal import console, print_lines, read_lines
from heedful.train.config import TrainConfig, TrainError

LOAD_FIELDS = {entry.name for entry in dataclasses.fields(LoadArguments)}


def train(name: str, experiment: Any, description: str, arguments: list[str]) -> None:
    """heedful train CONFIG"""
    arguments = [re.sub("^--init[-_]from(?=$|=)", "--train.init-from", a) for a in arguments]
    default = TrainArguments(
        model=_adopted(experiment.model, experiment.train, arguments),
        data=experiment.data,
        train=experiment.train,
        run_dir=Path("runs") / name.replace(":", "/"),
    )
    chosen = parse(default, arguments, f"heedful train {name}", description)

    keep_compiled()
    from heedful.train.audit.report import audit_before_training
    from heedful.train.evaluation.evaluate import report
    from heedful.train.hosts import primary_first
    from heedful.train.load import load
    from heedful.train.loop import fit
    from heedful.train.start import start_run

    parts = chosen.run_dir, chosen.model, chosen.data, chosen.train
    run = primary_first(lambda: start_run(*parts, console()))
    if chosen.audit:
        audit_before_training(run.model, run.data, console())
    fit(run, console(), fallback=chosen.fallback)
    trained = load(run.directory, console(), fallback=chosen.fallback)
    report(trained, run.train.decode, console())


def evaluate(directory: str, arguments: list[str]) -> None:
    """heedful evaluate RUN: other settings than those of the training write to evaluations/"""
    chosen = _parse_for_run(EvaluateArguments, directory, arguments, "evaluate")
    from heedful.train.evaluation.evaluate import evaluation_directory, report

    trained = _load(directory, chosen)
    settings = {name: value for name, value in vars(chosen).items() if name != "decode"}
    report(
        trained,
        chosen.decode,
        console(),
        seed=chosen.seed,
        stride=chosen.stride,
        other_data=chosen.other_data,
        directory=evaluation_directory(trained.run, chosen.decode, **settings),
    )


def translate(directory: str, arguments: list[str]) -> None:
    """heedful translate RUN: a line out for each line of standard input"""
    chosen = _parse_for_run(DecodeArguments, directory, arguments, "translate")
    from heedful.train.inference.translate import Translator

    lines = read_lines()
    trained = _load(directory, chosen, stderr=True)
    translations = Translator(*_parts(trained, chosen), **_warning(trained))(lines)
    _warn_unknown(trained, lines)
    print_lines(translations)


def generate(directory: str, arguments: list[str]) -> None:
    """heedful generate RUN ["text"]: goes on with a text, or with each line of standard input"""
    text, arguments = _text(arguments)
    chosen = _parse_for_run(DecodeArguments, directory, arguments, "generate")
    from heedful.train.hosts import is_first
    from heedful.train.inference.generate import Generator

    lines = read_lines() if text is None else []
    trained = _load(directory, chosen, stderr=True)
    is_prefix = "prefix_len" in trained.run.data.objective_spec.arrays
    generator = Generator(*_parts(trained, chosen), prefix=is_prefix, **_warning(trained))
    _warn_unknown(trained, lines if text is None else [text])
    if text is None:
        whole = [line + rest for line, rest in zip(lines, generator(lines), strict=True)]
        print_lines(map(one_line, whole))
        return
    show = partial(print, end="", flush=True) if is_first() else lambda _: None
    pieces = generator.stream(text)
    show(text)
    for piece in pieces:
        show(piece)
    show("\n")


def classify(directory: str, arguments: list[str]) -> None:
    """heedful classify RUN ["text"]: the class of a text, or of each line of standard input"""
    text, arguments = _text(arguments)
    chosen = _parse_for_run(ClassifyArguments, directory, arguments, "classify")
    from heedful.train.hosts import from_first
    from heedful.train.inference.classify import Classifier, trained_on_pairs

    lines = read_lines() if text is None else [text]
    trained = _load(directory, chosen, stderr=True)
    pairs = {"trained": None, "pair": True, "text": False}[chosen.tab]
    if pairs is None and any("\t" in line for line in lines):
        pairs = json.loads(from_first(json.dumps(trained_on_pairs(trained))))
        if pairs is None:
            console(stderr=True).print(
                "it is not known whether the training data had pairs: a tab is taken to stand "
                "between two texts (--tab pair; --tab text makes it a part of the text)"
            )
    answers = Classifier(trained, pairs)(lines)
    _warn_unknown(trained, [line.replace("\t", " ") for line in lines])
    print_lines(answers)


def attention(directory: str, arguments: list[str]) -> None:
    """heedful attention RUN "text": a picture of who looks at whom"""
    text, arguments = _text(arguments)
    if text is None and not helps(arguments):
        raise TrainError("heedful attention needs a run directory and a text")
    from heedful.train.inspection.attention_picture import attention_picture

    chosen = _parse_for_run(AttentionArguments, directory, arguments, "attention")
    entries = dataclasses.fields(AttentionArguments)
    own = {e.name: getattr(chosen, e.name) for e in entries if e.name not in LOAD_FIELDS}
    attention_picture(_load(directory, chosen), text or "", console(), **own)


def inspect(name: str, experiment: Any, arguments: list[str]) -> None:
    """heedful inspect CONFIG|RUN"""
    from heedful.train.inspection import inspect as inspection
    from heedful.train.run import Run

    whole = experiment or Run.open(name)
    model = _adopted(whole.model, whole.train, arguments) if experiment else whole.model
    default = InspectArguments(model=model, data=whole.data, train=whole.train)
    chosen = parse(default, arguments, f"heedful inspect {name}")
    inspection.inspect(name, console=console(), **vars(chosen))


def masks(name: str, experiment: Any, arguments: list[str]) -> int:
    """heedful masks CONFIG|RUN; returns the exit code, 1 where something is wrong"""
    from heedful.train.audit import report

    if experiment:
        keep_compiled()
        model = _adopted(experiment.model, experiment.train, arguments)
        default = ConfigMasksArguments(model=model, data=experiment.data)
        chosen = parse(default, arguments, f"heedful masks {name}")
        model, data, trained = chosen.model, chosen.data, None
        output = chosen.output or Path(f"{name}.masks.png")
    else:
        import jax

        chosen = _parse_for_run(MasksArguments, name, arguments, "masks")
        loaded = _load(name, chosen)
        model, data = loaded.run.model, loaded.run.data
        trained = (jax.device_get(loaded.params), loaded.tokenizer)
        output = chosen.output or Path(name) / "masks.png"
    own = {"length": chosen.length, "cores": chosen.cores, "output": output}
    return int(not report.masks(name, model, data, console(), trained=trained, **own))


def reproduce(directory: str, arguments: list[str]) -> int:
    """heedful reproduce RUN; returns the exit code, 1 where the bits differ"""
    keep_compiled()
    from heedful.train.reproducibility import reproduce as again

    chosen = parse(ReproduceArguments(), arguments, f"heedful reproduce {directory}")
    return int(not again.reproduce(Path(directory), console(), **vars(chosen)))


def verify(directory: str, arguments: list[str]) -> int:
    """heedful verify RUN; returns the exit code, 1 where the bits differ"""
    keep_compiled()
    from heedful.train.reproducibility import reproduce as again

    chosen = parse(VerifyArguments(), arguments, f"heedful verify {directory}")
    return int(not again.verify(Path(directory), console(), **vars(chosen)))


def plan(name: str, experiment: Any, arguments: list[str]) -> int:
    """heedful plan CONFIG|RUN; returns the exit code, 1 where it does not fit"""
    from heedful.train.plan import report
    from heedful.train.plan.search import search
    from heedful.train.run import Run

    whole = experiment or Run.open(name)
    model = _adopted(whole.model, whole.train, arguments) if experiment else whole.model
    default = PlanArguments(model=model, data=whole.data, train=whole.train)
    chosen = parse(default, arguments, f"heedful plan {name}")
    own: dict[str, Any] = {"topology": chosen.topology}
    own |= {"compiles": chosen.compiles} if chosen.search else {}
    make = search if chosen.search else report.plan
    return int(not make(name, chosen.model, chosen.data, chosen.train, console(), **own))


def import_(source: str, arguments: list[str]) -> None:
    """heedful import hf:DIR --run-dir RUN"""
    keep_compiled()
    from heedful.train.conversion.exchange import default_data, import_run
    from heedful.train.conversion.generation_config import describe, follow
    from heedful.train.conversion.init_from import open_source

    opened = open_source(source, console())
    decode, fields, left = follow(
        opened.generation, opened.model.architecture, opened.tokenizer.ends
    )
    directory, data = Path("runs") / opened.label, default_data(opened.model)
    default = ImportArguments(run_dir=directory, data=data, decode=decode)
    chosen = parse(default, arguments, f"heedful import {source}")
    for line in describe(chosen.decode, fields, left):
        console().print(line)
    import_run(opened, chosen.run_dir, chosen.data, chosen.decode, console())


def export(directory: str, arguments: list[str]) -> None:
    """heedful export RUN DIR: safetensors, config.json and tokenizer for transformers"""
    target, arguments = _text(arguments)
    if target is None and not helps(arguments):
        raise TrainError("heedful export needs a run directory and the directory to write")
    chosen = _parse_for_run(LoadArguments, directory, arguments, "export")
    from heedful.train.conversion.exchange import export_run

    export_run(_load(directory, chosen), Path(target or ""), console())


def _adopted(model: ModelConfig, train: TrainConfig, arguments: list[str]) -> ModelConfig:
    """The model of an experiment, with the body of what it begins from if it fine-tunes."""
    init_from = early(arguments, "--train.init-from") or train.init_from
    if init_from in (None, "None") or helps(arguments):
        return model
    from heedful.train.conversion.init_from import merge_pretrained_config, open_source

    return merge_pretrained_config(model, open_source(init_from, console()).model)


def parse(default: Any, arguments: list[str], program: str, description: str = "") -> Any:
    """The flags over the defaults, with the home directory for each ~ that begins a path."""
    chosen, home = flags.parse(default, arguments, program, description), os.path.expanduser
    from heedful.train.paths import data_paths, train_paths

    changed: dict[str, Any] = {}
    for name, value in vars(chosen).items():
        if isinstance(value, Path):
            changed[name] = value.expanduser()
        elif isinstance(value, DataConfig):
            changed[name] = data_paths(value, home)
        elif isinstance(value, TrainConfig):
            changed[name] = train_paths(value, home)
    return dataclasses.replace(chosen, **changed)


def _parse_for_run(kind: Any, directory: str, arguments: list[str], command: str) -> Any:
    """The flags of a command whose defaults are those of the run."""
    keep_compiled()
    from heedful.train.run import Run

    has_decode = any(entry.name == "decode" for entry in dataclasses.fields(kind))
    run = Run.open(directory)
    default = kind(decode=run.train.decode) if has_decode else kind()
    return parse(default, arguments, f"heedful {command} {directory}")


def _load(directory: str, chosen: LoadArguments, stderr: bool = False) -> Any:
    from heedful.train.load import load

    return load(
        Path(directory), console(stderr), checkpoint=chosen.checkpoint, fallback=chosen.fallback
    )


def _parts(trained: Any, chosen: DecodeArguments) -> tuple[Any, ...]:
    """What writes texts: model, how, tokenizer, parameters, mesh and seed."""
    model, tokenizer = trained.run.model, trained.tokenizer
    return model, chosen.decode, tokenizer, trained.params, trained.mesh, chosen.seed


def _warn_unknown(trained: Any, lines: list[str]) -> None:
    """Says how many of the texts have something that the tokenizer does not know."""
    tokenizer = trained.tokenizer
    counts = [tokenizer.count_unknown(ids) for ids in tokenizer.encode_batch(lines)]
    found = [number for number, count in enumerate(counts, 1) if count]
    if found:
        console(stderr=True).print(
            f"{sum(counts):,} tokens in {len(found):,} of {len(lines):,} lines, the first in line "
            f"{found[0]:,}, are {tokenizer.name(tokenizer.unknown)}: the vocabulary lacks what the "
            "text has there",
            style="yellow",
        )


def _warning(trained: Any) -> dict[str, Any]:
    """How long the rows of the training were, if that is known, and where a user is warned."""
    from heedful.train.reproducibility.record import data_record

    is_known = "train" in data_record(trained.run)
    return {
        "longest": trained.run.data.max_length if is_known else None,
        "tell": partial(console(stderr=True).print, style="yellow", markup=False),
    }


def helps(arguments: list[str]) -> bool:
    return "--help" in arguments or "-h" in arguments


def _text(arguments: list[str]) -> tuple[str | None, list[str]]:
    """The text that may stand before the flags, and the flags."""
    if arguments and arguments[0] != "-h" and not arguments[0].startswith("--"):
        return arguments[0], arguments[1:]
    return None, arguments


def keep_compiled() -> None:
    """What XLA compiles is kept for the next process, and what it leaves behind is not."""
    import jax

    from heedful.data.packages import cache
    from heedful.train.cpu_allocator import keep_in_place

    keep_in_place()
    jax.config.update("jax_compilation_cache_dir", str(cache() / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
