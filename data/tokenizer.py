"""Text to token ids and back. Everything about a tokenizer is in its one tokenizer.json."""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import numpy as np
import tokenizers
from tokenizers import models

from heedful.data.config import MOST_TOKENS, TokenizerConfig
from heedful.data.errors import DataError
from heedful.data.objectives import OBJECTIVES
from heedful.data.special import FILE, Special, named_beside, read_config
from heedful.data.vocabulary import BYTES, SPECIAL, framed, learn, read_wordpiece
from heedful.data.writing import write_whole

# The ids in a tokenizer that is learned here. Code asks the tokenizer, which may be another's.
PAD, BOS, EOS, UNK = range(len(SPECIAL))

# What the special tokens are called here, and by the tokenizers of other people.
PADS = ("<pad>", "[PAD]")
BEGINS = ("<bos>", "[CLS]", "<s>", "<|begin_of_text|>", "<|endoftext|>")
ENDS = ("<eos>", "[SEP]", "</s>", "<|end_of_text|>", "<|endoftext|>")
UNKNOWNS = ("<unk>", "[UNK]")
MASKS = ("<mask>", "[MASK]")
SPELLED = {
    "pad": PADS, "bos": BEGINS + PADS, "eos": ENDS, "unk": UNKNOWNS, "mask": MASKS
}  # fmt: skip
SENTINEL = re.compile(r"<extra_id_(\d+)>")

PART = 1 << 17  # Characters of a long text that are tokenised at a time.
WORDS = r"(?<=\S)(?= \S)"  # Before a space between words; the space belongs to the second one.
BORDER = re.compile(WORDS + r"|(?<=\S\n)(?=\S)")  # Or between lines.
PROBE = (
    "At the end of the day,\nall of it \N{EM DASH} as I've said in 2019 \N{EM DASH} is (not) so."
)


