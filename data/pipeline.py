"""The data pipeline: tokens on disk, a plan of batches, and batches that grain reads in advance."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Self

import numpy as np

from heedful.data import labels, report, sources
from heedful.data.batch import pad_and_stack
from heedful.data.config import DataConfig
from heedful.data.errors import DataError
from heedful.data.examples import Example
from heedful.data.given import fields_given, held_part, labelled_classes, named_examples
from heedful.data.iterator import DevicePut, Reader, TrainIterator, one_ahead, read_ahead
from heedful.data.labels import classes
from heedful.data.objectives import Arrays, ChunkingSpec
from heedful.data.packing import PackedPlan, Pieces, Plan, pack
from heedful.data.split_plan import plan_split
from heedful.data.store import TokenStore, fingerprint
from heedful.data.text_parts import cut_text
from heedful.data.tokenizer import Tokenizer


def tokenizer_texts(config: DataConfig) -> Iterable[str]:
    """Return the training texts of all fields, to learn a vocabulary from.

    The texts can be iterated several times. Long texts are cut into parts, which need less memory.
    """
    return _Texts(config)


class _Texts:
    def __init__(self, config: DataConfig):
        self.config = config

    @cached_property
    def examples(self) -> Sequence[Example]:
        return sources.load(self.config, "train")

    def __iter__(self) -> Iterator[str]:
        fields = sources.fields(self.config)
        for example in self.examples:
            for field in fields:
                yield from cut_text(example[field])


@dataclass(frozen=True)
class Dataset:
    """The batches of a split. Example i is line i of the source, even if examples are left out.

    A row number of a plan is an index in `kept` (indices of the used examples), an index in
    `pieces` of documents, or the number of a row that a PackedPlan cuts from all documents.
    labels: the class or the number to predict, [examples]; None for objectives without labels.
    characters, bytes: size of the used texts, in characters and in UTF-8 bytes. target_count:
    number of positions with a target, or of examples with a label, in an epoch.

    Example:
        >>> import heedful as hf
        >>> texts = ["red cat sleeps", "blue bird sings", "small dog runs"] * 8
        >>> tokenizer = hf.Tokenizer.train(texts, hf.TokenizerConfig(kind="words"))
        >>> data = hf.Dataset.from_texts(texts, tokenizer, max_length=8, batch_tokens=64)
        >>> data
        Dataset(causal_lm, train: 24 texts, 2 batches an epoch, of 8 x 8)
        >>> int(sum(batch["weights"].sum() for batch in data.eval_batches()))
        96
    """

    config: DataConfig
    tokenizer: Tokenizer
    split: str
    seed: int
    data_fingerprint: str
    classes: tuple[str, ...]
    store: TokenStore
    labels: np.ndarray | None
    kept: np.ndarray
    pieces: Pieces | None
    train_plan: Plan
    eval_plan: Plan
    characters: int
    bytes: int
    target_count: int
    report: list[str]
    """Lines about the texts and batches, `warnings` included."""
    warnings: list[str]
    """Lines about texts that are left out and tokens that are unknown."""

    @classmethod
    def prepare(
        cls, config: DataConfig, tokenizer: Tokenizer, split: str, *, seed: int = 0
    ) -> Self:
        """Read and tokenise a split, leave out blank and long examples, and plan the batches.

        Raises DataError if source, config and tokenizer do not fit together, or if no example is
        left.
        """
        tokenizer.require(config.objective)
        examples = sources.load(config, split)
        return cls._of(config, tokenizer, split, seed, examples, sources.fields(config))

    @classmethod
    def from_texts(
        cls,
        texts: Iterable[Any],
        tokenizer: Tokenizer,
        task: str = "causal_lm",
        *,
        split: str = "train",
        seed: int = 0,
        holdout: float = 0.0,
        **settings: Any,
    ) -> Self:
        """Return the batches of texts in memory, made exactly as those of the same texts in files.

        texts: any iterable, read once. For language models, each text is a string, a document; for
        translation a pair (source, target); for classification and regression (text, label), or
        (text, text, label) for pairs. A dict with these names as keys is accepted, too: text, pair,
        label, source, target.
        task: a value of data.objective, such as causal_lm, masked_lm or classification.
        holdout: share of the texts that the splits valid and test have each, chosen by a hash of
        the text: call this once for each split, with the same texts. 0: all texts are in the split.
        settings: further fields of `DataConfig`, such as max_length and batch_tokens.
        Blank and longer texts are left out, with a UserWarning. Raises DataError, with the number
        of the text, for an item of another form, and if no text is left.

        Example:
            >>> import heedful as hf
            >>> texts = ["red cat sleeps", "blue bird sings"] * 8
            >>> tokenizer = hf.Tokenizer.train(texts, hf.TokenizerConfig(kind="words"))
            >>> data = hf.Dataset.from_texts(texts, tokenizer, max_length=8, batch_tokens=64)
            >>> batch = next(data.train_iterator())
            >>> batch["inputs"].shape, sorted(batch)
            ((8, 8), ['inputs', 'positions', 'segment_ids', 'targets', 'weights'])
        """
        config = DataConfig(source="texts", objective=task, holdout=holdout, **settings)
        examples = named_examples(texts, config)
        return cls._given(config, tokenizer, split, seed, examples).warned()

    @classmethod
    def from_arrays(
        cls,
        arrays: Iterable[Any],
        tokenizer: Tokenizer,
        task: str = "causal_lm",
        *,
        split: str = "train",
        seed: int = 0,
        holdout: float = 0.0,
        **settings: Any,
    ) -> Self:
        """Return the batches of texts that are token ids already.

        Like `from_texts`, with an array of token ids int [tokens] in place of each text, without
        begin and end: the objective adds them. Raises DataError for ids that the tokenizer lacks.

        Example:
            >>> import numpy as np, heedful as hf
            >>> tokenizer = hf.Tokenizer.train(["a b c d"], hf.TokenizerConfig(kind="words"))
            >>> ids = [np.array([4, 5, 6]), np.array([7, 4])] * 8
            >>> data = hf.Dataset.from_arrays(ids, tokenizer, max_length=8, batch_tokens=64)
            >>> data.tokenizer.decode(ids[0])
            'a b c'
        """
        config = DataConfig(source="texts", objective=task, holdout=holdout, **settings)
        examples = named_examples(arrays, config, tokenizer.vocab_size)
        return cls._given(config, tokenizer, split, seed, examples).warned()

    @classmethod
    def from_files(
        cls,
        train: str | Path | Sequence[str | Path],
        tokenizer: Tokenizer,
        task: str = "causal_lm",
        *,
        split: str = "train",
        seed: int = 0,
        **settings: Any,
    ) -> Self:
        """Return the batches of files, as `heedful train --data.source files` reads them.

        train: path or paths of the training files and folders; `valid`, `test` and `holdout` in
        `settings` decide about the other splits, like further fields of `DataConfig`. Raises
        DataError for files that cannot be read.

        Example:
            >>> import pathlib, tempfile, heedful as hf
            >>> path = pathlib.Path(tempfile.mkdtemp()) / "text.txt"
            >>> size = path.write_text("red cat sleeps\\n" * 99)
            >>> tokenizer = hf.Tokenizer.train(["red cat sleeps"], hf.TokenizerConfig(kind="words"))
            >>> hf.Dataset.from_files(path, tokenizer, max_length=8, batch_tokens=64).split
            'train'
        """
        paths = [train] if isinstance(train, str | Path) else train
        files = {"train": tuple(map(str, paths))}
        for name in ("valid", "test"):
            given = settings.pop(name, ())
            files[name] = tuple(map(str, [given] if isinstance(given, str | Path) else given))
        config = DataConfig(source="files", objective=task, **files, **settings)
        return cls.prepare(config, tokenizer, split, seed=seed).warned()

    @classmethod
    def _given(
        cls,
        config: DataConfig,
        tokenizer: Tokenizer,
        split: str,
        seed: int,
        examples: list[dict[str, Any]],
    ) -> Self:
        """Return the batches of examples that a program gave."""
        fields = fields_given(examples, config.objective_spec)
        config = replace(
            config,
            columns=fields if config.objective_spec.optional_fields else config.columns,
            classes=config.classes or labelled_classes(examples, config.objective_spec),
        )
        own = held_part(examples, fields[0], split, config.holdout)
        return cls._of(config, tokenizer, split, seed, own, fields)

    @classmethod
    def _of(
        cls,
        config: DataConfig,
        tokenizer: Tokenizer,
        split: str,
        seed: int,
        examples: Sequence[Any],
        fields: tuple[str, ...],
    ) -> Self:
        tokenizer.require(config.objective)
        data_fingerprint = fingerprint(examples)
        store = TokenStore.build(examples, fields, tokenizer, data_fingerprint)
        names = classes(config)
        targets = None
        if config.objective_spec.label:
            targets = labels.numbers(store.labels(), names, split)
        split_plan = plan_split(config, tokenizer, store, split, seed)
        is_kept = np.zeros(len(store.blank), bool)
        is_kept[split_plan.kept] = True
        characters, size = (int(n) for n in store.sizes.sum(1, where=is_kept))
        left_out = report.left_out(config, split, store, split_plan)
        doubts = [*report.doubts(config, split, store, tokenizer)]
        count, batches = report.facts(config, split, split_plan, characters)
        lines = [count, *left_out, batches, *doubts]
        if names and targets is not None:
            counts = np.bincount(targets[split_plan.kept], minlength=len(names))
            lines.append(
                f"{split}: {len(names)} classes, the largest {names[counts.argmax()]!r} with "
                f"{counts.max() / len(split_plan.kept):.1%}"
            )
        return cls(
            config=config,
            tokenizer=tokenizer,
            split=split,
            seed=seed,
            data_fingerprint=data_fingerprint,
            classes=names,
            store=store,
            labels=targets,
            kept=split_plan.kept,
            pieces=split_plan.pieces,
            train_plan=split_plan.plan,
            eval_plan=split_plan.plan.in_order(),
            characters=characters,
            bytes=size,
            target_count=split_plan.target_count,
            report=lines,
            warnings=left_out + doubts,
        )

    def warned(self) -> Self:
        """Give a UserWarning for each line of `warnings`; return the dataset."""
        for line in self.warnings:
            warnings.warn(line, stacklevel=3)
        return self

    def __repr__(self) -> str:
        shapes, count = ", ".join(map(str, self.train_plan.shapes)), self.batches_per_epoch
        return (
            f"Dataset({self.config.objective}, {self.split}: {len(self.kept):,} texts, "
            f"{count:,} batches an epoch, of {shapes})"
        )

    @property
    def batches_per_epoch(self) -> int:
        return self.train_plan.batches_per_epoch

    def train_iterator(
        self, parts: Sequence[int] = (0,), count: int = 1, place: DevicePut | None = None
    ) -> "TrainIterator":
        """Return endless training batches of a process, `{name: [B * len(parts) / count, ...]}`.

        The B rows of each global batch are divided into `count` parts; the process gets the parts
        with the indices `parts` (ascending). With `place`, the iterator yields place(batch); a
        thread computes it before the caller asks for the batch.
        """
        read = self._reader(self.train_plan, parts, count)
        return TrainIterator(read if place is None else partial(one_ahead, read, place))

    def eval_batches(self, parts: Sequence[int] = (0,), count: int = 1) -> Iterator[Arrays]:
        """Return the evaluation batches of a process: every example once, in a fixed order.

        `parts` and `count` are those of `train_iterator`.
        """
        read = self._reader(self.eval_plan, parts, count)
        return read(0, self.batches_per_epoch)

    def _reader(self, plan: Plan, parts: Sequence[int], count: int) -> Reader:
        """Return read(start, stop), which yields `parts` of global batches start to stop - 1."""
        if self.config.batch_multiple % count:
            raise DataError(
                f"data.batch_multiple is {self.config.batch_multiple}: give a multiple of {count}, "
                "the number of parts into which batches are divided"
            )
        batch = partial(self.batch, plan, parts=parts, count=count)
        return partial(read_ahead, batch, self.config.workers)

    def batch(self, plan: Plan, index: int, parts: Sequence[int] = (0,), count: int = 1) -> Arrays:
        """Return the rows of global batch `index` that are in `parts`, of `count` parts in all."""
        shape, numbers = plan.rows(index)
        size, lengths = shape.rows // count, shape.lengths[::-1]
        local = np.concatenate([numbers[part * size : (part + 1) * size] for part in parts])
        n, epoch = size * len(parts), index // plan.batches_per_epoch
        if len(local):
            return pad_and_stack([self._row(plan, epoch, int(i)) for i in local], n, *lengths)
        # In the last batch of a bucket, some parts have no rows: return only padding.
        batch = pad_and_stack([self._row(plan, epoch, int(numbers[0]))], n, *lengths)
        return {name: np.zeros_like(array) for name, array in batch.items()}

    def _row(self, plan: Plan, epoch: int, number: int) -> Arrays:
        objective = self.config.objective_spec
        if objective.chunking:
            examples = self._pieces(objective.chunking, plan, epoch, number)
        else:
            number = int(self.kept[number])
            examples = [self._example(number)]
        rng = np.random.default_rng((self.seed, epoch, number)) if objective.draws else None
        rows = [objective.row(e, rng, self.config, self.tokenizer) for e in examples]
        return pack(rows) if isinstance(plan, PackedPlan) else rows[0]

    def texts(self) -> list[Example]:
        """Return the texts of all examples by field, decoded from their tokens."""
        return [
            {field: self.tokenizer.decode(ids) for field, ids in self.store[number].items()}
            for number in range(len(self.store.blank))
        ]

    def _example(self, number: int) -> Arrays:
        example = self.store[number]
        return example if self.labels is None else {**example, "label": self.labels[number]}

    def _pieces(self, chunking: ChunkingSpec, plan: Plan, epoch: int, number: int) -> list[Arrays]:
        if isinstance(plan, PackedPlan):
            spans = plan.spans(epoch, number)
        else:
            assert self.pieces is not None
            spans = [self.pieces[number]]
        frame = self.tokenizer.frame if chunking.has_frame else None
        return [
            {"text": self.store.text(document, start, stop + chunking.overlap, frame)}
            for document, start, stop in spans
        ]
