"""Text to token ids and back. Everything about a tokenizer is in its one tokenizer.json."""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Self

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from data.config import DataError, TokenizerConfig

PAD, BOS, EOS, UNK = range(4)
SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]


class Tokenizer:
    """A trained tokenizer: `pad`=0, `bos`=1, `eos`=2, `unk`=3, then the vocabulary.

    Two kinds. Byte-level BPE reads any Unicode text without loss and never yields `unk`. Words
    keeps the words of text that is tokenised already; those outside the vocabulary become `unk`.
    """

    def __init__(self, text: str):
        """Takes the contents of a tokenizer.json."""
        self._json = text
        self._tokenizer = tokenizers.Tokenizer.from_str(text)
        self.pretokenized = isinstance(self._tokenizer.model, models.WordLevel)
        self.vocab_size = self._tokenizer.get_vocab_size()
        canonical = json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"))
        self.fingerprint = hashlib.sha256(canonical.encode()).hexdigest()

    @classmethod
    def train(cls, texts: Iterable[str], config: TokenizerConfig) -> Self:
        """Learns a vocabulary from the texts; the same texts give the same tokenizer."""
        if config.kind == "bpe":
            tokenizer = tokenizers.Tokenizer(models.BPE())
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            tokenizer.decoder = decoders.ByteLevel()
            trainer = trainers.BpeTrainer(
                vocab_size=config.vocab_size,
                special_tokens=SPECIAL,
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                show_progress=False,
            )
        else:
            tokenizer = tokenizers.Tokenizer(models.WordLevel(unk_token=SPECIAL[UNK]))
            tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
            trainer = trainers.WordLevelTrainer(
                vocab_size=config.vocab_size, special_tokens=SPECIAL, show_progress=False
            )
        tokenizer.train_from_iterator(texts, trainer)
        # Without this list a special token is nothing but an id: the text "<eos>" is then read like
        # any other text instead of ending a sentence.
        contents = json.loads(tokenizer.to_str())
        contents["added_tokens"] = []
        return cls(json.dumps(contents, ensure_ascii=False, indent=1))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        try:
            return cls(Path(path).read_text("utf-8"))
        except OSError as error:
            raise DataError(f"cannot read the tokenizer {path}: {error.strerror}") from error
        except Exception as error:  # The library raises a bare Exception for a broken file.
            raise DataError(f"{path} is not a tokenizer: give a tokenizer.json of a run") from error

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self._json, "utf-8")

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the ids of each text, int32 [T], without begin or end."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        rows = (np.array(encoding.ids, np.int32) for encoding in encodings)
        # A word of a pre-tokenised text may be spelled like a special token. It is not one.
        return [np.where(row < UNK, np.int32(UNK), row) for row in rows]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Returns the text of the ids, with `pad`, `bos` and `eos` left out wherever they stand."""
        kept = [int(i) for i in ids if i >= UNK]
        return self.plain(self._tokenizer.decode(kept, skip_special_tokens=False))

    def plain(self, text: str) -> str:
        """Returns a text of the data as people read it: pieces with `@@` become words again."""
        return re.sub(r"@@( |$)", "", text) if self.pretokenized else text
