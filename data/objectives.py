"""What a model learns from an example: tokens in, the arrays of one row out (numpy, on the host).

An objective turns the tokens of one example into unpadded arrays [T], or [] for what a row has one
of; `batch.FIELDS` says what each one means. Segment ids, positions, and weights that are all 1 may
be left out: a batch gets them from the lengths. Targets are shifted here and nowhere else. A new
objective is a function and a line in `OBJECTIVES`.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from heedful.data.config import DataConfig, DataError
from heedful.data.tokenizer import Tokenizer

Arrays = dict[str, np.ndarray]
Example = Mapping[str, np.ndarray]


class ChunkingSpec(NamedTuple):
    """How a long document becomes pieces.

    framed: the document is begin + text + end; otherwise the bare text.
    overlap: tokens that a piece shares with the next: one where the last only is a target.
    longest(config, tokenizer): most positions (tokens - overlap) of a piece.
    """

    framed: bool
    overlap: int
    longest: Callable[[DataConfig, Tokenizer], int]


class Objective(NamedTuple):
    """How examples become rows.

    row(example, rng, config, tokenizer) maps the tokens of one example, or of one piece of a
    document, to the arrays of its row; all randomness comes from `rng`, which is None unless the
    objective `draws`: to make a generator takes longer than to make a row. Examples are
    `{"source": [S], "target": [T]}` for translation, `{"text": [T]}` for running text, and
    `{"text": [T], "label": []}`, with or without `"pair": [T]`, for classes and numbers.
    lengths(counts, config) maps the token counts of all of them, like `{"text": [E]}`, to the
    lengths [sides, E] that `row` will give; an encoder-decoder row has two sides.
    cut: how documents are cut into pieces; None where an example is always whole.
    """

    row: Callable[[Example, Any, DataConfig, Tokenizer], Arrays]
    lengths: Callable[[Mapping[str, np.ndarray], DataConfig], np.ndarray]
    cut: ChunkingSpec | None = None
    draws: bool = False


def causal_lm(example: Example, rng: None, config: DataConfig, tokenizer: Tokenizer) -> Arrays:
    """Predict each token from those before it."""
    return _next_tokens(example["text"])


def prefix_lm(
    example: Example, rng: np.random.Generator, config: DataConfig, tokenizer: Tokenizer
) -> Arrays:
    """Predict each token after a prefix of random length, which all see (arXiv:1910.10683 §3.3.1).

    The last position of the prefix predicts the first token after it.
    """
    row = _next_tokens(example["text"])
    prefix = rng.integers(1, len(row["inputs"]) + 1)
    weights = np.ones(len(row["inputs"]), np.float32)
    weights[: prefix - 1] = 0
    return {**row, "weights": weights, "prefix_len": np.array(prefix, np.int32)}


def masked_lm(
    example: Example, rng: np.random.Generator, config: DataConfig, tokenizer: Tokenizer
) -> Arrays:
    """Restore a share `noise` of the tokens, at least one (arXiv:1810.04805 §3.1).

    Of those, 80 % are masked, 10 % replaced by any token of the vocabulary that is no special one,
    and 10 % left as they are.
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
    config: DataConfig,
    tokenizer: Tokenizer,
) -> np.ndarray:
    """The candidates to predict: any, or whole words that come as near as they can to the share."""
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
    example: Example, rng: np.random.Generator, config: DataConfig, tokenizer: Tokenizer
) -> Arrays:
    """Restore spans that sentinels stand for (arXiv:1910.10683 §3.1.4, §3.3.4).

    The encoder reads the text with <extra_id_0>, <extra_id_1>, ... for its spans; the target is
    each of these followed by what it stands for. As in T5, a text begins with a token that is kept
    and ends with a span, and its length alone decides the number and total length of the spans.
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
    return _encoder_decoder(source[read], target, tokenizer)


def _noise(length: np.ndarray | int, config: DataConfig) -> tuple[np.ndarray, np.ndarray]:
    """(tokens in spans, spans) of texts with that many tokens, one or more."""
    length = np.asarray(length)
    noise = np.rint(length * config.noise).astype(np.int64).clip(1, np.maximum(length - 1, 1))
    spans = np.rint(noise / config.span_length).astype(np.int64)
    # Between any two spans there is a token that is kept.
    return noise, spans.clip(1, np.minimum(noise, np.maximum(length - noise, 1)))


def _partition(total: int, parts: int, rng: np.random.Generator) -> np.ndarray:
    """Lengths of `parts` parts of `total`, none empty (if total >= parts), all equally likely."""
    cuts = 1 + np.sort(rng.permutation(max(total - 1, 0))[: parts - 1])
    return np.diff(np.concatenate([[0], cuts, [total]]))


def _span_lengths(counts: Mapping[str, np.ndarray], config: DataConfig) -> np.ndarray:
    noise, spans = _noise(counts["text"], config)
    return np.stack([counts["text"] - noise + spans + 1, noise + spans + 1])


def _longest_spanned(config: DataConfig, tokenizer: Tokenizer) -> int:
    """Tokens of the longest text of which neither side is longer than `max_length`."""
    counts = np.arange(1, 2 * config.max_length + 1)  # Both sides together hold all tokens.
    fits = (_span_lengths({"text": counts}, config) <= config.max_length).all(0)
    longest = int(counts[fits].max(initial=0))  # Neither side becomes shorter with more tokens.
    if not longest:
        raise DataError(
            f"data.max_length {config.max_length} has no room for a span: give 3 or more"
        )
    spans = int(_noise(longest, config)[1])
    if spans > len(tokenizer.sentinels):
        raise DataError(
            f"data.max_length {config.max_length} makes {spans} spans, but the tokenizer has "
            f"{len(tokenizer.sentinels)} sentinels: lower it, or raise data.span_length"
        )
    return longest


def translation(example: Example, rng: None, config: DataConfig, tokenizer: Tokenizer) -> Arrays:
    """Predict the target from the source and the target so far (arXiv:1706.03762 §3.1)."""
    return _encoder_decoder(example["source"], example["target"], tokenizer)


def sequence_classification(
    example: Example, rng: None, config: DataConfig, tokenizer: Tokenizer
) -> Arrays:
    """Predict the class, or the number, of a text or of a pair (arXiv:1810.04805 §4.1).

    A row is begin, text, end, and for a pair the second text and another end.
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


