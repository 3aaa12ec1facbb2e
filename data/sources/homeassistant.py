"""The source `homeassistant`: translations of user-interface texts, from PyPI (Apache-2.0)."""

import json
import re
from collections.abc import Iterator
from typing import Any

from heedful.data import packages
from heedful.data.config import DataConfig
from heedful.data.errors import DataError
from heedful.data.examples import Example, share
from heedful.data.sources.source import Source

_PLACEHOLDER = re.compile(r"\{.*?\}|\[%.*?%\]")
_MARKUP = re.compile(r"<[^>]+>|\[[^\]]*\]\(|`|\*\*|__|\n|^#|^[-*] ")
_URL = re.compile(r"://|\bwww\.")
# Chinese and Japanese do not separate words: each character counts as a word.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\s\u3040-\u30ff\u3400-\u9fff]+")


def load(config: DataConfig, split: str) -> list[Example]:
    """Return the sentence pairs of a split, each different pair once."""
    source, target = (_translations(language) for language in config.languages)
    owners: dict[tuple[str, str], str] = {}
    for component in sorted(source):
        for key, text in source[component].items():
            translation = target.get(component, {}).get(key)
            if translation is not None:
                # A pair belongs to its first component only, so that it is in one split.
                owners.setdefault((text, translation), component)
    return [
        {"source": text, "target": translation}
        for (text, translation), component in owners.items()
        if split_of(component) == split and _is_sentence_pair(text, translation)
    ]


def split_of(component: str) -> str:
    """Return the split of a component: 5 % valid, 5 % test.

    Whole components are held out, as the texts of a component are similar.
    """
    part = share(component)
    return "valid" if part < 0.05 else "test" if part < 0.1 else "train"


def _is_sentence_pair(source: str, target: str) -> bool:
    for unwanted in (_PLACEHOLDER, _MARKUP, _URL):
        if unwanted.search(source) or unwanted.search(target):
            return False
    short, long = sorted(len(_WORD.findall(text)) for text in (source, target))
    # The longer text decides: a German compound is one word where English has three.
    return source != target and 3 <= long <= 50 and long <= 2.2 * short


def _translations(language: str) -> dict[str, dict[str, str]]:
    """Return {component: {key: text}} of all components with texts in this language."""
    file = re.compile(rf"homeassistant/components/\w+/translations/{re.escape(language)}\.json")
    try:
        folder = packages.extract("homeassistant", language, file.fullmatch)
    except LookupError as error:
        members = " ".join(packages.members("homeassistant"))
        known = sorted(set(re.findall(r"/translations/([\w-]+)\.json", members)))
        raise DataError(
            f"data.languages has {language!r}, but homeassistant has {', '.join(known)}: choose "
            "two of these"
        ) from error
    return {
        path.parts[-3]: dict(_flatten(json.loads(path.read_text("utf-8"))))
        for path in sorted(folder.glob("homeassistant/components/*/translations/*.json"))
    }


def _flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value.strip()


SOURCE = Source(load=load, serves=lambda objective: objective.is_parallel)
