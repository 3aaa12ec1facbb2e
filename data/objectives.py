"""Objectives: inputs and targets of a training row, from the tokens of an example (numpy).

An objective converts the tokens of one example to unpadded arrays [T] (T positions), or [] for one
value per row; `batch.FIELDS` describes the arrays. Segment ids, positions, and weights that are all
1 may be left out: `batch.pad_and_stack` adds them. Targets are shifted here and nowhere else. A new
objective needs a function and an entry in `OBJECTIVES`; its loss is in `train.tasks`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from heedful import own_code
from heedful.data.errors import DataError
from heedful.names import did_you_mean

Arrays = dict[str, np.ndarray]
Example = Mapping[str, np.ndarray]


class RowSettings(Protocol):
    """Settings of DataConfig that rows depend on."""

    @property
    def max_length(self) -> int: ...
    @property
    def noise(self) -> float: ...
    @property
    def whole_words(self) -> bool: ...
    @property
    def span_length(self) -> float: ...


class RowTokenizer(Protocol):
    """Members of `tokenizer.Tokenizer` that objectives use to make rows."""

    mask: int | None
    sentinels: tuple[int, ...]
    is_special: np.ndarray
    ordinary: np.ndarray

    @property
    def frame(self) -> tuple[int, int]: ...
    def words(self, ids: np.ndarray) -> np.ndarray: ...


@dataclass(frozen=True)
class ChunkingSpec:
    """Rule for cutting a long document into pieces."""

    has_frame: bool
    """True if begin and end tokens are added to the document."""
    overlap: int
    """Number of tokens that a piece shares with the next piece: 1 if the last token of a piece is
    only a target, otherwise 0."""
    max_positions: Callable[[RowSettings, RowTokenizer], int]
    """(config, tokenizer) -> largest number of positions (tokens - overlap) of a piece."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """An objective: its function from examples to rows, and its demands on the data.

    Example:
        >>> import heedful as hf
        >>> from heedful.data.objectives import OBJECTIVES
        >>> isinstance(OBJECTIVES["translation"], hf.Objective), OBJECTIVES["translation"].fields
        (True, ('source', 'target'))
    """

    row: Callable[[Example, Any, Any, Any], Arrays]
    """(example, rng, config, tokenizer) -> arrays of a row.

    `example` has the tokens of one example or piece of a document, `{field: [T]}`, and a label []
    if `label` is not None. `rng` is None unless `draws` is true, since creating a generator takes
    longer than making a row."""
    lengths: Callable[[Mapping[str, np.ndarray], Any], np.ndarray]
    """(token counts of all E examples, `{field: [E]}`, config) -> lengths of rows, [sides, E]."""
    draws: bool = False
    """True if rows are random; they are drawn again in every epoch."""
    chunking: ChunkingSpec | None = None
    """Rule for cutting documents into pieces; None: examples are not cut."""
    fields: tuple[str, ...] = ("text",)
    """Text fields that every example has."""
    optional_fields: tuple[str, ...] = ()
    """Further text fields that the examples of a source may have."""
    is_parallel: bool = False
    """True if the two texts are translations, in the languages `data.languages`."""
    label: Literal["class", "number"] | None = None
    """Kind of the label of an example; None: examples have no label."""
    sides: tuple[str, ...] = ("",)
    """Prefix of the arrays' names for each side of the model, in the order of `lengths`."""
    arrays: tuple[str, ...] = ()
    """Further arrays of a row, besides inputs, targets, weights, segment ids and positions."""
    is_packable: bool = False
    """True if a row may hold several documents."""
    writes: bool = False
    """True if models with this objective generate texts."""
    needs_mask: bool = False
    """True if the tokenizer needs a mask token."""
    needs_sentinels: bool = False
    """True if the tokenizer needs sentinel tokens."""
    settings: tuple[str, ...] = ()
    """Fields of DataConfig that have no effect with objectives that do not list them here."""

    @property
    def has_prefix(self) -> bool:
        """True if a text begins with a prefix, to which all of its positions attend."""
        return "prefix_len" in self.arrays

    @property
    def is_text(self) -> bool:
        """True for objectives on unlabelled documents of any length."""
        return self.chunking is not None


def causal_lm(example: Example, rng: None, config: RowSettings, tokenizer: RowTokenizer) -> Arrays:
    """Predict each token from those before it."""
    return _next_tokens(example["text"])


def prefix_lm(
    example: Example, rng: np.random.Generator, config: RowSettings, tokenizer: RowTokenizer
) -> Arrays:
    """Predict each token after a prefix of random length (arXiv:1910.10683 §3.3.1).

    All positions attend to the prefix. The last position of the prefix predicts the first token
    after the prefix.
    """
    row = _next_tokens(example["text"])
    prefix = rng.integers(1, len(row["inputs"]) + 1)
    weights = np.ones(len(row["inputs"]), np.float32)
    weights[: prefix - 1] = 0
    return {**row, "weights": weights, "prefix_len": np.array(prefix, np.int32)}


