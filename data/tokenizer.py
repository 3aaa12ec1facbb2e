"""Convert text to token ids and back, with the tokenizer that a tokenizer.json describes."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import tokenizers
from tokenizers import models

from heedful.data.config import MAX_VOCAB_SIZE, TokenizerConfig
from heedful.data.errors import DataError
from heedful.data.objectives import objective_of
from heedful.data.special import FILE, Special, named_beside, read_config
from heedful.data.text_parts import cut_text, find_border
from heedful.data.vocabulary import SPECIAL, framed, learn, read_wordpiece
from heedful.data.word_borders import word_borders
from heedful.data.writing import write_whole

# Ids in a tokenizer that is learned here; a loaded tokenizer may have other ids.
PAD, BOS, EOS, UNK = range(len(SPECIAL))

# Names of special tokens, here and in other tokenizers.
PADS = ("<pad>", "[PAD]")
BEGINS = ("<bos>", "[CLS]", "<s>", "<|begin_of_text|>", "<|endoftext|>")
ENDS = ("<eos>", "[SEP]", "</s>", "<|end_of_text|>", "<|endoftext|>")
UNKNOWNS = ("<unk>", "[UNK]")
MASKS = ("<mask>", "[MASK]")
SPELLED = {
    "pad": PADS, "bos": BEGINS + PADS, "eos": ENDS, "unk": UNKNOWNS, "mask": MASKS
}  # fmt: skip
SENTINEL = re.compile(r"<extra_id_(\d+)>")


class Tokenizer:
    """A tokenizer with a vocabulary that was learned here or comes from another model.

    vocab_size: 1 + the largest id for which the model has an embedding. rowless: added tokens with
    larger ids, by name; texts with these tokens are refused. pad, bos, eos, unk, mask: ids of
    special tokens; None: the tokenizer lacks this token. Without a begin token, `bos` is `pad`,
    with which decoders of T5 and Marian start. sentinels: ids of <extra_id_0>, <extra_id_1>, ...
    is_special: bool [vocab_size], true for ids that are not text, `unk` included. ordinary: ids of
    text. pretokenized: true if texts are words separated by spaces. fingerprint: sha256 (hex) of
    the contents of tokenizer.json and of changes by `special`.

    Example:
        >>> import heedful as hf
        >>> tokenizer = hf.Tokenizer.train(["red cat", "red dog"], hf.TokenizerConfig(kind="words"))
        >>> (ids,) = tokenizer.encode_batch(["red dog"])
        >>> tokenizer.decode(ids)
        'red dog'
    """

    def __init__(self, text: str, special: Special | None = None, rows: int | None = None):
        """Create a tokenizer from the contents of a tokenizer.json.

        `special` has special tokens from other files; None: special tokens are found by their
        names. `rows` is the number of embeddings of an existing model; None: there is no model yet.
        Raises DataError if the vocabulary without added tokens has more entries than `rows`.
        """
        contents = json.loads(text)
        _require_bounds(contents)
        self._json, self.special, self._rows = text, special, rows
        self._tokenizer = tokenizers.Tokenizer.from_str(text)
        # The file may enable both. Here texts are never truncated, and batches are padded later.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # The text "<eos>" is encoded as text, not as the special token.
        self._tokenizer.encode_special_tokens = True
        self.pretokenized = isinstance(self._tokenizer.model, models.WordLevel)

        vocabulary = self._tokenizer.get_vocab()
        size = 1 + max(vocabulary.values())
        self.vocab_size = size if rows is None else min(size, rows)
        added = {token["content"]: token for token in contents["added_tokens"]}
        by_id = sorted(vocabulary, key=vocabulary.__getitem__)
        self.rowless = {n: i for n in by_id if (i := vocabulary[n]) >= self.vocab_size}
        if self.rowless.keys() - added.keys():
            raise DataError(
                f"has {size} entries, but the model has {rows} embeddings: use the model's own "
                "tokenizer"
            )
        for name in self.rowless:
            del vocabulary[name]
            added.pop(name)
        # Search only added tokens, if any: a word may be spelled like a special token.
        names = {name: vocabulary[name] for name in (added or vocabulary)}
        find = lambda known: next((names[name] for name in known if name in names), None)  # noqa: E731
        roles = {role: find(known) for role, known in SPELLED.items()}
        numbers = {int(m[1]): names[m[0]] for m in map(SENTINEL.fullmatch, names) if m}
        self.sentinels = tuple(numbers[i] for i in sorted(numbers))
        marked = {names[name] for name, token in added.items() if token["special"]}
        marked |= {i for i in (*roles.values(), *self.sentinels) if i is not None}
        changes = {} if special is None else special.changes(roles, marked)
        roles |= changes
        self.pad, self.eos, self.unk, self.mask = (roles[r] for r in ("pad", "eos", "unk", "mask"))
        self.bos = self.pad if roles["bos"] is None else roles["bos"]
        self._ends = changes.get("ends")

        canonical = json.dumps(contents, sort_keys=True, separators=(",", ":"))
        canonical += json.dumps(changes, sort_keys=True) if changes else ""
        self.fingerprint = hashlib.sha256(canonical.encode()).hexdigest()
        self.is_special = np.ones(self.vocab_size, bool)
        self.is_special[list(vocabulary.values())] = False
        self.is_special[[*marked, *changes.get("named", ())]] = True
        self.ordinary = np.flatnonzero(~self.is_special)
        self._hidden = self.is_special.copy()  # Neither encoded from text nor decoded to text.
        if self.unk is not None:
            self._hidden[self.unk] = False

    def __reduce__(self) -> tuple[Any, ...]:
        return Tokenizer, (self._json, self.special, self._rows)

    @classmethod
    def train(
        cls, texts: Iterable[str], config: TokenizerConfig, objective: str | None = None
    ) -> Self:
        """Learn a vocabulary from the texts; the same texts give the same tokenizer.

        The vocabulary begins with <pad>, <bos>, <eos>, <unk> = 0, 1, 2, 3, then <mask> or sentinels
        if the objective needs them. bpe and bytes encode any Unicode text without loss. The other
        kinds encode as `unk`: words outside of the vocabulary (words), characters that the training
        texts lack (chars), and all but the 1,000 most frequent characters (wordpiece). Raises
        DataError for a vocab_size that is too small.
        """
        return cls(learn(texts, config, objective))

    @classmethod
    def load(cls, path: str | Path, rows: int | None = None) -> Self:
        """Load a tokenizer.json of a run or of Hugging Face, or a vocab.txt of WordPiece.

        Other files in the directory of `path` define special tokens, and how a vocab.txt splits
        texts. `rows`: see `__init__`. Raises DataError with the name of the file.
        """
        path = Path(path)
        try:
            text = path.read_text("utf-8")
            text = read_wordpiece(text, read_config(path)) if path.suffix == ".txt" else text
            tokenizer = cls(text, rows=rows)
        except OSError as error:
            raise DataError(
                f"cannot read the tokenizer {path}: {error.strerror}; check the path"
            ) from error
        except DataError as error:
            raise DataError(f"{path} {error}") from error
        except Exception as error:  # The library raises a bare Exception for a broken file.
            raise DataError(
                f"{path} is not a tokenizer: give a tokenizer.json, or a vocab.txt of WordPiece"
            ) from error
        of_run = path.with_name(FILE)
        if of_run.is_file():
            special = Special.load(of_run, tokenizer.vocab_size)
        else:
            vocabulary = tokenizer._tokenizer.get_vocab()
            vocabulary = {n: i for n, i in vocabulary.items() if n not in tokenizer.rowless}
            special = named_beside(path, vocabulary, tokenizer.unknown)
        return tokenizer if special is None else tokenizer.following(special)

    def following(self, special: Special | None) -> Self:
        """Return the same tokenizer with special tokens of files; None: found by their names."""
        return type(self)(self._json, special, self._rows)

    @classmethod
    def prepare(cls, texts: Iterable[str], config: TokenizerConfig, objective: str) -> Self:
        """Load the tokenizer at `config.path`, or learn a vocabulary from the texts if it is None.

        Raises DataError if the objective needs special tokens that the tokenizer lacks, or if the
        objective generates text and the tokenizer loses spaces.
        """
        if config.kind == "wordpiece" and config.path is None and objective_of(objective).writes:
            raise DataError(_spaces("data.tokenizer.kind wordpiece", objective))
        if config.path is None:
            return cls.train(texts, config, objective)
        if config.lowercase:
            raise DataError(
                f"data.tokenizer.lowercase is for learned vocabularies, not for {config.path} "
                "(data.tokenizer.path): leave data.tokenizer.lowercase out"
            )
        tokenizer = cls.load(config.path)
        tokenizer.require(objective, config.path)
        if tokenizer.loses_spaces and objective_of(objective).writes:
            raise DataError(_spaces(f"data.tokenizer.path {config.path}", objective))
        return tokenizer

    def require(self, objective: str, name: str = "the tokenizer") -> None:
        """Raise DataError if a special token that the objective needs is missing.

        `name` names the tokenizer in the message.
        """
        needs = objective_of(objective)
        has = {
            "a begin token like <bos> or [CLS]": self.bos is not None,
            "an end token like <eos> or [SEP]": self.eos is not None,
            "a mask token like <mask> or [MASK]": self.mask is not None or not needs.needs_mask,
            "sentinels like <extra_id_0>": bool(self.sentinels) or not needs.needs_sentinels,
        }
        missing = [token for token, is_present in has.items() if not is_present]
        if missing:
            raise DataError(
                f"{name} lacks {' and '.join(missing)}, which data.objective {objective} needs: "
                "set data.tokenizer.path to a tokenizer with these tokens, or leave the path out "
                "to learn a vocabulary"
            )

    @cached_property
    def unknown(self) -> int | None:
        """Id of the token for text outside of the vocabulary; None: there is no such token."""
        model = json.loads(self._json)["model"]
        name = model.get("unk_token")
        return model.get("unk_id") if name is None else self._tokenizer.token_to_id(name)

    @property
    def ends(self) -> tuple[int, ...]:
        """All tokens that end generation; (): no token ends it."""
        return self._ends or (() if self.eos is None else (self.eos,))

    @property
    def frame(self) -> tuple[int, int]:
        """Begin and end tokens; the tokenizer must have both (see `require`)."""
        assert self.bos is not None and self.eos is not None
        return self.bos, self.eos

    def name(self, token: int) -> str:
        """Return the name of a token in the vocabulary; "" for an unknown id."""
        return self._tokenizer.id_to_token(token) or ""

    def reads_as(self, other: "Tokenizer") -> bool:
        """Tell if `other` has the same tokenizer.json; special tokens of files may differ."""
        return self.following(None).fingerprint == other.following(None).fingerprint

    def save(self, path: str | Path) -> None:
        """Write the tokenizer.json `path` and, in the same directory, the special tokens."""
        beside = Path(path).with_name(FILE)
        beside.unlink(missing_ok=True)  # It may belong to a previous tokenizer.
        if self.special is not None:
            self.special.save(beside)
        write_whole(Path(path), self._json)

    @property
    def is_bare(self) -> bool:
        """True if the tokenizer.json itself adds no begin and end, as if learned by `train`."""
        return json.loads(self._json).get("post_processor") is None

    def framing(self, architecture: str) -> Self:
        """Return the same tokenizer for the library transformers: it adds begin and end itself.

        A tokenizer that already adds begin and end is returned unchanged.
        """
        if not self.is_bare or self.eos is None:
            return self
        begin = None if self.bos is None else self.name(self.bos)
        text = framed(self._json, architecture, begin, self.name(self.eos))
        return type(self)(text, self.special, self._rows)

    def encode_batch(
        self, texts: Sequence[str], *, special_tokens: bool = False
    ) -> list[np.ndarray]:
        """Return the ids of each text, int32 [tokens], without begin and end.

        The name of a special token in a text is encoded as text, or, with `special_tokens`, as the
        token. Raises DataError for a text with a token for which the model has no embedding.
        """
        if special_tokens:
            encodings = self._with_special.encode_batch_fast(list(texts), add_special_tokens=False)
            return [self._with_rows(np.array(e.ids, np.int32)) for e in encodings]
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        rows = (self._with_rows(np.array(e.ids, np.int32)) for e in encodings)
        return [self._without_special(ids) for ids in rows]

    def _with_rows(self, ids: np.ndarray) -> np.ndarray:
        if self.rowless and (beyond := ids[ids >= self.vocab_size]).size:
            raise DataError(
                f"a text has {self.name(int(beyond[0]))!r}, token {beyond[0]} of the tokenizer, "
                f"but the model has only {self.vocab_size} embeddings: delete the token from the "
                "text"
            )
        return ids

    @cached_property
    def _with_special(self) -> tokenizers.Tokenizer:
        reader = tokenizers.Tokenizer.from_str(self._json)
        reader.no_truncation()
        reader.no_padding()
        return reader

    def count_unknown(self, ids: np.ndarray) -> int:
        """Count the ids that stand for text outside of the vocabulary."""
        return 0 if self.unknown is None else int(np.count_nonzero(ids == self.unknown))

    @cached_property
    def loses_spaces(self) -> bool:
        """True if decoding adds spaces that the text did not have, as for WordPiece."""
        (ids,) = self.encode_batch(["(a)"])
        return " " in self._tokenizer.decode(ids.tolist(), skip_special_tokens=False).strip()

    def _without_special(self, ids: np.ndarray) -> np.ndarray:
        """Replace each special token that the library found in a text by its characters."""
        if not self._hidden[ids].any():
            return ids
        parts = [self._spell(int(i)) if self._hidden[i] else [i] for i in ids]
        return np.concatenate(parts).astype(np.int32)

    def _spell(self, special: int) -> list[int]:
        name, model = self._tokenizer.id_to_token(special), self._tokenizer.model
        # A vocabulary of whole words has no characters.
        characters = [] if self.pretokenized or name is None else list(name)
        ids = [token.id for character in characters for token in model.tokenize(character)]
        return ids or ([] if self.unk is None else [self.unk])

    def parts(self, text: str) -> Iterator[str]:
        """Yield a text in parts of about 131,000 characters that have the same ids as the text.

        Texts are cut between words, or anywhere if each character or byte is a token. A text is not
        cut if tokens cross words, or if the tokenizer marks the beginning of a text (SentencePiece
        of LLaMA); such a tokenizer needs about 100 bytes of memory per token.
        """
        return cut_text(text, self._border)

    @cached_property
    def _border(self) -> re.Pattern[str] | None:
        model = json.loads(self._json)["model"]
        is_anywhere = model["type"] == "BPE" and not model["merges"]
        return find_border(self.encode_batch, is_anywhere=is_anywhere)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of the ids, without special tokens."""
        # A model may have more outputs than the tokenizer has tokens.
        kept = [int(i) for i in ids if i < self.vocab_size and not self._hidden[i]]
        return self.plain(self._tokenizer.decode(kept, skip_special_tokens=False))

    def plain(self, text: str) -> str:
        """Return a text for people: pieces that end with `@@` are joined to words."""
        return re.sub(r"@@( |$)", "", text) if self.pretokenized else text

    def words(self, ids: np.ndarray) -> np.ndarray:
        """Return the index of the word of each token in the text, from 0, int [tokens].

        The tokenizer may mark words; otherwise a word is a run of letters and digits with the space
        before the run. Other characters, special tokens and ideographs are words by themselves.
        """
        continues, is_continued = self._word_borders
        starts = np.ones(len(ids), bool)
        starts[1:] = ~(continues[ids[1:]] & is_continued[ids[:-1]])
        return np.cumsum(starts) - 1

    @cached_property
    def _word_borders(self) -> tuple[np.ndarray, np.ndarray]:
        return word_borders(self._tokenizer, self.is_special)


def _require_bounds(contents: dict[str, Any]) -> None:
    """Raise DataError for ids that would need too much memory; the caller adds the path."""
    vocabulary = contents["model"]["vocab"]
    ids = vocabulary.values() if isinstance(vocabulary, dict) else [len(vocabulary) - 1]
    if max(ids) >= MAX_VOCAB_SIZE:
        raise DataError(
            f"gives a token the id {max(ids)}, but ids are below {MAX_VOCAB_SIZE:,}: correct the "
            "id, or give another tokenizer"
        )


def _spaces(what: str, objective: str) -> str:
    return (
        f"{what} does not keep the spaces of a text, but data.objective {objective} generates "
        "text: use data.tokenizer.kind bpe, chars or bytes"
    )
