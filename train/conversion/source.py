"""Open a pretrained model: a directory of Hugging Face, a package, or a run."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from heedful.data import packages
from heedful.data.llama2c import read_llama2c
from heedful.data.special import Special, with_model_files
from heedful.data.tokenizer import Tokenizer
from heedful.model import pretrained
from heedful.model.config import LoraConfig, ModelConfig
from heedful.model.pretrained.tensors import CONFIG, read_json
from heedful.names import did_you_mean
from heedful.train.conversion import generation_config
from heedful.train.errors import TrainError
from heedful.train.hosts import to_host
from heedful.train.load import load
from heedful.train.run import Run

TOKENIZERS = ("tokenizer.json", "vocab.txt")
TWO_TOKENIZERS = ("source.spm", "target.spm")  # Files of the opus-mt models.


class Source(NamedTuple):
    """A pretrained model; `params` and `labels` read the files of the model when called."""

    name: str
    model: ModelConfig
    tokenizer: Tokenizer
    params: Callable[[], Any]
    labels: Callable[[], Sequence[str]] = tuple
    """Function that returns the class names of a classifier; () for other models."""
    notes: Sequence[str] = ()
    """Messages to the user about parts of the files that are left out or changed."""
    generation: Mapping[str, Any] = {}
    """Values of generation_config.json, or of the same keys in an older config.json."""
    generation_file: str = generation_config.FILE
    """Name of the file that has these values."""

    @property
    def label(self) -> str:
        """A short name: the last part of a path."""
        return Path(self.name.partition(":")[2] or self.name).name


def open_source(init_from: str, console: Console) -> Source:
    """Open the model that `train.init_from` names; raise TrainError, DataError or ModelError."""
    kind, _, rest = init_from.partition(":")
    if kind == "hf":
        return _open_directory(init_from, Path(rest).expanduser())
    if kind == "package":
        if rest not in PACKAGES:
            known = ", ".join(f"package:{name}" for name in PACKAGES)
            meant = did_you_mean(rest, PACKAGES)
            raise TrainError(f"unknown {init_from}: {meant}choose among {known}")
        return PACKAGES[rest](init_from)
    directory = Path(init_from).expanduser()
    run = Run.open(directory)
    return Source(
        init_from,
        dataclasses.replace(run.model, lora=LoraConfig()),
        run.tokenizer(),
        # Low-rank updates of the earlier run become part of its matrices.
        lambda: pretrained.merge_lora(run.model, to_host(load(directory, console).params))[1],
        lambda: run.data.classes,
    )


def _open_directory(name: str, directory: Path) -> Source:
    if not directory.is_dir():
        raise TrainError(
            f"{directory} is not a directory: give hf: and the directory of a Hugging Face model"
        )
    tokenizer_files = [directory / file for file in TOKENIZERS if (directory / file).is_file()]
    if not tokenizer_files and any((directory / file).is_file() for file in TWO_TOKENIZERS):
        raise TrainError(
            f"{directory} has {' and '.join(TWO_TOKENIZERS)}, a tokenizer for each language, but "
            "no tokenizer.json: models with two tokenizers cannot be imported (transformers' "
            "save_pretrained writes no tokenizer.json for them either). Choose a translation model "
            "with a tokenizer.json for both languages, such as T5"
        )
    if not tokenizer_files:
        raise TrainError(
            f"{directory} has neither {' nor '.join(TOKENIZERS)}: save the tokenizer of the model "
            "there (in transformers: AutoTokenizer.from_pretrained(...).save_pretrained(...))"
        )
    files = pretrained.ModelDirectory(directory)
    model = files.config
    tokenizer, notes = Tokenizer.load(tokenizer_files[0], model.vocab_size), files.notes
    if tokenizer.rowless:
        notes.append(
            f"{tokenizer_files[0]} has {', '.join(tokenizer.rowless)}, but the model has no "
            "embeddings for these tokens: texts must not contain them"
        )
    config = read_json(directory / CONFIG)
    generates = model.head.kind == "language_model" and model.architecture != "encoder_only"
    generation = generation_config.read(directory, config) if generates else {}
    kept = [key for key in config if key.endswith("_token_id") or key == "model_type"]
    ids = {CONFIG: {key: config[key] for key in kept}}
    generation_file = CONFIG
    if generates and (directory / generation_config.FILE).is_file():
        ids[generation_config.FILE], generation_file = generation, generation_config.FILE
    special, unused = with_model_files(
        tokenizer.special or Special(), ids, tokenizer.vocab_size, architecture=model.architecture
    )
    notes += unused
    if generates and tokenizer.loses_spaces:
        notes.append(
            f"{tokenizer_files[0]} does not keep spaces: generated texts have a space around each "
            "punctuation mark"
        )
    return Source(
        name,
        model,
        tokenizer.following(special),
        lambda: files.read().params,
        lambda: files.read().labels,
        notes,
        generation,
        generation_file,
    )


def _open_minilm(name: str) -> Source:
    return _open_directory(name, packages.minilm())


def _open_stories(name: str) -> Source:
    path = packages.stories15m()
    model = pretrained.read_llama2c(path, following=packages.STORIES_TOKENIZER_BYTES)
    text = read_llama2c(
        path.read_bytes()[-packages.STORIES_TOKENIZER_BYTES :], model.config.vocab_size or 0
    )
    return Source(name, model.config, Tokenizer(text), lambda: model.params)


PACKAGES: dict[str, Callable[[str], Source]] = {
    "minilm": _open_minilm,
    "stories15m": _open_stories,
}


def print_notes(source: Source, console: Console) -> None:
    """Print the notes about a source, one line each."""
    for note in source.notes:
        console.print(f"{source.name}: {note}")
