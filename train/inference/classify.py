"""Classify texts, or give each a number, with a trained run."""

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import jax
import numpy as np

from heedful.data import sources
from heedful.data.batch import pad_and_stack
from heedful.data.errors import DataError
from heedful.data.objectives import Arrays
from heedful.data.text_files import one_line
from heedful.model.transformer import build
from heedful.train.errors import TrainError
from heedful.train.inference.batching import shapes
from heedful.train.load import Trained
from heedful.train.model_loss import model_inputs
from heedful.train.sharding import replicated, whole_to_devices

Given = str | tuple[str, ...]
"""A text, or a pair of texts."""


def trained_on_pairs(trained: Trained) -> bool | None:
    """Tell if the run was trained on pairs of texts; None: unknown.

    That is unknown if the model was imported, or if the training data cannot be read.
    """
    if trained.steps == [0]:  # An imported model.
        return None
    try:
        return "pair" in sources.fields(trained.run.data)
    except DataError:
        return None


class Prediction(NamedTuple):
    """The most probable class of a text.

    Example:
        >>> import heedful as hf
        >>> hf.Prediction("good", 0.9).label
        'good'
    """

    label: str
    probability: float


class Classifier:
    """A classifier of texts with the parameters of a run.

    Texts are sorted by length and batched; the results keep the order of the texts. If `pairs` is
    True, a tab separates the two texts of a pair; if False, it is a part of the text. None: as in
    the training data, and as True if these are unknown.
    """

    def __init__(self, trained: Trained, pairs: bool | None = None):
        run, self._pairs = trained.run, pairs
        if run.model.head.kind != "classifier":
            raise TrainError(
                f"{run.directory} is a {run.data.objective} model, which does not classify: "
                "fine-tune it with data.objective classification or regression"
            )
        self.trained, self.config = trained, run.data
        model = build(run.model)
        self._outputs = jax.jit(
            lambda params, batch: model.apply({"params": params}, **batch),
            out_shardings=replicated(trained.mesh),
        )

    def __call__(self, texts: Sequence[str]) -> list[str]:
        """Return one line per text: class and probability, or the number of a regression."""
        return [
            f"{one_line(found.label)}\t{found.probability:.4f}"
            if isinstance(found, Prediction)
            else f"{found:.4f}"
            for found in self.predict(texts)
        ]

    def predict(self, texts: Sequence[Given]) -> list[Prediction] | list[float]:
        """Return the most probable class of each text, or the number of a regression."""
        outputs = self.outputs(texts)
        if self.config.objective_spec.label == "number":
            return [float(number) for number in outputs[:, 0]]
        chances = np.exp(outputs - outputs.max(-1, keepdims=True))
        chances /= chances.sum(-1, keepdims=True)
        best = chances.argmax(-1)
        return [
            Prediction(self.config.classes[c], float(row[c]))
            for c, row in zip(best, chances, strict=True)
        ]

    @cached_property
    def pairs(self) -> bool:
        return trained_on_pairs(self.trained) is not False if self._pairs is None else self._pairs

    def outputs(self, texts: Sequence[Given]) -> np.ndarray:
        """Return the outputs of the model, float32 [texts, outputs].

        Raises TrainError with the line for a text that is longer than data.max_length.
        """
        rows = [self._row(number, text) for number, text in enumerate(texts, 1)]
        outputs = np.zeros((len(texts), self.trained.run.model.head.outputs or 0), np.float32)
        lengths = {i: len(row["inputs"]) for i, row in enumerate(rows)}
        config, mesh = self.config, self.trained.mesh
        for indices, count, length in shapes(lengths, config.batch_tokens, mesh, config.max_length):
            batch = pad_and_stack([rows[i] for i in indices], count, length)
            with jax.set_mesh(mesh):
                batch = whole_to_devices(batch, mesh)
                result = np.asarray(self._outputs(self.trained.params, batch))
            outputs[indices] = result[: len(indices)]
        return outputs

    def _row(self, number: int, text: Given) -> Arrays:
        names = ("text", "pair")
        if isinstance(text, str):
            parts = text.split("\t") if "\t" in text and self.pairs else [text]
        else:
            parts = list(text)
        if len(parts) > 2:
            raise TrainError(f"line {number} has {len(parts)} texts between tabs: give one or two")
        ids = self.trained.tokenizer.encode_batch(parts)
        example = dict(zip(names, ids, strict=False)) | {"label": np.array(0, np.int32)}
        objective = self.config.objective_spec
        row = objective.row(example, None, self.config, self.trained.tokenizer)
        length = len(row["inputs"])
        if length > self.config.max_length:
            raise TrainError(
                f"line {number} has {length} tokens, more than data.max_length = "
                f"{self.config.max_length} of the training run: shorten the line"
            )
        return model_inputs(self.trained.run.model, row)
