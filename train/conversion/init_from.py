"""Fine-tuning: the parameters of a model that was trained before, in a new run."""

import dataclasses
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from heedful.data import packages
from heedful.data.llama2c import read_llama2c
from heedful.data.special import Special, with_model_files
from heedful.data.tokenizer import Tokenizer
from heedful.model import pretrained
from heedful.model.config import LoraConfig, ModelConfig
from heedful.model.pretrained.tensors import CONFIG, read_json
from heedful.train.config import TrainError
from heedful.train.config_json import differences, to_json
from heedful.train.conversion import generation_config
from heedful.train.hosts import to_host
from heedful.train.load import load
from heedful.train.run import Run
from heedful.train.trainable import named

TOKENIZERS = ("tokenizer.json", "vocab.txt")
TWO_TOKENIZERS = ("source.spm", "target.spm")  # As opus-mt models are published.
# What a new run says of attention; the rest belongs to the parameters. What attention looks at is
# the source's too, where the new run sets no window.
OF_USE = ("core", "decoder_core", "cross_core", "dropout")
OF_WINDOW = ("window", "dilation", "global_tokens", "global_projections")


class Source(NamedTuple):
    """A model that was trained before; its parameters are read when they are asked for."""

    name: str
    model: ModelConfig
    tokenizer: Tokenizer
    params: Callable[[], Any]
    labels: Callable[[], Sequence[str]] = tuple
    """Names of the classes of a classifier, if it has any."""
    notes: Sequence[str] = ()
    """Lines for the user about parts of its files that were left out or changed."""
    generation: Mapping[str, Any] = {}
    """Values of its generation_config.json."""

    @property
    def label(self) -> str:
        """A short name: the last part of a path."""
        return Path(self.name.partition(":")[2] or self.name).name


def open_source(init_from: str, console: Console) -> Source:
    """What `train.init_from` names; raises TrainError, DataError or ModelError."""
    kind, _, rest = init_from.partition(":")
    if kind == "hf":
        return _open_directory(init_from, Path(rest).expanduser())
    if kind == "package":
        if rest not in PACKAGES:
            raise TrainError(f"unknown {init_from}: choose among {', '.join(PACKAGES)}")
        return PACKAGES[rest](init_from)
    directory = Path(init_from).expanduser()
    run = Run.open(directory)
    return Source(
        init_from,
        dataclasses.replace(run.model, lora=LoraConfig()),
        run.tokenizer(),
        # What low-rank updates have learned is part of the body.
        lambda: pretrained.merge_lora(run.model, to_host(load(directory, console).params))[1],
        lambda: run.data.classes,
    )


def _open_directory(name: str, directory: Path) -> Source:
    if not directory.is_dir():
        raise TrainError(f"{directory} is no directory: give that of a Hugging Face model to hf:")
    found = [directory / file for file in TOKENIZERS if (directory / file).is_file()]
    if not found and any((directory / file).is_file() for file in TWO_TOKENIZERS):
        raise TrainError(
            f"{directory} has {' and '.join(TWO_TOKENIZERS)}, a tokenizer for each language, and "
            "no tokenizer.json: models with two tokenizers cannot be imported; transformers' "
            "save_pretrained writes no tokenizer.json of them either. Choose a model for "
            "translation that has a tokenizer.json for both languages, such as T5"
        )
    if not found:
        raise TrainError(
            f"{directory} has neither {' nor '.join(TOKENIZERS)}: save its tokenizer there "
            "(in transformers: AutoTokenizer.from_pretrained(...).save_pretrained(...))"
        )
    files = pretrained.ModelDirectory(directory)
    model = files.config
    tokenizer, notes = Tokenizer.load(found[0], model.vocab_size), files.notes
    if tokenizer.rowless:
        names = ", ".join(tokenizer.rowless)
        notes += [f"{found[0]} has {names}, but the model no rows for them: no text may hold them"]
    config = read_json(directory / CONFIG)
    writes = model.head.kind == "language_model" and model.architecture != "encoder_only"
    generation = generation_config.read(directory, config) if writes else {}
    ids = {CONFIG: {key: config[key] for key in config if key.endswith("_token_id")}}
    if writes and (directory / generation_config.FILE).is_file():
        ids[generation_config.FILE] = generation
    special, unused = with_model_files(
        tokenizer.special or Special(), ids, tokenizer.vocab_size, architecture=model.architecture
    )
    notes += unused
    if writes and tokenizer.loses_spaces:
        notes.append(
            f"{found[0]} does not keep spaces: texts come with one around each punctuation mark"
        )
    return Source(
        name,
        model,
        tokenizer.following(special),
        lambda: files.read().params,
        lambda: files.read().labels,
        notes,
        generation,
    )


def _open_minilm(name: str) -> Source:
    return _open_directory(name, packages.minilm())


def _open_stories(name: str) -> Source:
    path = packages.stories15m()
    found = pretrained.read_llama2c(path, following=packages.STORIES_TOKENIZER_BYTES)
    text = read_llama2c(
        path.read_bytes()[-packages.STORIES_TOKENIZER_BYTES :], found.config.vocab_size or 0
    )
    return Source(name, found.config, Tokenizer(text), lambda: found.params)


PACKAGES: dict[str, Callable[[str], Source]] = {
    "minilm": _open_minilm,
    "stories15m": _open_stories,
}