def masked_lm(
    example: Example, rng: np.random.Generator, config: RowSettings, tokenizer: RowTokenizer
) -> Arrays:
    """Predict a share `noise` of the tokens, at least one (arXiv:1810.04805 §3.1).

    Of the predicted tokens, 80 % are masked in the input, 10 % are replaced by a random token that
    is not special, and 10 % are unchanged.
    """
    tokens, mask = example["text"], tokenizer.mask
    assert mask is not None
    candidates = np.flatnonzero(~tokenizer.is_special[tokens])
    chosen = _chosen(candidates, tokens, rng, config, tokenizer)
    dice = rng.random(len(chosen))
    drawn = rng.choice(tokenizer.ordinary, len(chosen))
    inputs, weights = tokens.copy(), np.zeros(len(tokens), np.float32)
    replaced = np.where(dice < 0.9, drawn, tokens[chosen])
    inputs[chosen] = np.where(dice < 0.8, mask, replaced)
    weights[chosen] = 1
    return {"inputs": inputs, "targets": tokens, "weights": weights}


def _chosen(
    candidates: np.ndarray,
    tokens: np.ndarray,
    rng: np.random.Generator,
    config: RowSettings,
    tokenizer: RowTokenizer,
) -> np.ndarray:
    """Choose the positions to predict: about a share `noise` of the positions `candidates`.

    With `config.whole_words`, all candidates of a word are chosen, or none of them.
    """
    if not len(candidates):
        return candidates
    number = max(1, round(config.noise * len(candidates)))
    if not config.whole_words:
        return rng.permutation(candidates)[:number]
    words = tokenizer.words(tokens)[candidates]
    numbers, sizes = np.unique(words, return_counts=True)
    order = rng.permutation(len(numbers))
    count = 1 + np.abs(np.cumsum(sizes[order]) - number).argmin()
    return candidates[np.isin(words, numbers[order[:count]])]


def span_corruption(
    example: Example, rng: np.random.Generator, config: RowSettings, tokenizer: RowTokenizer
) -> Arrays:
    """Predict spans that sentinels replace (arXiv:1910.10683 §3.1.4, §3.3.4).

    The encoder reads the text with <extra_id_0>, <extra_id_1>, ... in place of its spans; the
    target is each sentinel followed by the tokens of its span. As in T5, a text begins with a token
    outside of all spans and ends with a span; the number and the total length of the spans follow
    from the length of the text.
    """
    tokens = example["text"]
    noise, spans = (int(n) for n in _noise(len(tokens), config))
    lost, kept = _partition(noise, spans, rng), _partition(len(tokens) - noise, spans, rng)
    sentinels = np.array(tokenizer.sentinels[:spans], np.int32)
    is_lost = np.repeat(np.tile([False, True], spans), np.stack([kept, lost], 1).ravel())
    begins = (kept + lost).cumsum() - lost
    source = tokens.copy()
    source[begins] = sentinels
    read = ~is_lost
    read[begins] = True
    target = np.insert(tokens[is_lost], lost.cumsum() - lost, sentinels)
    return source_and_target(source[read], target, tokenizer)


def _noise(length: np.ndarray | int, config: RowSettings) -> tuple[np.ndarray, np.ndarray]:
    """Return (number of tokens in spans, number of spans) for texts of `length` >= 1 tokens."""
    length = np.asarray(length)
    noise = np.rint(length * config.noise).astype(np.int64).clip(1, np.maximum(length - 1, 1))
    spans = np.rint(noise / config.span_length).astype(np.int64)
    # At least one token between two spans is kept.
    return noise, spans.clip(1, np.minimum(noise, np.maximum(length - noise, 1)))


def _partition(total: int, parts: int, rng: np.random.Generator) -> np.ndarray:
    """Draw the lengths of `parts` parts of `total`: all partitions are equally likely.

    No part is empty if total >= parts.
    """
    cuts = 1 + np.sort(rng.permutation(max(total - 1, 0))[: parts - 1])
    return np.diff(np.concatenate([[0], cuts, [total]]))


def _span_lengths(counts: Mapping[str, np.ndarray], config: RowSettings) -> np.ndarray:
    noise, spans = _noise(counts["text"], config)
    return np.stack([counts["text"] - noise + spans + 1, noise + spans + 1])


def _longest_spanned(config: RowSettings, tokenizer: RowTokenizer) -> int:
    """Return the largest number of tokens of a text whose row fits in `max_length` on each side."""
    counts = np.arange(1, 2 * config.max_length + 1)  # Both sides together hold all tokens.
    fits = (_span_lengths({"text": counts}, config) <= config.max_length).all(0)
    longest = int(counts[fits].max(initial=0))  # Neither side becomes shorter with more tokens.
    if not longest:
        raise DataError(
            f"data.max_length = {config.max_length}: no room for a span; give 3 or more"
        )
    spans = int(_noise(longest, config)[1])
    if spans > len(tokenizer.sentinels):
        raise DataError(
            f"data.max_length = {config.max_length}: rows have {spans} spans, but the tokenizer "
            f"has {len(tokenizer.sentinels)} sentinels; lower data.max_length, or raise "
            "data.span_length"
        )
    return longest


