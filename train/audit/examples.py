"""Rows to audit: artificial documents, prepared by the real pipeline and objective.

All tokens of a row differ. So each token identifies its document, and a target among the visible
inputs is always a leak.
"""

import dataclasses
import tempfile
from pathlib import Path

import numpy as np

from heedful.data.config import DataConfig, TokenizerConfig
from heedful.data.pipeline import Dataset
from heedful.data.split_plan import plan_split
from heedful.data.store import TokenStore
from heedful.data.tokenizer import Tokenizer
from heedful.train.errors import require

TOKENS_PER_POSITION = 3
"""Number of distinct tokens needed, as a multiple of the row length."""
ROWS = 3
"""Number of rows: a full (or nearly full) row, a row with padding at its end, a row of padding."""
PACKED, UNPACKED = (0.35, 0.2, 0.45, 0.55), (0.9, 0.55)
"""Lengths of the documents, as shares of the row length."""


def tokenizer_of_words(count: int, objective: str) -> Tokenizer:
    """Return a tokenizer of `count` words and the special tokens that the objective needs."""
    words = " ".join(f"w{i:0{len(str(count))}}" for i in range(count))
    config = TokenizerConfig(kind="words", vocab_size=count + 200)
    return Tokenizer.train([words], config, objective)


def dataset(
    config: DataConfig, tokenizer: Tokenizer, length: int, *, pairs: bool = False
) -> Dataset:
    """Return a dataset of a few documents of distinct tokens in rows of `length`.

    `pairs`: classified examples have a second text. Raises TrainError if the tokenizer has too few
    tokens.
    """
    count = len(tokenizer.ordinary)
    require(
        count >= TOKENS_PER_POSITION * length,
        f"--length {length}: rows need {TOKENS_PER_POSITION * length} distinct tokens, but the "
        f"tokenizer has {count}; choose at most {count // TOKENS_PER_POSITION}",
    )
    config = dataclasses.replace(
        config,
        max_length=length,
        batch_tokens=ROWS * length,
        batch_multiple=1,
        buckets=1,
        workers=0,
    )
    objective = config.objective_spec
    fields = objective.fields + (objective.optional_fields if pairs else ())
    shares = PACKED if config.is_packed else UNPACKED
    room = (length - 3) // (len(fields) if len(objective.sides) == 1 else 1)
    sizes = [max(2, int(share * room)) for share in shares]
    with tempfile.TemporaryDirectory() as folder:
        store = _store(Path(folder), fields, sizes, tokenizer.ordinary)
    rows = plan_split(config, tokenizer, store, "train", 0)
    labels = None
    if objective.label:
        kind = np.float32 if objective.label == "number" else np.int32
        labels = np.arange(len(sizes)).astype(kind) % 2
    return Dataset(
        config=config, tokenizer=tokenizer, split="train", seed=0, data_fingerprint="",
        classes=config.classes, store=store, labels=labels, kept=rows.kept, pieces=rows.pieces,
        train_plan=rows.plan, eval_plan=rows.plan.in_order(), characters=0, bytes=0,
        target_count=rows.target_count, report=[], warnings=[],
    )  # fmt: skip


def _store(
    folder: Path, fields: tuple[str, ...], sizes: list[int], tokens: np.ndarray
) -> TokenStore:
    """Store documents of the lengths `sizes`, which take their tokens from `tokens` in order."""
    first = 0
    np.save(folder / "blank.npy", np.zeros(len(sizes), bool))
    np.save(folder / "sizes.npy", np.zeros((2, len(sizes)), np.int64))
    for field in fields:
        np.save(folder / f"{field}.offsets.npy", np.cumsum([0, *sizes]))
        ids = tokens[(first + np.arange(sum(sizes))) % len(tokens)].astype(np.int32)
        first += sum(sizes)
        (folder / f"{field}.ids").write_bytes(ids.tobytes())
    return TokenStore(folder, fields)


def batch(dataset: Dataset) -> dict[str, np.ndarray]:
    """Return the rows in order; prefixes have more than 2 tokens, and 2 or more tokens after."""
    made = {}
    for seed in range(100):
        made = dataclasses.replace(dataset, seed=seed).batch(dataset.eval_plan, 0)
        if "prefix_len" not in made:
            break
        prefix, lengths = made["prefix_len"][:2], (made["segment_ids"] > 0).sum(1)[:2]
        if ((prefix > 2) & (prefix <= lengths - 2)).all():
            break
    return made
