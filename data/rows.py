"""What the rows of a split are made of, and how they are planned."""

from typing import NamedTuple

import numpy as np

from heedful.data.config import DataConfig
from heedful.data.errors import DataError
from heedful.data.packing import BatchPlan, PackedPlan, Pieces, Plan
from heedful.data.store import TokenStore
from heedful.data.tokenizer import Tokenizer


class SplitPlan(NamedTuple):
    """What the rows of a split are made of; `tokens` is the sum of their lengths on all sides."""

    plan: Plan
    kept: np.ndarray
    pieces: Pieces | None
    tokens: int
    target_count: int


def arrange(
    config: DataConfig, tokenizer: Tokenizer, store: TokenStore, split: str, seed: int
) -> SplitPlan:
    """Plan the training batches of a split; raise DataError when nothing of it can be used."""
    plan = _documents if config.objective_spec.is_text else _examples
    return plan(config, tokenizer, store, split, seed)


def _examples(
    config: DataConfig, tokenizer: Tokenizer, store: TokenStore, split: str, seed: int
) -> SplitPlan:
    """One row for each example that is not blank or too long."""
    objective = config.objective_spec
    lengths = objective.lengths(store.counts(), config)
    fits = lengths.max(0) <= config.max_length
    kept = np.flatnonzero(fits & ~store.blank)
    if not len(kept):
        blank = int(store.blank.sum())
        raise DataError(
            f"no example of split {split!r} is left: {blank:,} are blank and "
            f"{len(fits) - blank:,} have more than data.max_length {config.max_length} tokens; "
            "give a larger one"
        )
    lengths = lengths[:, kept]
    count = len(kept) if objective.label else int(lengths[-1].sum())
    plan = BatchPlan(lengths, config, seed)
    return SplitPlan(plan, kept, None, int(lengths.sum()), count)


def _documents(
    config: DataConfig, tokenizer: Tokenizer, store: TokenStore, split: str, seed: int
) -> SplitPlan:
    """All documents that are not blank, end to end, or one row for each of their pieces."""
    objective = config.objective_spec
    assert objective.cut is not None
    positions = store.counts()["text"]
    positions += 2 * objective.cut.framed - objective.cut.overlap
    positions[store.blank] = 0
    starts = np.zeros(len(positions) + 1, np.int64)
    np.cumsum(positions, out=starts[1:])
    del positions  # There may be many millions of documents.
    kept = np.flatnonzero(~store.blank)
    if not starts[-1]:
        raise DataError(f"all {len(store.blank):,} documents of split {split!r} are blank")
    if config.is_packed:
        count = int(starts[-1])
        return SplitPlan(PackedPlan(starts, config, seed), kept, None, count, count)
    pieces = Pieces(starts, objective.cut.longest(config, tokenizer))
    # The lengths of a row follow from that of its piece, which has few values.
    sizes = np.arange(pieces.longest + 1) + objective.cut.overlap
    lengths = objective.lengths({"text": sizes}, config).astype(np.int32)[:, pieces.lengths()]
    tokens, count = int(lengths.sum(dtype=np.int64)), int(lengths[-1].sum(dtype=np.int64))
    return SplitPlan(BatchPlan(lengths, config, seed), kept, pieces, tokens, count)
