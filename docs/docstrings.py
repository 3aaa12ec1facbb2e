"""Show docstrings as their authors mean them: a griffe extension, which mkdocstrings calls."""

import re
from typing import Any

import griffe


class Docstrings(griffe.Extension):
    """Turns examples into code, and lines such as `mask: an AttentionMask` into a list."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is None:
            return
        text = re.sub(r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)
        known = {p.name for p in obj.parameters} if isinstance(obj, griffe.Function) else set()

        def item(found: re.Match) -> str:
            names = found[1].split(", ")
            return f"\n- `{found[1]}`: " if known.issuperset(names) else found[0]

        text = re.sub(r"^(\w+(?:, \w+)*): ", item, text, flags=re.MULTILINE)
        obj.docstring.value = re.sub(r"(?<!\n)\n(Raises |Return )", r"\n\n\1", text)
