"""A TFDS dataset of a few made-up sentences. TFDS finds a builder only in an importable module."""

import numpy as np
import tensorflow_datasets as tfds

PAIRS = {
    "train": [(f"the {n} small house", f"das {n} kleine Haus") for n in range(13)],
    "validation": [("a grün day", "ein grüner Tag"), ("no", "nein"), ("yes", "ja")],
    "test": [("last one", "das letzte")],
}


class TinyPairs(tfds.core.GeneratorBasedBuilder):
    """`train` alone, or all splits: the config is called like the languages of WMT."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [  # noqa: RUF012
        tfds.core.BuilderConfig(name="de-en", description="all splits"),
        tfds.core.BuilderConfig(name="train-only", description="one split"),
        tfds.core.BuilderConfig(name="broken", description="fails while it is prepared"),
    ]

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {"de": tfds.features.Text(), "en": tfds.features.Text(), "id": np.int64}
            ),
        )

    def _split_generators(self, dl_manager):
        names = ["train"] if self.builder_config.name == "train-only" else list(PAIRS)
        return {name: self._generate_examples(name) for name in names}

    def _generate_examples(self, split):
        if self.builder_config.name == "broken":
            raise OSError("no network\nand more")
        for i, (en, de) in enumerate(PAIRS[split]):
            yield i, {"en": en, "de": de, "id": i}
