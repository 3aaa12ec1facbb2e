"""Labels for tokens, in characters that the installed fonts can draw."""

import contextlib
import functools
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from heedful.data.tokenizer import Tokenizer
from heedful.data.vocabulary import BYTES

VISIBLE = {" ": "␣", "\n": "↵", "\t": "⇥"}
DEFAULT_FONT = "DejaVu Sans"  # A part of matplotlib.


def pieces(tokenizer: Tokenizer, ids: Sequence[int] | np.ndarray) -> list[str]:
    """Return a label for each token: its text with visible spaces, or a special token's name.

    Incomplete UTF-8 is written in hexadecimal. Pieces of words keep the mark of the tokenizer, ##
    or @@. The label of an id beyond the vocabulary is #ID: a model may have more outputs.
    """
    inner = tokenizer._tokenizer
    decoder = json.dumps(json.loads(inner.to_str())["decoder"])

    def piece(i: int) -> str:
        name = inner.id_to_token(i)
        if name is None:
            return f"#{i}"
        if tokenizer.is_special[i]:
            return name
        if '"ByteLevel"' in decoder:
            raw = [bytes([BYTES[c]]) if c in BYTES else c.encode() for c in name]
            name = b"".join(raw).decode("utf-8", "backslashreplace")
        elif byte := re.fullmatch("<0x([0-9A-F]{2})>", name):  # SentencePiece's name of a byte.
            name = bytes.fromhex(byte[1]).decode("utf-8", "backslashreplace")
        elif "▁" in decoder:  # SentencePiece's space.
            name = name.replace("▁", " ")
        return "".join(VISIBLE.get(c, c) if c == " " or c.isprintable() else _code(c) for c in name)

    return [piece(int(i)) for i in ids]


def drawable(labels: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """Return the labels, the font families to draw the labels with, and notes.

    Fonts are searched in matplotlib's list, and then in the folders of the system. Characters that
    no installed font has are written as code points; a note names them.
    """
    families, missing = [], {c for label in labels for c in label if not c.isspace()}
    for font in _fonts():
        if families and not missing:
            break
        known = _characters(font.fname)
        covered = {c for c in missing if ord(c) in known}
        if covered or not families:
            families.append(font.name)
            missing -= covered
    if not missing:
        return list(labels), families, []
    written = ["".join(_code(c) if c in missing else c for c in label) for label in labels]
    listed = " ".join(sorted(missing)[:12]) + (" ..." if len(missing) > 12 else "")
    note = f"no installed font has {listed}: written as code points; install a font for this script"
    return written, families, [note]


def _fonts() -> Iterator[Any]:
    """Yield the upright fonts, the default first, and regular weights before others.

    matplotlib keeps a list of fonts; fonts that were installed later are added to it at the end.
    """
    from matplotlib import font_manager

    manager = font_manager.fontManager
    by_use = lambda font: (  # noqa: E731
        font.name != DEFAULT_FONT, abs(_weight(font) - 400), font.name, font.fname
    )  # fmt: skip
    listed = list(manager.ttflist)
    yield from sorted((font for font in listed if _is_usable(font)), key=by_use)
    for path in sorted({*font_manager.findSystemFonts()} - {font.fname for font in listed}):
        with contextlib.suppress(Exception):  # A file that is damaged, or of another format.
            manager.addfont(path)
    new = [font for font in manager.ttflist[len(listed) :] if _is_usable(font)]
    yield from sorted(new, key=by_use)


def _is_usable(font: Any) -> bool:
    # Fonts of last resort draw a box for every character.
    return font.style == "normal" and "Last Resort" not in font.name


def _weight(font: Any) -> int:
    return font.weight if isinstance(font.weight, int) else 400


@functools.cache
def _characters(path: str) -> frozenset[int]:
    """Return the code points that a font file can draw; a font of bitmaps cannot be scaled."""
    from matplotlib import font_manager

    try:
        font = font_manager.get_font(path)
        return frozenset(font.get_charmap() if font.scalable else ())
    except Exception:  # The file is damaged, or gone.
        return frozenset()


def _code(character: str) -> str:
    """Return a visible sign for a character, or its code point as [4E2D]."""
    return VISIBLE.get(character) or f"[{ord(character):04X}]"
