"""Find the words that tokens belong to, from the spelling of the tokens."""

import json
import re
from collections.abc import Callable

import numpy as np
import tokenizers
from tokenizers import models

from heedful.data.vocabulary import BYTES


def word_borders(
    tokenizer: tokenizers.Tokenizer, is_special: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return two masks of the vocabulary, bool [V] each, for tokens inside of words.

    A token of the first mask may continue the word before it; a token of the second mask may be
    continued. Special tokens (`is_special`, bool [V]) are words by themselves.
    """

    def table(predicate: Callable[[str], bool]) -> np.ndarray:
        names = (tokenizer.id_to_token(i) for i in range(len(is_special)))
        return np.array([bool(name) and predicate(name) for name in names]) & ~is_special

    model = tokenizer.model
    if isinstance(model, models.WordLevel):
        return table(lambda _: True), table(lambda name: name.endswith("@@"))
    if isinstance(model, models.WordPiece):
        prefix = model.continuing_subword_prefix
        return table(lambda name: name.startswith(prefix)), table(lambda _: True)
    by_bytes = '"ByteLevel"' in json.dumps(json.loads(tokenizer.to_str())["decoder"])
    spelling = lambda name: _spelling(name, by_bytes)  # noqa: E731
    return (
        table(lambda name: _is_letter(spelling(name)[:1])),
        table(lambda name: spelling(name).endswith(" ") or _is_letter(spelling(name)[-1:])),
    )


def _spelling(name: str, by_bytes: bool) -> str:
    """Return the characters of a token, with "x" for a byte of a character beyond ASCII."""
    if by_bytes:
        codes = [BYTES.get(character, 32) for character in name]
        return "".join(chr(code) if code < 128 else "x" for code in codes)
    if byte := re.fullmatch(r"<0x([0-9A-F]{2})>", name):  # SentencePiece's name of a byte.
        code = int(byte[1], 16)
        return chr(code) if code < 128 else "x"
    return name.replace("▁", " ")


def _is_letter(character: str) -> bool:
    """Tell if a character can be part of a longer word: no Chinese or Japanese character can."""
    return character.isalnum() and not "\u3040" <= character <= "\u9fff"
