"""Learn a vocabulary from texts with the `tokenizers` library."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from heedful.data.config import TokenizerConfig
from heedful.data.errors import DataError
from heedful.data.objectives import objective_of
from heedful.data.special import names_in

SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]
UNKNOWN = SPECIAL[3]
MASK = "<mask>"
SENTINELS = [f"<extra_id_{i}>" for i in range(100)]  # As in T5.
MAX_ALPHABET = 1000
"""Largest number of different characters in a WordPiece vocabulary."""
MAX_WORD = 1000
"""Largest number of bytes of a word to learn from: the time is quadratic in this number."""


def learn(texts: Iterable[str], config: TokenizerConfig, objective: str | None = None) -> str:
    """Return a tokenizer.json learned from the texts; special tokens come first.

    The order of the texts does not matter. Raises DataError if the special tokens and the alphabet
    are more than vocab_size.
    """
    special = list(SPECIAL)
    if objective is not None and objective_of(objective).needs_mask:
        special.append(MASK)
    if objective is not None and objective_of(objective).needs_sentinels:
        special += SENTINELS
    tokenizer = KINDS[config.kind](texts, config, special)
    if tokenizer.get_vocab_size() > config.vocab_size:
        raise DataError(
            f"data.tokenizer.vocab_size is {config.vocab_size}, but the {len(special)} special "
            f"tokens and the alphabet of kind {config.kind} need {tokenizer.get_vocab_size():,} "
            "entries: increase it, or choose another data.tokenizer.kind"
        )
    tokenizer.add_special_tokens(special)
    contents = json.loads(tokenizer.to_str())
    contents["added_tokens"] = [t for t in contents["added_tokens"] if t["content"] in special]
    return json.dumps(contents, ensure_ascii=False, indent=1)


def read_wordpiece(text: str, config: Mapping[str, Any]) -> str:
    """Return the tokenizer.json for a vocab.txt, whose line i is the entry with id i.

    If several lines have the same entry, the last line counts, as in transformers. `config` has the
    values of tokenizer_config.json. Without do_lower_case in `config`, texts are converted to lower
    case if no entry has a capital letter, as otherwise every capitalised word would be unknown.
    Raises DataError with a message to which the caller adds the path.
    """
    entries = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
    vocabulary = {entry: i for i, entry in enumerate(entries)}
    names = names_in(config)
    unknowns = (names.get("unk_token"), "[UNK]", UNKNOWN)
    unknown = next((entry for entry in unknowns if entry in vocabulary), None)
    if unknown is None:
        raise DataError(
            "has no [UNK]: give the vocab.txt of a WordPiece tokenizer, or a tokenizer.json"
        )
    special = {e for e in vocabulary if e[:1] + e[-1:] in ("[]", "<>") and e[2:]}
    special |= set(names.values())
    cased = any(c != c.lower() for entry in vocabulary.keys() - special for c in entry)
    named = {"[PAD]", "[CLS]", "[SEP]", "[MASK]", unknown, *SPECIAL, MASK, *SENTINELS}
    named |= set(names.values())
    kept = set(config.get("never_split") or ()) - named
    if kept:
        raise DataError(
            f"has a tokenizer_config.json with never_split {sorted(kept)}, which is not supported: "
            "delete never_split to split these words like others, or give a tokenizer.json"
        )
    tokenizer = _bert(
        models.WordPiece(vocabulary, unk_token=unknown),
        lowercase=_flag(config, "do_lower_case", not cased),
        strip_accents=_flag(config, "strip_accents", None),
        handle_chinese_chars=_flag(config, "tokenize_chinese_chars", True),
    )
    tokenizer.add_special_tokens([e for e in vocabulary if e in special & named])
    return tokenizer.to_str()


def _flag(config: Mapping[str, Any], key: str, default: bool | None) -> bool | None:
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise DataError(f"has a tokenizer_config.json with {key} {value!r}: give true or false")
    return default if value is None else value


def framed(text: str, architecture: str, begin: str | None, end: str) -> str:
    """Return a tokenizer.json that itself adds begin and end to a text, as transformers needs it.

    An encoder-only model reads begin and end, the encoder of an encoder-decoder model only the end,
    and a decoder-only model only the begin.
    """
    tokenizer = tokenizers.Tokenizer.from_str(text)
    before = f"{begin} " if begin and architecture != "encoder_decoder" else ""
    after = f" {end}" if architecture != "decoder_only" else ""
    names = [name for name in (begin, end) if name in (before + after).split()]
    types = ":1" if architecture == "encoder_only" else ""
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{before}$A{after}",
        pair=f"{before}$A{after} $B{types}{after + types if after else ''}",
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in names],
    )
    if isinstance(tokenizer.model, models.WordLevel) and tokenizer.decoder is None:
        # A space before each token, but none before further pieces of a word.
        tokenizer.decoder = decoders.Sequence([
            decoders.WordPiece(prefix=" ", cleanup=False),
            decoders.Fuse(),
            decoders.Replace(tokenizers.Regex("@@( |$)"), ""),
        ])  # fmt: skip
    whole, made = json.loads(text), json.loads(tokenizer.to_str())
    whole |= {name: made[name] for name in ("post_processor", "decoder")}
    return json.dumps(whole, ensure_ascii=False, indent=1)


def _bpe(texts: Iterable[str], config: TokenizerConfig, special: list[str]):
    tokenizer = tokenizers.Tokenizer(models.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = _bounded(words)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.pre_tokenizer = words
    return tokenizer


def _bounded(words: Any) -> Any:
    """Return a pre-tokenizer for training: `words`, then cut words into pieces of MAX_WORD."""
    return pre_tokenizers.Sequence([words, pre_tokenizers.FixedLength(MAX_WORD)])


def _wordpiece(texts: Iterable[str], config: TokenizerConfig, special: list[str]):
    if iter(texts) is texts:  # An iterator can be read only once, but two passes are needed.
        texts = list(texts)
    tokenizer = _bert(models.WordPiece(unk_token=UNKNOWN), lowercase=config.lowercase)
    # The trainer numbers continuing characters in a random order and breaks ties by number. As
    # special tokens these characters have fixed numbers: the same texts give the same vocabulary.
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    alphabet: Counter[str] = Counter()
    for raw, count in counts.items():
        for character in tokenizer.normalizer.normalize_str(raw).replace(" ", ""):
            alphabet[character] += count
    kept = sorted(sorted(alphabet, key=lambda c: (-alphabet[c], c))[:MAX_ALPHABET])
    split = tokenizer.pre_tokenizer.pre_tokenize_str
    inside = ["##" + c for c in kept if len(split("a" + c)) == 1]
    trainer = trainers.WordPieceTrainer(
        vocab_size=config.vocab_size,
        special_tokens=special + kept + inside,
        limit_alphabet=0,
        show_progress=False,
    )
    words = tokenizer.pre_tokenizer
    tokenizer.pre_tokenizer = _bounded(words)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.pre_tokenizer = words
    return tokenizer


def _bert(model: models.WordPiece, **normalizer: Any):
    """Return a WordPiece tokenizer that splits words as BERT does (arXiv:1810.04805)."""
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(**normalizer)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def _chars(texts: Iterable[str], config: TokenizerConfig, special: list[str]):
    characters: set[str] = set()
    for text in texts:
        characters.update(text)
    tokenizer = tokenizers.Tokenizer(_alphabet_only(special + sorted(characters), UNKNOWN))
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def _bytes(texts: Iterable[str], config: TokenizerConfig, special: list[str]):
    names = sorted(BYTES, key=BYTES.__getitem__)
    tokenizer = tokenizers.Tokenizer(_alphabet_only(special + names))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _alphabet_only(entries: list[str], unknown: str | None = None) -> models.BPE:
    """Return a BPE model without merges: each character is a token."""
    vocabulary = {entry: i for i, entry in enumerate(entries)}
    return models.BPE(vocab=vocabulary, merges=[], unk_token=unknown)


def _words(texts: Iterable[str], config: TokenizerConfig, special: list[str]):
    counter = tokenizers.Tokenizer(models.WordLevel(unk_token=UNKNOWN))
    counter.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordLevelTrainer(vocab_size=config.vocab_size, show_progress=False)
    counter.train_from_iterator(texts, trainer)
    numbers = counter.get_vocab()
    # A word of the texts that is spelled like a special token would replace the special token.
    frequent = [word for word in sorted(numbers, key=numbers.__getitem__) if word not in special]
    entries = (special + frequent)[: max(config.vocab_size, len(special))]
    vocabulary = {entry: i for i, entry in enumerate(entries)}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


KINDS = {
    "bpe": _bpe,
    "wordpiece": _wordpiece,
    "chars": _chars,
    "bytes": _bytes,
    "words": _words,
}


def _byte_names() -> dict[str, int]:
    """Return the byte of each character in a byte-level vocabulary, as in GPT-2.

    A byte that is printable in Latin-1 is its own character; the other bytes are the characters
    from 256 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(rest)}


BYTES = _byte_names()
