"""Cut long texts into parts that are tokenised one by one, which needs less memory."""

import re
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import numpy as np

PART = 1 << 17
"""Approximate number of characters of a part."""
WORDS = r"(?<=\S)(?= \S)"
"""Borders before a space between words; the space belongs to the second word."""
BORDER = re.compile(WORDS + r"|(?<=\S\n)(?=\S)")
"""Borders between words or lines."""
PROBE = (
    "At the end of the day,\nall of it \N{EM DASH} as I've said in 2019 \N{EM DASH} is (not) so."
)
"""Text for a test if tokens cross borders."""


def cut_text(text: str, border: re.Pattern[str] | None = BORDER) -> Iterator[str]:
    """Yield a text in parts of about PART characters, cut where `border` matches; None: no cut."""
    start = 0
    while border and len(text) - start > PART and (cut := border.search(text, start + PART)):
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]


def find_border(
    encode_batch: Callable[[Sequence[str]], list[np.ndarray]], *, is_anywhere: bool
) -> re.Pattern[str] | None:
    """Return a pattern of borders where a cut does not change the tokens of a text.

    None: no known pattern has such borders. `is_anywhere`: each character or byte may be a token,
    so try to cut between any two characters.
    """
    borders = [re.compile("")] if is_anywhere else [BORDER, re.compile(WORDS)]
    for border in borders:
        cuts = [0, *(match.start() for match in border.finditer(PROBE)), len(PROBE)]
        parts = [PROBE[i:j] for i, j in pairwise(cuts) if i < j]
        whole, *pieces = encode_batch([PROBE, *parts])
        if np.array_equal(whole, np.concatenate(pieces)):
            return border
    return None