def _labelled_lengths(counts: Mapping[str, np.ndarray], config: DataConfig) -> np.ndarray:
    return np.stack([sum(counts.values()) + 1 + len(counts)])


def _next_tokens(tokens: np.ndarray) -> Arrays:
    return {"inputs": tokens[:-1], "targets": tokens[1:]}


def _encoder_decoder(source: np.ndarray, target: np.ndarray, tokenizer: Tokenizer) -> Arrays:
    begin, end = tokenizer.frame
    framed = np.concatenate([[begin], target, [end]], dtype=np.int32)
    read = np.concatenate([source, [end]], dtype=np.int32)
    return {"encoder_inputs": read, **_next_tokens(framed)}


def _max_length(config: DataConfig, tokenizer: Tokenizer) -> int:
    return config.max_length


OBJECTIVES = {
    "causal_lm": Objective(
        causal_lm, lambda n, _: np.stack([n["text"] - 1]), ChunkingSpec(True, 1, _max_length)
    ),
    "masked_lm": Objective(
        masked_lm,
        lambda n, _: np.stack([n["text"]]),
        ChunkingSpec(True, 0, _max_length),
        draws=True,
    ),
    "prefix_lm": Objective(
        prefix_lm,
        lambda n, _: np.stack([n["text"] - 1]),
        ChunkingSpec(True, 1, _max_length),
        draws=True,
    ),
    "span_corruption": Objective(
        span_corruption, _span_lengths, ChunkingSpec(False, 0, _longest_spanned), draws=True
    ),
    "translation": Objective(translation, lambda n, _: np.stack([n["source"], n["target"]]) + 1),
    "classification": Objective(sequence_classification, _labelled_lengths),
    "regression": Objective(sequence_classification, _labelled_lengths),
}
