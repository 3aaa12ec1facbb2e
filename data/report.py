"""Lines about a split: what was read, what was left out, and what the tokenizer does not know."""

from collections.abc import Iterator

from heedful.data.config import DataConfig
from heedful.data.split_plan import SplitPlan
from heedful.data.store import TokenStore
from heedful.data.tokenizer import Tokenizer


def _noun(config: DataConfig) -> str:
    return "documents" if config.objective_spec.is_text else "examples"


def facts(
    config: DataConfig, split: str, split_plan: SplitPlan, characters: int
) -> tuple[str, str]:
    """Describe the examples that were read, and the batches, in a line each."""
    count = f"{split}: {len(split_plan.kept):,} {_noun(config)}, {split_plan.tokens:,} tokens"
    if config.objective_spec.is_text:
        count += f", {characters:,} characters"
    plan = split_plan.plan
    batches = (
        f"{split}: {plan.batches_per_epoch:,} batches of {', '.join(map(str, plan.shapes))}, "
        f"{plan.padding_share:.1%} padding"
    )
    return count, batches + (", packed" if config.is_packed else "")


def left_out(config: DataConfig, split: str, store: TokenStore, split_plan: SplitPlan) -> list[str]:
    """Describe the examples that were left out, in lines."""
    lines, blank = [], int(store.blank.sum())
    too_long = len(store.blank) - blank - len(split_plan.kept)
    if too_long:
        lines.append(
            f"{split}: {too_long:,} examples left out, longer than {config.max_length} tokens "
            "(--data.max-length)"
        )
    if blank:
        where = " on a side" if len(store.fields) > 1 else ""
        lines.append(f"{split}: {blank:,} {_noun(config)} left out, blank{where}")
    return lines


def doubts(
    config: DataConfig, split: str, store: TokenStore, tokenizer: Tokenizer
) -> Iterator[str]:
    """Yield a warning about unknown tokens, and a warning about spaces that decoding changes."""
    total, unknown = store.count(tokenizer.unknown)
    if tokenizer.unknown is not None and unknown:
        yield (
            f"{split}: {unknown:,} of {total:,} tokens ({unknown / total:.2%}) are "
            f"{tokenizer.name(tokenizer.unknown)}: the vocabulary lacks these parts of the text"
        )
    if tokenizer.loses_spaces and config.objective_spec.writes:
        yield (
            f"{split}: the tokenizer does not keep spaces: generated texts have one around each "
            "punctuation mark, which lowers their scores"
        )
