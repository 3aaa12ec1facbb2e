"""Plan the rows and batches of a split."""

from typing import NamedTuple

import numpy as np

from heedful.data.config import DataConfig
from heedful.data.errors import DataError
from heedful.data.packing import BatchPlan, PackedPlan, Pieces, Plan
from heedful.data.store import TokenStore
from heedful.data.tokenizer import Tokenizer


class SplitPlan(NamedTuple):
    """Examples and batches of a split."""

    plan: Plan
    """Plan of the training batches."""
    kept: np.ndarray
    """Indices of the examples that are used."""
    pieces: Pieces | None
    """Pieces of documents, one per row; None: rows are packed, or are whole examples."""
    tokens: int
    """Sum of the lengths of all rows, on all sides of the model."""
    target_count: int
    """Number of positions with a target, or of examples with a label, in an epoch."""


def plan_split(
    config: DataConfig, tokenizer: Tokenizer, store: TokenStore, split: str, seed: int
) -> SplitPlan:
    """Plan the training batches of a split; raise DataError if no example can be used."""
    plan = _documents if config.objective_spec.is_text else _examples
    return plan(config, tokenizer, store, split, seed)


def _examples(
    config: DataConfig, tokenizer: Tokenizer, store: TokenStore, split: str, seed: int
) -> SplitPlan:
    """Plan one row for each example that is neither blank nor too long."""
    objective = config.objective_spec
    lengths = objective.lengths(store.counts(), config)
    fits = lengths.max(0) <= config.max_length
    kept = np.flatnonzero(fits & ~store.blank)
    if not len(kept):
        blank = int(store.blank.sum())
        raise DataError(
            f"no example of split {split!r} is left: {blank:,} are blank and "
            f"{len(fits) - blank:,} have more than data.max_length {config.max_length} tokens; "
            "give a larger data.max_length, or other data"
        )
    lengths = lengths[:, kept]
    count = len(kept) if objective.label else int(lengths[-1].sum())
    plan = BatchPlan(lengths, config, seed)
    return SplitPlan(plan, kept, None, int(lengths.sum()), count)


def _documents(
    config: DataConfig, tokenizer: Tokenizer, store: TokenStore, split: str, seed: int
) -> SplitPlan:
    """Plan packed rows of all documents that are not blank, or one row for each piece of them."""
    objective = config.objective_spec
    assert objective.chunking is not None
    positions = store.counts()["text"]
    positions += 2 * objective.chunking.has_frame - objective.chunking.overlap
    positions[store.blank] = 0
    starts = np.zeros(len(positions) + 1, np.int64)
    np.cumsum(positions, out=starts[1:])
    del positions  # There may be many millions of documents.
    kept = np.flatnonzero(~store.blank)
    if not starts[-1]:
        raise DataError(
            f"all {len(store.blank):,} documents of split {split!r} are blank: give documents with "
            "text"
        )
    if config.is_packed:
        count = int(starts[-1])
        return SplitPlan(PackedPlan(starts, config, seed), kept, None, count, count)
    pieces = Pieces(starts, objective.chunking.max_positions(config, tokenizer))
    # Row lengths depend on the piece's length only: compute them once per length.
    sizes = np.arange(pieces.max_positions + 1) + objective.chunking.overlap
    lengths = objective.lengths({"text": sizes}, config).astype(np.int32)[:, pieces.lengths()]
    tokens, count = int(lengths.sum(dtype=np.int64)), int(lengths[-1].sum(dtype=np.int64))
    return SplitPlan(BatchPlan(lengths, config, seed), kept, pieces, tokens, count)
