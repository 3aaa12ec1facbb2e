"""Text from tokens that arrive one after the other."""

from collections.abc import Sequence

import numpy as np

from heedful.data.tokenizer import Tokenizer


class Text:
    """The certain part of a text whose tokens arrive one after the other.

    The tokens of an incomplete character wait for the rest of the character. Text that may be the
    beginning of a stop string waits until this is decided. The text ends before a stop string.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: np.ndarray, stop: Sequence[str]):
        self.tokenizer, self.stop = tokenizer, stop
        self.ended = False
        self._count = 0
        # The text of a token may depend on earlier tokens: the first token of a text has no space.
        self._before, self._new = prompt.tolist(), []
        self._waiting = ""

    def read(self, tokens: np.ndarray) -> str:
        """Return the text that is new and certain since the last call.

        `tokens` are all tokens so far.
        """
        certain = ""
        for token in tokens[self._count :].tolist():
            if self.ended:
                break
            certain += self._add(token)
        self._count = len(tokens)
        return certain

    def rest(self) -> str:
        """Return the text that waited because it could have been part of a stop string."""
        waiting, self._waiting = self._waiting, ""
        return waiting

    def _add(self, token: int) -> str:
        if token in self.tokenizer.ends:
            self.ended = True
            return self.rest()
        self._new.append(token)
        known = self.tokenizer.decode(self._before)
        text = self.tokenizer.decode(self._before + self._new)
        if len(text) <= len(known) or text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self._before, self._new = self._new, []
        self._waiting += text[len(known) :]
        found = [i for i in map(self._waiting.find, self.stop) if i >= 0]
        if found:
            self.ended = True
            certain, self._waiting = self._waiting[: min(found)], ""
            return certain
        held = max((_overlap(self._waiting, stop) for stop in self.stop), default=0)
        border = len(self._waiting) - held
        certain, self._waiting = self._waiting[:border], self._waiting[border:]
        return certain


def _overlap(text: str, stop: str) -> int:
    """Return the number of characters at the end of `text` that are the beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