def merge_pretrained_config(model: ModelConfig, source: ModelConfig) -> ModelConfig:
    """The body of `source`, with what `model` says of the head and of how it is trained."""
    head, attention = model.head, model.attention
    of_use = (*OF_USE, *attention.core_options)
    of_use += () if attention.window is None else OF_WINDOW
    # A classifier without outputs stands for a body without a head.
    if head.kind == source.head.kind and (head.kind != "classifier" or source.head.outputs):
        head = dataclasses.replace(source.head, dropout=head.dropout, outputs=head.outputs)
    return dataclasses.replace(
        source,
        attention=dataclasses.replace(
            source.attention, **{name: getattr(attention, name) for name in of_use}
        ),
        feed_forward=dataclasses.replace(source.feed_forward, dropout=model.feed_forward.dropout),
        head=head,
        lora=model.lora,
        dropout=model.dropout,
        init=model.init,
        dtype=model.dtype,
        remat=model.remat,
        unroll=model.unroll,
    )


def init_from_pretrained(
    fresh: Any, source: Source, model: ModelConfig, reinit: Sequence[str], console: Console
) -> Any:
    """`fresh` parameters with those of the source in their place, and a table that says which.

    Only the head, low-rank updates and what `reinit` names may stay fresh. Raises TrainError for
    another body, for a shape that does not fit, and for a pattern that fits nothing.
    """
    wanted = to_json(merge_pretrained_config(model, source.model))
    wanted["head"] = to_json(model.head)
    if _is_longer(model, source.model):
        wanted["positions"]["max_length"] = model.positions.max_length
    others = list(differences(to_json(model), wanted, "model"))
    if others:
        raise TrainError(
            f"{source.name} has another model ({'; '.join(others[:3])}): leave these flags out, "
            "or init from another"
        )
    given = dict(named(source.params()))
    copies = _copies(given, fresh)
    unused = set(reinit)
    rows: dict[str, list[tuple[str, int]]] = {
        "loaded": [], "copied": [], "new, random": [], "left out": []
    }  # fmt: skip
    leaves, misfits = [], dict[str, str]()
    for name, leaf in named(fresh):
        fitting = [pattern for pattern in reinit if re.search(pattern, name)]
        unused.difference_update(fitting)
        if name in copies and not fitting:
            given.pop(name, None)
            leaves.append(_place(copies[name], leaf))
            rows["copied"].append((name, leaf.size))
        elif name in given and not fitting:
            value = given.pop(name)
            if value.shape != leaf.shape:
                misfits[name] = f"{name} has shape {value.shape} there and {leaf.shape} here"
                continue
            leaves.append(_place(value, leaf))
            rows["loaded"].append((name, leaf.size))
        elif fitting or name.startswith("head.") or "lora_" in name:
            given.pop(name, None)
            leaves.append(leaf)
            rows["new, random"].append((name, leaf.size))
        else:
            raise TrainError(f"{source.name} has no {name}: init from a model of the same kind")
    if misfits:
        patterns = shlex.join([*reinit, *map(re.escape, misfits)])
        raise TrainError(
            f"{source.name} does not fit ({', '.join(misfits.values())}): "
            f"give --train.reinit {patterns} to begin at random"
        )
    if unused:
        raise TrainError(f"train.reinit has {sorted(unused)[0]!r}, which fits no parameter")
    rows["left out"] = [(name, leaf.size) for name, leaf in given.items()]
    _print(source.name, rows, console)
    print_notes(source, console)
    if source.generation:
        console.print(
            f"{generation_config.FILE} of {source.name} is not followed in training: train.decode "
            "says how texts are written",
            style="yellow",
        )
    return jax.tree.unflatten(jax.tree.structure(fresh), leaves)


def _is_longer(model: ModelConfig, source: ModelConfig) -> bool:
    """Whether learned positions go on where those of the source end."""
    is_learned = source.positions.kind == "learned"
    return is_learned and model.positions.max_length > source.positions.max_length


def _copies(given: dict[str, Any], fresh: Any) -> dict[str, np.ndarray]:
    """What a model for longer inputs has beside its source, begun as arXiv:2004.05150 §5 does.

    Positions repeat those of the source; global tokens begin with the projections of all others.
    """
    copies = {}
    for name, leaf in named(fresh):
        local = name.replace(".global_", ".")
        if name not in given and local in given:
            copies[name] = given[local]
        elif name.endswith("positions.table") and len(leaf) > len(given.get(name, leaf)):
            copies[name] = np.resize(given[name], leaf.shape)
    return copies


def _place(value: Any, like: jax.Array) -> jax.Array:
    host = np.asarray(value, like.dtype)
    return jax.make_array_from_callback(host.shape, like.sharding, lambda index: host[index])


def print_notes(source: Source, console: Console) -> None:
    for note in source.notes:
        console.print(f"{source.name}: {note}")


def _print(name: str, rows: dict[str, list[tuple[str, int]]], console: Console) -> None:
    table = Table("", "parameters", "names", title=f"fine-tuning {name}", title_justify="left")
    for what, entries in rows.items():
        if what == "copied" and not entries:
            continue
        parts: dict[str, int] = {}
        for entry, size in entries:
            # The body by its parts, the head and what is left out by name.
            is_body = what == "loaded" and not entry.startswith("head.")
            part = entry.split(".")[0] if is_body else entry
            parts[part] = parts.get(part, 0) + size
        names = ", ".join(parts) or "nothing"
        table.add_row(what, f"{sum(parts.values()):,}", names)
    console.print(table)