def translation(
    example: Example, rng: None, config: RowSettings, tokenizer: RowTokenizer
) -> Arrays:
    """Predict each target token from the source and earlier targets (arXiv:1706.03762 §3.1)."""
    return source_and_target(example["source"], example["target"], tokenizer)


def sequence_classification(
    example: Example, rng: None, config: RowSettings, tokenizer: RowTokenizer
) -> Arrays:
    """Predict the class or the number of a text or a pair of texts (arXiv:1810.04805 §4.1).

    A row is begin, text, end; for a pair also the second text and an end.
    """
    begin, end = tokenizer.frame
    texts = [np.concatenate([[begin], example["text"], [end]])]
    if "pair" in example:
        texts.append(np.append(example["pair"], end))
    tokens = np.concatenate(texts).astype(np.int32)
    types = np.arange(len(texts), dtype=np.int32)
    return {
        "inputs": tokens,
        "targets": example["label"],
        "weights": np.array(1, np.float32),
        "type_ids": np.repeat(types, [len(text) for text in texts]),
    }


def _labelled_lengths(counts: Mapping[str, np.ndarray], config: RowSettings) -> np.ndarray:
    return np.stack([sum(counts.values()) + 1 + len(counts)])


def _next_tokens(tokens: np.ndarray) -> Arrays:
    return {"inputs": tokens[:-1], "targets": tokens[1:]}


def source_and_target(source: np.ndarray, target: np.ndarray, tokenizer: RowTokenizer) -> Arrays:
    """Return a row whose encoder reads source + end, and whose decoder predicts target + end."""
    begin, end = tokenizer.frame
    framed = np.concatenate([[begin], target, [end]], dtype=np.int32)
    read = np.concatenate([source, [end]], dtype=np.int32)
    return {"encoder_inputs": read, **_next_tokens(framed)}


def _max_length(config: RowSettings, tokenizer: RowTokenizer) -> int:
    return config.max_length


_LABELLED: dict[str, Any] = {
    "row": sequence_classification,
    "lengths": _labelled_lengths,
    "optional_fields": ("pair",),
    "arrays": ("type_ids",),
}
_SIDES = ("encoder_", "")

OBJECTIVES: dict[str, Objective] = {
    "causal_lm": Objective(
        row=causal_lm,
        lengths=lambda n, _: np.stack([n["text"] - 1]),
        chunking=ChunkingSpec(has_frame=True, overlap=1, max_positions=_max_length),
        is_packable=True,
        writes=True,
    ),
    "masked_lm": Objective(
        row=masked_lm,
        lengths=lambda n, _: np.stack([n["text"]]),
        draws=True,
        chunking=ChunkingSpec(has_frame=True, overlap=0, max_positions=_max_length),
        is_packable=True,
        needs_mask=True,
        settings=("noise", "whole_words"),
    ),
    "prefix_lm": Objective(
        row=prefix_lm,
        lengths=lambda n, _: np.stack([n["text"] - 1]),
        draws=True,
        chunking=ChunkingSpec(has_frame=True, overlap=1, max_positions=_max_length),
        arrays=("prefix_len",),
        writes=True,
    ),
    "span_corruption": Objective(
        row=span_corruption,
        lengths=_span_lengths,
        draws=True,
        chunking=ChunkingSpec(has_frame=False, overlap=0, max_positions=_longest_spanned),
        sides=_SIDES,
        writes=True,
        needs_sentinels=True,
        settings=("noise", "span_length"),
    ),
    "translation": Objective(
        row=translation,
        lengths=lambda n, _: np.stack([n["source"], n["target"]]) + 1,
        fields=("source", "target"),
        is_parallel=True,
        sides=_SIDES,
        writes=True,
    ),
    "classification": Objective(**_LABELLED, label="class", settings=("classes", "label")),
    "regression": Objective(**_LABELLED, label="number", settings=("label",)),
}


def objective_of(name: str) -> Objective:
    """Return the objective of a name, or of the import path of a Task or an Objective.

    A task of training has the attribute `objective`. Raises DataError for another name or value.
    """
    if name in OBJECTIVES:
        return OBJECTIVES[name]
    if not own_code.is_import_path(name):
        known = did_you_mean(name, OBJECTIVES)
        raise DataError(
            f"data.objective is {name!r}: {known}give one of "
            f"{', '.join(OBJECTIVES)}, or an import path, my_package.my_task:TASK"
        )
    value = own_code.resolve(name, "data.objective", object, DataError)
    objective = getattr(value, "objective", value)
    if isinstance(objective, Objective):
        return objective
    raise DataError(
        f"data.objective = {name}: it is of type {type(value).__name__}, not "
        "heedful.train.tasks.Task; give the import path of another value"
    )
