"""Commands of the command line: each reads its flags and calls the function that does the work."""

import dataclasses
import json
import re
from functools import partial
from pathlib import Path
from typing import Any

from heedful.data.text_files import one_line
from heedful.train.cli.arguments import (
    AttentionArguments,
    ClassifyArguments,
    ConfigMasksArguments,
    ConfigsArguments,
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
from heedful.train.cli.experiments import Named
from heedful.train.cli.flags import early
from heedful.train.cli.prepare import (
    helps,
    keep_compiled,
    load_run,
    parse,
    parse_for_run,
    split_text,
    with_pretrained_body,
)
from heedful.train.cli.terminal import answer_each, console, lines_of, print_lines
from heedful.train.config_json import to_json
from heedful.train.errors import TrainError

LOAD_FIELDS = {entry.name for entry in dataclasses.fields(LoadArguments)}


def configs(named: Named, arguments: list[str]) -> None:
    """heedful configs CONFIG: describe the experiment; with --json print its config"""
    chosen = parse(ConfigsArguments(), arguments, f"heedful configs {named.name}")
    if chosen.json:
        print(json.dumps(to_json(named.experiment), indent=1))
        return
    print(named.description.strip() or f"{named.label} has no description")
    if named.rows:
        print(f"\nrows, as in {named.label}:{named.rows[0]}: {', '.join(named.rows)}")


def train(named: Named, arguments: list[str]) -> None:
    """heedful train CONFIG"""
    experiment = named.experiment
    arguments = _in_full(arguments)
    default = TrainArguments(
        model=with_pretrained_body(experiment.model, experiment.train, arguments),
        data=experiment.data,
        train=experiment.train,
        run_dir=Path("runs") / named.label.replace(":", "/"),
    )
    _train(parse(default, arguments, f"heedful train {named.name}", named.description), named.file)


def resume(directory: str, arguments: list[str]) -> None:
    """heedful train RUN: resume a run; with another --run-dir, start a new run with its config"""
    arguments = _in_full(arguments)
    from heedful.train.run import Run

    run = Run.open(directory)
    model, train = run.model, run.train
    if early(arguments, "--train.init-from"):
        train = dataclasses.replace(train, reinit=())
        model = with_pretrained_body(model, train, arguments)
    default = TrainArguments(model=model, data=run.data, train=train, run_dir=Path(directory))
    description = f"Resume {directory}. With another --run-dir, start a new run with its config."
    chosen = parse(default, arguments, f"heedful train {directory}", description)
    if chosen.run_dir.resolve() != Path(directory).resolve():
        chosen = _without_results(chosen, run)
    elif early(arguments, "--train.init-from"):
        raise TrainError(
            f"heedful train {directory} --init-from starts a new run: give it another --run-dir"
        )
    _train(chosen, run.experiment_file)


def _in_full(arguments: list[str]) -> list[str]:
    """Return the arguments with --train.init-from in place of its short form, --init-from."""
    return [re.sub("^--init[-_]from(?=$|=)", "--train.init-from", each) for each in arguments]


def _without_results(chosen: TrainArguments, run: Any) -> TrainArguments:
    """Return the arguments of a new run without the values that the data of `run` decided."""
    model, data, train = chosen.model, chosen.data, chosen.train
    if train.init_from is None and model.vocab_size == run.tokenizer().vocab_size:
        model = dataclasses.replace(model, vocab_size=None)
    if (data.source, data.train) != (run.data.source, run.data.train):
        if data.classes == run.data.classes:
            data = dataclasses.replace(data, classes=())
        if model.head.kind == "classifier":
            head = dataclasses.replace(model.head, outputs=None)
            model = dataclasses.replace(model, head=head)
    if train.checkpoints is not None and train.checkpoints == run.train.checkpoints:
        train = dataclasses.replace(train, checkpoints=None)
    return dataclasses.replace(chosen, model=model, data=data, train=train)


def _train(chosen: TrainArguments, experiment_file: Path | None) -> None:
    """Train a run or resume it, draw its curves, and evaluate it."""
    keep_compiled()
    from heedful.train.evaluation.evaluate import report
    from heedful.train.fit import train_run
    from heedful.train.hosts import primary_first
    from heedful.train.start import start_run

    parts = chosen.run_dir, chosen.model, chosen.data, chosen.train
    run = primary_first(lambda: start_run(*parts, console(), experiment_file=experiment_file))
    train_run(
        run,
        console(),
        audit=chosen.audit,
        fallback=chosen.fallback,
        evaluate=lambda trained: report(trained, run.train.decode, console()),
    )


def evaluate(directory: str, arguments: list[str]) -> None:
    """heedful evaluate RUN: with other settings than the run's, write scores to evaluations/"""
    chosen = parse_for_run(EvaluateArguments, directory, arguments, "evaluate")
    from heedful.train.evaluation.evaluate import evaluation_directory, report

    trained = load_run(directory, chosen)
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
    """heedful translate RUN ["text"]: translate a text, or each line of standard input"""
    text, arguments = split_text(arguments)
    chosen = parse_for_run(DecodeArguments, directory, arguments, "translate")
    from heedful.train.inference.translate import Translator

    lines = lines_of(text)
    trained = load_run(directory, chosen, stderr=True)
    translator = _writer(Translator, trained, chosen)

    def answer(lines: list[str]) -> None:
        translations = translator(lines)
        _warn_unknown(trained, lines)
        print_lines(translations)

    answer_each(lines, answer)


def generate(directory: str, arguments: list[str]) -> None:
    """heedful generate RUN ["text"]: continue a text, or each line of standard input"""
    text, arguments = split_text(arguments)
    chosen = parse_for_run(DecodeArguments, directory, arguments, "generate")
    from heedful.train.hosts import is_first
    from heedful.train.inference.generate import Generator

    lines = lines_of(text)
    trained = load_run(directory, chosen, stderr=True)
    has_prefix = trained.run.data.objective_spec.has_prefix
    generator = _writer(Generator, trained, chosen, prefix=has_prefix)
    show = partial(print, end="", flush=True) if is_first() else lambda _: None

    def answer(lines: list[str]) -> None:
        _warn_unknown(trained, lines)
        if text is None and not is_asked:
            whole = [line + rest for line, rest in zip(lines, generator(lines), strict=True)]
            print_lines(map(one_line, whole))
            return
        for line in lines:
            # A beam search has its text only at the end.
            pieces = generator.stream(line) if chosen.decode.beam == 1 else generator([line])
            show(line)
            for piece in pieces:
                show(piece)
            show("\n")

    is_asked = lines is None
    answer_each(lines, answer)


def classify(directory: str, arguments: list[str]) -> None:
    """heedful classify RUN ["text"]: classify a text, or each line of standard input"""
    text, arguments = split_text(arguments)
    chosen = parse_for_run(ClassifyArguments, directory, arguments, "classify")
    from heedful.train.hosts import from_first
    from heedful.train.inference.classify import Classifier, trained_on_pairs

    lines = lines_of(text)
    trained = load_run(directory, chosen, stderr=True)
    pairs = {"trained": None, "pair": True, "text": False}[chosen.tab]
    if pairs is None and lines is not None and any("\t" in line for line in lines):
        pairs = json.loads(from_first(json.dumps(trained_on_pairs(trained))))
        if pairs is None:
            console(stderr=True).print(
                "it is unknown if the training data had pairs: a tab separates two texts (--tab "
                "pair); with --tab text it is a part of the text"
            )
    classifier = Classifier(trained, pairs)

    def answer(lines: list[str]) -> None:
        answers = classifier(lines)
        _warn_unknown(trained, [line.replace("\t", " ") for line in lines])
        print_lines(answers)

    answer_each(lines, answer)


def attention(directory: str, arguments: list[str]) -> None:
    """heedful attention RUN "text": draw the attention weights of a text"""
    text, arguments = split_text(arguments)
    if text is None and not helps(arguments):
        raise TrainError(f'heedful attention needs a text: heedful attention {directory} "text"')
    from heedful.train.inspection.attention_picture import attention_picture

    chosen = parse_for_run(AttentionArguments, directory, arguments, "attention")
    entries = dataclasses.fields(AttentionArguments)
    own = {e.name: getattr(chosen, e.name) for e in entries if e.name not in LOAD_FIELDS}
    attention_picture(load_run(directory, chosen), text or "", console(), **own)


def inspect(target: str, named: Named | None, arguments: list[str]) -> None:
    """heedful inspect CONFIG|RUN"""
    from heedful.train.inspection import inspect as inspection
    from heedful.train.run import Run

    name, experiment = (named.label, named.experiment) if named else (target, None)
    whole = experiment or Run.open(name)
    model = with_pretrained_body(whole.model, whole.train, arguments) if experiment else whole.model
    default = InspectArguments(model=model, data=whole.data, train=whole.train)
    chosen = parse(default, arguments, f"heedful inspect {target}")
    inspection.inspect(name, console=console(), **vars(chosen))


def masks(target: str, named: Named | None, arguments: list[str]) -> int:
    """heedful masks CONFIG|RUN: return the exit code, 1 if the audit has findings"""
    from heedful.train.audit import report

    name, experiment = (named.label, named.experiment) if named else (target, None)
    if experiment:
        keep_compiled()
        model = with_pretrained_body(experiment.model, experiment.train, arguments)
        default = ConfigMasksArguments(model=model, data=experiment.data)
        chosen = parse(default, arguments, f"heedful masks {target}")
        model, data, trained = chosen.model, chosen.data, None
        output = chosen.output or Path(f"{name}.masks.png")
    else:
        import jax

        chosen = parse_for_run(MasksArguments, name, arguments, "masks")
        loaded = load_run(name, chosen)
        model, data = loaded.run.model, loaded.run.data
        trained = (jax.device_get(loaded.params), loaded.tokenizer)
        output = chosen.output or Path(name) / "masks.png"
    own = {"length": chosen.length, "cores": chosen.cores, "output": output}
    return int(not report.masks(name, model, data, console(), trained=trained, **own))


def reproduce(directory: str, arguments: list[str]) -> int:
    """heedful reproduce RUN: return the exit code, 1 if the bits differ"""
    keep_compiled()
    from heedful.train.reproducibility import reproduce as again

    chosen = parse(ReproduceArguments(), arguments, f"heedful reproduce {directory}")
    return int(not again.reproduce(Path(directory), console(), **vars(chosen)))


def verify(directory: str, arguments: list[str]) -> int:
    """heedful verify RUN: return the exit code, 1 if the bits differ"""
    keep_compiled()
    from heedful.train.reproducibility import reproduce as again

    chosen = parse(VerifyArguments(), arguments, f"heedful verify {directory}")
    return int(not again.verify(Path(directory), console(), **vars(chosen)))


def plan(target: str, named: Named | None, arguments: list[str]) -> int:
    """heedful plan CONFIG|RUN: return the exit code, 1 if the step does not fit in memory"""
    from heedful.train.plan import report
    from heedful.train.plan.search import search
    from heedful.train.run import Run

    name, experiment = (named.label, named.experiment) if named else (target, None)
    whole = experiment or Run.open(name)
    model = with_pretrained_body(whole.model, whole.train, arguments) if experiment else whole.model
    default = PlanArguments(model=model, data=whole.data, train=whole.train)
    chosen = parse(default, arguments, f"heedful plan {target}")
    own: dict[str, Any] = {"topology": chosen.topology}
    own |= {"compiles": chosen.compiles} if chosen.search else {}
    make = search if chosen.search else report.plan
    return int(not make(name, chosen.model, chosen.data, chosen.train, console(), **own))


def import_(source: str, arguments: list[str]) -> None:
    """heedful import hf:DIR --run-dir RUN: convert a Hugging Face model to a run"""
    keep_compiled()
    from heedful.train.conversion.generation_config import describe, follow
    from heedful.train.conversion.import_run import default_data, import_run
    from heedful.train.conversion.source import open_source

    opened = open_source(source, console())
    decode, fields, left = follow(
        opened.generation,
        opened.model.architecture,
        opened.tokenizer.ends,
        opened.generation_file,
    )
    directory, data = Path("runs") / opened.label, default_data(opened.model)
    default = ImportArguments(run_dir=directory, data=data, decode=decode)
    chosen = parse(default, arguments, f"heedful import {source}")
    for line in describe(chosen.decode, fields, left):
        console().print(line)
    import_run(opened, chosen.run_dir, chosen.data, chosen.decode, console())


def export(directory: str, arguments: list[str]) -> None:
    """heedful export RUN DIR: write safetensors, config.json and tokenizer for transformers"""
    target, arguments = split_text(arguments)
    if target is None and not helps(arguments):
        raise TrainError(f"heedful export needs an output: heedful export {directory} DIR")
    chosen = parse_for_run(LoadArguments, directory, arguments, "export")
    from heedful.train.conversion.export_run import export_run

    export_run(load_run(directory, chosen), Path(target or ""), console())


def _writer(kind: Any, trained: Any, chosen: DecodeArguments, **own: Any) -> Any:
    """Return a Translator or Generator (`kind`) that warns of texts longer than in training."""
    from heedful.train.reproducibility.record import data_record

    is_known = "train" in data_record(trained.run)
    return trained.writer(
        kind,
        chosen.decode,
        chosen.seed,
        longest=trained.run.data.max_length if is_known else None,
        tell=partial(console(stderr=True).print, style="yellow"),
        **own,
    )


def _warn_unknown(trained: Any, lines: list[str]) -> None:
    """Warn of tokens that stand for text outside of the vocabulary."""
    tokenizer = trained.tokenizer
    counts = [tokenizer.count_unknown(ids) for ids in tokenizer.encode_batch(lines)]
    found = [number for number, count in enumerate(counts, 1) if count]
    if found:
        console(stderr=True).print(
            f"{sum(counts):,} tokens in {len(found):,} of {len(lines):,} lines, the first in line "
            f"{found[0]:,}, are {tokenizer.name(tokenizer.unknown)}: the vocabulary lacks these "
            "parts of the text",
            style="yellow",
        )
