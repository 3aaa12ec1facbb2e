"""TFDS datasets of a few invented texts, with the features and splits of the real datasets.

They are in a module of their own, as TFDS finds builders only in an importable module.
"""

import numpy as np
import tensorflow_datasets as tfds

PAIRS = {
    "train": [(f"the {n} small house", f"das {n} kleine Haus") for n in range(13)],
    "validation": [("a grün day", "ein grüner Tag"), ("no", "nein"), ("yes", "ja")],
    "test": [("last one", "das letzte")],
}
# The features of GLUE: config -> (texts, classes); None stands for the scores of stsb.
GLUE = {
    "cola": (("sentence",), ("unacceptable", "acceptable")),
    "sst2": (("sentence",), ("negative", "positive")),
    "mrpc": (("sentence1", "sentence2"), ("not_equivalent", "equivalent")),
    "qqp": (("question1", "question2"), ("not_duplicate", "duplicate")),
    "stsb": (("sentence1", "sentence2"), None),
    "mnli": (("premise", "hypothesis"), ("entailment", "neutral", "contradiction")),
    "qnli": (("question", "sentence"), ("entailment", "not_entailment")),
}
GLUE_SIZES = {"train": 199, "validation": 5, "test": 7}


def glue_example(config: str, split: str, n: int) -> dict:
    """Return example `n`; the labels of the test split are hidden, which is -1."""
    texts, classes = GLUE[config]
    label = n % len(classes) if classes else np.float32(n % 6 + 0.1)
    example = {name: f"{name} {n} of {split}" for name in texts}
    return example | {"label": -1 if split.startswith("test") else label, "idx": n}


class _Builder(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    FEATURES: dict = {}  # noqa: RUF012

    def _info(self):
        features = tfds.features.FeaturesDict(self.features_of(self.builder_config))
        return tfds.core.DatasetInfo(builder=self, features=features)

    def features_of(self, config):
        return self.FEATURES

    def _generate_examples(self, examples):
        yield from enumerate(examples)


class TinyPairs(_Builder):
    """Pairs in all splits, or in one split; a config is named by languages, as in WMT."""

    BUILDER_CONFIGS = [  # noqa: RUF012
        tfds.core.BuilderConfig(name="de-en", description="all splits"),
        tfds.core.BuilderConfig(name="train-only", description="one split"),
        tfds.core.BuilderConfig(name="test-only", description="another split"),
        tfds.core.BuilderConfig(name="broken", description="fails while it is prepared"),
    ]
    FEATURES = {  # noqa: RUF012
        "de": tfds.features.Text(),
        "en": tfds.features.Text(),
        "id": np.int64,
        "both": tfds.features.Sequence(tfds.features.Text()),
    }

    def _split_generators(self, dl_manager):
        name = self.builder_config.name
        if name == "broken":
            raise OSError("no network\nand more")
        splits = [name.removesuffix("-only")] if name.endswith("-only") else list(PAIRS)
        return {
            split: self._generate_examples(
                [
                    {"en": en, "de": de, "id": i, "both": [en, de]}
                    for i, (en, de) in enumerate(PAIRS[split])
                ]
            )
            for split in splits
        }


class TinyGlue(_Builder):
    BUILDER_CONFIGS = [  # noqa: RUF012
        tfds.core.BuilderConfig(name=name, description=name) for name in GLUE
    ]

    def features_of(self, config):
        texts, classes = GLUE[config.name]
        label = tfds.features.ClassLabel(names=classes) if classes else np.float32
        return {name: tfds.features.Text() for name in texts} | {"label": label, "idx": np.int32}

    def _split_generators(self, dl_manager):
        splits = dict(GLUE_SIZES)
        if self.builder_config.name == "mnli":
            splits = {"train": GLUE_SIZES["train"]} | {
                f"{split}_{kind}": GLUE_SIZES[split] + (kind == "mismatched")
                for split in ("validation", "test")
                for kind in ("mismatched", "matched")
            }
        return {
            name: self._generate_examples(
                [glue_example(self.builder_config.name, name, n) for n in range(size)]
            )
            for name, size in splits.items()
        }


class TinyReviews(_Builder):
    """Reviews as in imdb_reviews, whose unsupervised reviews have the label -1."""

    FEATURES = {  # noqa: RUF012
        "text": tfds.features.Text(),
        "label": tfds.features.ClassLabel(names=["neg", "pos"]),
    }

    def _split_generators(self, dl_manager):
        return {
            split: self._generate_examples(
                # Some reviews occur twice, with both labels.
                [
                    {"text": f"{split} {n // 2}", "label": -1 if split == "unsupervised" else n % 2}
                    for n in range(size)
                ]
            )
            for split, size in {"train": 398, "test": 11, "unsupervised": 3}.items()
        }


class TinyLines(_Builder):
    """Lines of text as in lm1b."""

    FEATURES = {"text": tfds.features.Text()}  # noqa: RUF012

    def _split_generators(self, dl_manager):
        return {
            split: self._generate_examples([{"text": f"{split} ü {n}"} for n in range(size)])
            for split, size in {"train": 1999, "test": 13}.items()
        }