class Tokenizer:
    """Text to ids and back, with a vocabulary learned here or taken over from another model.

    vocab_size: 1 + the largest id that the model has a row for.
    rowless: added tokens with larger ids, by name; a text that holds one is refused.
    pad, bos, eos, unk, mask: ids of the special tokens, None for those that it lacks; `bos` is
    `pad` then, with which the decoders of such models (T5, Marian) begin.
    sentinels: ids of <extra_id_0>, <extra_id_1>, ...
    is_special: bool [V], whether an id is no text, `unk` included; ordinary: the ids that are.
    pretokenized: whether texts are words already, separated by spaces.
    fingerprint: sha256 (hex) of the tokenizer.json, whatever its layout, and of what `special` says
    otherwise.
    """

    def __init__(self, text: str, special: Special | None = None, rows: int | None = None):
        """Takes the contents of a tokenizer.json, and what other files say of its special tokens.

        Without `special` their spelling tells them. `rows` is the vocab_size of a model that
        exists: raises DataError where the vocabulary, without added tokens, is larger.
        """
        contents = json.loads(text)
        _require_bounds(contents)
        self._json, self.special, self._rows = text, special, rows
        self._tokenizer = tokenizers.Tokenizer.from_str(text)
        # A file may ask for these. Here texts are never cut, and batches do the padding.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # The text "<eos>" is read like any other text instead of ending a sentence.
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
                f"has {size} entries, but its model was trained with {rows}: put the model's own "
                "tokenizer there"
            )
        for name in self.rowless:
            del vocabulary[name]
            added.pop(name)
        # An ordinary word may be spelled like the special token of another tokenizer.
        names = {name: vocabulary[name] for name in (added or vocabulary)}
        find = lambda known: next((names[name] for name in known if name in names), None)  # noqa: E731
        roles = {role: find(known) for role, known in SPELLED.items()}
        numbers = {int(m[1]): names[m[0]] for m in map(SENTINEL.fullmatch, names) if m}
        self.sentinels = tuple(numbers[i] for i in sorted(numbers))
        marked = {names[name] for name, token in added.items() if token["special"]}
        marked |= {i for i in (*roles.values(), *self.sentinels) if i is not None}
        said = {} if special is None else special.changes(roles, marked)
        roles |= said
        self.pad, self.eos, self.unk, self.mask = (roles[r] for r in ("pad", "eos", "unk", "mask"))
        self.bos = self.pad if roles["bos"] is None else roles["bos"]
        self._ends = said.get("ends")

        canonical = json.dumps(contents, sort_keys=True, separators=(",", ":"))
        canonical += json.dumps(said, sort_keys=True) if said else ""
        self.fingerprint = hashlib.sha256(canonical.encode()).hexdigest()
        self.is_special = np.ones(self.vocab_size, bool)
        self.is_special[list(vocabulary.values())] = False
        self.is_special[[*marked, *said.get("named", ())]] = True
        self.ordinary = np.flatnonzero(~self.is_special)
        self._hidden = self.is_special.copy()  # What is never read from text, nor shown in it.
        if self.unk is not None:
            self._hidden[self.unk] = False

    def __reduce__(self) -> tuple[Any, ...]:
        return Tokenizer, (self._json, self.special, self._rows)

    @classmethod
    def train(
        cls, texts: Iterable[str], config: TokenizerConfig, objective: str | None = None
    ) -> Self:
        """Learns a vocabulary from the texts; the same texts give the same tokenizer.

        It holds <pad>, <bos>, <eos>, <unk> = 0, 1, 2, 3, then <mask> for masked_lm, or the
        sentinels for span_corruption. Byte-level BPE and bytes read any Unicode text without loss
        and never yield `unk`; what the other kinds do not know becomes `unk`: words outside the
        vocabulary, characters that the texts lack, for wordpiece all but the 1,000 most frequent.
        """
        return cls(learn(texts, config, objective))

    @classmethod
    def load(cls, path: str | Path, rows: int | None = None) -> Self:
        """Reads the tokenizer.json of a run or of Hugging Face, or the vocab.txt of WordPiece.

        Files beside it say which tokens are special, and how a vocab.txt splits. `rows` is the
        vocab_size of the model that it is for, if there is one.
        """
        path = Path(path)
        try:
            text = path.read_text("utf-8")
            text = read_wordpiece(text, read_config(path)) if path.suffix == ".txt" else text
            tokenizer = cls(text, rows=rows)
        except OSError as error:
            raise DataError(f"cannot read the tokenizer {path}: {error.strerror}") from error
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
        """Returns the same tokenizer with these special tokens; None: those of its spelling."""
        return type(self)(self._json, special, self._rows)

    @classmethod
    def prepare(cls, texts: Iterable[str], config: TokenizerConfig, objective: str) -> Self:
        """Loads the tokenizer that the config names, or else learns one from the texts.

        Raises DataError when the objective needs special tokens that the loaded one lacks, and when
        its texts would be written with other spaces than they have.
        """
        if config.kind == "wordpiece" and config.path is None and OBJECTIVES[objective].writes:
            raise DataError(_spaces("data.tokenizer.kind wordpiece", objective))
        if config.path is None:
            return cls.train(texts, config, objective)
        if config.lowercase:
            raise DataError(
                f"data.tokenizer.lowercase is for learning a vocabulary: {config.path} says "
                "whether it folds case"
            )
        tokenizer = cls.load(config.path)
        tokenizer.require(objective, config.path)
        if tokenizer.loses_spaces and OBJECTIVES[objective].writes:
            raise DataError(_spaces(f"data.tokenizer.path {config.path}", objective))
        return tokenizer

    def require(self, objective: str, name: str = "the tokenizer") -> None:
        """Raises DataError when a special token that the objective needs is missing."""
        needs = OBJECTIVES[objective]
        has = {
            "a begin, like <bos> or [CLS]": self.bos is not None,
            "an end, like <eos> or [SEP]": self.eos is not None,
            "a mask, like <mask> or [MASK]": self.mask is not None or not needs.needs_mask,
            "sentinels, like <extra_id_0>": bool(self.sentinels) or not needs.needs_sentinels,
        }
        missing = [token for token, is_there in has.items() if not is_there]
        if missing:
            raise DataError(
                f"{name} lacks {' and '.join(missing)}, which data.objective {objective} needs: "
                "give data.tokenizer.path one that has them, or none, to learn one"
            )

    @cached_property
    def unknown(self) -> int | None:
        """The token that stands for what the vocabulary lacks; None: it has all texts."""
        model = json.loads(self._json)["model"]
        name = model.get("unk_token")
        return model.get("unk_id") if name is None else self._tokenizer.token_to_id(name)

    @property
    def ends(self) -> tuple[int, ...]:
        """All tokens that end what a model writes; () where there is none."""
        return self._ends or (() if self.eos is None else (self.eos,))

    @property
    def frame(self) -> tuple[int, int]:
        """Begin and end of a text; both must be there (see `require`)."""
        assert self.bos is not None and self.eos is not None
        return self.bos, self.eos

    def name(self, token: int) -> str:
        """How the vocabulary spells a token."""
        return self._tokenizer.id_to_token(token) or ""

    def reads_as(self, other: "Tokenizer") -> bool:
        """Tell if the tokenizer.json is the same, whatever other files say of special tokens."""
        return self.following(None).fingerprint == other.following(None).fingerprint

    def save(self, path: str | Path) -> None:
        """Writes the tokenizer.json, and beside it what other files say of its special tokens."""
        beside = Path(path).with_name(FILE)
        beside.unlink(missing_ok=True)  # Of a tokenizer that stood here before.
        if self.special is not None:
            self.special.save(beside)
        write_whole(Path(path), self._json)

    @property
    def is_bare(self) -> bool:
        """True where its tokenizer.json leaves begin and end to the caller, as ours do."""
        return json.loads(self._json).get("post_processor") is None

    def framing(self, architecture: str) -> Self:
        """Returns the same tokenizer for transformers, which asks it for begin and end.

        One that puts them around a text already is as it was.
        """
        if not self.is_bare or self.eos is None:
            return self
        begin = None if self.bos is None else self.name(self.bos)
        text = framed(self._json, architecture, begin, self.name(self.eos))
        return type(self)(text, self.special, self._rows)

    def encode_batch(
        self, texts: Sequence[str], *, special_tokens: bool = False
    ) -> list[np.ndarray]:
        """Returns the ids of each text, int32 [T], without begin or end.

        What is spelled like a special token is text, or with `special_tokens` that token. Raises
        DataError for a text with a token that the model has no row for.
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
                f"a text has {self.name(int(beyond[0]))!r}, which the tokenizer has as number "
                f"{beyond[0]}, but the model has only {self.vocab_size} rows of embeddings: take "
                "it out of the text"
            )
        return ids

    @cached_property
    def _with_special(self) -> tokenizers.Tokenizer:
        reader = tokenizers.Tokenizer.from_str(self._json)
        reader.no_truncation()
        reader.no_padding()
        return reader

    def count_unknown(self, ids: np.ndarray) -> int:
        """Returns how many of the tokens stand for text that the vocabulary does not have."""
        return 0 if self.unknown is None else int(np.count_nonzero(ids == self.unknown))

    @cached_property
    def loses_spaces(self) -> bool:
        """True where a text comes back with spaces that it did not have, as from WordPiece."""
        (ids,) = self.encode_batch(["(a)"])
        return " " in self._tokenizer.decode(ids.tolist(), skip_special_tokens=False).strip()

    def _without_special(self, ids: np.ndarray) -> np.ndarray:
        """Spells out special tokens that the model's vocabulary has recognised in a text."""
        if not self._hidden[ids].any():
            return ids
        parts = [self._spell(int(i)) if self._hidden[i] else [i] for i in ids]
        return np.concatenate(parts).astype(np.int32)

    def _spell(self, special: int) -> list[int]:
        name, model = self._tokenizer.id_to_token(special), self._tokenizer.model
        # For whole words there is nothing smaller.
        characters = [] if self.pretokenized or name is None else list(name)
        ids = [token.id for character in characters for token in model.tokenize(character)]
        return ids or ([] if self.unk is None else [self.unk])

    def parts(self, text: str) -> Iterator[str]:
        """Yields a text in parts whose ids, end to end, are those of the text.

        A part has about 131,000 characters. Texts are cut between words, or anywhere if each
        character or byte is a token. Those of a tokenizer that ties words together, or marks where
        a text begins (SentencePiece's of LLaMA), stay whole and need memory accordingly: about 100
        bytes a token.
        """
        return cut_text(text, self._border)

    @cached_property
    def _border(self) -> re.Pattern[str] | None:
        model = json.loads(self._json)["model"]
        if model["type"] == "BPE" and not model["merges"]:
            borders = [re.compile("")]
        else:
            borders = [BORDER, re.compile(WORDS)]
        for border in borders:
            cuts = [0, *(match.start() for match in border.finditer(PROBE)), len(PROBE)]
            parts = [PROBE[i:j] for i, j in pairwise(cuts) if i < j]
            whole, *rows = self.encode_batch([PROBE, *parts])
            if np.array_equal(whole, np.concatenate(rows)):
                return border
        return None

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Returns the text of the ids. Special tokens are left out wherever they stand."""
        # A model may have more outputs than there are tokens.
        kept = [int(i) for i in ids if i < self.vocab_size and not self._hidden[i]]
        return self.plain(self._tokenizer.decode(kept, skip_special_tokens=False))

    def plain(self, text: str) -> str:
        """Returns a text of the data as people read it: pieces with `@@` become words again."""
        return re.sub(r"@@( |$)", "", text) if self.pretokenized else text

    def words(self, ids: np.ndarray) -> np.ndarray:
        """Returns the number of the word that each token is a piece of, from 0, int [T].

        A word is what the tokenizer marks as one, or a run of letters and digits with the space
        before it. Any other character, a special token and an ideograph are words by themselves.
        """
        goes_on, may_go_on = self._borders_of_words
        starts = np.ones(len(ids), bool)
        starts[1:] = ~(goes_on[ids[1:]] & may_go_on[ids[:-1]])
        return np.cumsum(starts) - 1

    @cached_property
    def _borders_of_words(self) -> tuple[np.ndarray, np.ndarray]:
        """Whether a token can go on with the word before it, and with one after it, bool [V]."""
        model = self._tokenizer.model
        if self.pretokenized:
            return self._table(lambda _: True), self._table(lambda name: name.endswith("@@"))
        if isinstance(model, models.WordPiece):
            prefix = model.continuing_subword_prefix
            return self._table(lambda name: name.startswith(prefix)), self._table(lambda _: True)
        by_bytes = '"ByteLevel"' in json.dumps(json.loads(self._json)["decoder"])
        spelled = lambda name: _spelling(name, by_bytes)  # noqa: E731
        return (
            self._table(lambda name: _is_letter(spelled(name)[:1])),
            self._table(lambda name: spelled(name).endswith(" ") or _is_letter(spelled(name)[-1:])),
        )

    def _table(self, of: Callable[[str], bool]) -> np.ndarray:
        names = (self._tokenizer.id_to_token(i) for i in range(self.vocab_size))
        return np.array([bool(name) and of(name) for name in names]) & ~self.is_special


def cut_text(text: str, border: re.Pattern[str] | None = BORDER) -> Iterator[str]:
    """Yields a text in parts of about 131,000 characters, cut where `border` matches."""
    start = 0
    while border and len(text) - start > PART and (cut := border.search(text, start + PART)):
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]


def _spelling(name: str, by_bytes: bool) -> str:
    """The characters of a token; a letter stands for a byte of a character beyond ASCII."""
    if by_bytes:
        codes = [BYTES.get(character, 32) for character in name]
        return "".join(chr(code) if code < 128 else "x" for code in codes)
    if byte := re.fullmatch(r"<0x([0-9A-F]{2})>", name):  # SentencePiece's name of a byte.
        code = int(byte[1], 16)
        return chr(code) if code < 128 else "x"
    return name.replace("▁", " ")


def _is_letter(character: str) -> bool:
    """Whether it is part of a word: Chinese and Japanese do not separate theirs."""
    return character.isalnum() and not "\u3040" <= character <= "\u9fff"


def _require_bounds(contents: dict[str, Any]) -> None:
    """Raises DataError, to be completed by a path, for ids that would fill the memory."""
    vocabulary = contents["model"]["vocab"]
    ids = vocabulary.values() if isinstance(vocabulary, dict) else [len(vocabulary) - 1]
    if max(ids) >= MOST_TOKENS:
        raise DataError(
            f"gives a token the id {max(ids)}: a vocabulary has at most {MOST_TOKENS:,} entries"
        )


def _spaces(what: str, objective: str) -> str:
    return (
        f"{what} does not keep the spaces of a text, and data.objective {objective} learns to "
        "write texts: use data.tokenizer.kind bpe, chars or bytes"
    )
