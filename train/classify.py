"""From texts to classes, or to numbers."""

from collections.abc import Iterator, Sequence

import jax
import numpy as np

from data.batch import pad_and_stack
from data.objectives import OBJECTIVES, Arrays
from model.transformer import build
from train.config import TrainError
from train.load import Trained
from train.sharding import to_devices
from train.step import model_inputs

SHORTEST = 16  # row lengths are 16, 32, 64, ...: one compilation each


class Classifier:
    """Classifies texts with a run: sorted by length and batched, order kept."""

    def __init__(self, trained: Trained):
        run = trained.run
        if run.model.head.kind != "classifier":
            raise TrainError(
                f"{run.directory} is a {run.data.objective} model, which does not classify: "
                "fine-tune it with data.objective classification or regression"
            )
        self.trained, self.config = trained, run.data
        model = build(run.model)
        self._outputs = jax.jit(lambda params, batch: model.apply({"params": params}, **batch))

    def __call__(self, texts: Sequence[str]) -> list[str]:
        """One line per text: class and probability, or the number of a regression.

        A pair is two texts with a tab between them.
        """
        outputs = self.outputs(texts)
        if self.config.objective == "regression":
            return [f"{number:.4f}" for number in outputs[:, 0]]
        chances = np.exp(outputs - outputs.max(-1, keepdims=True))
        chances /= chances.sum(-1, keepdims=True)
        best = chances.argmax(-1)
        return [
            f"{self.config.classes[c]}\t{row[c]:.4f}" for c, row in zip(best, chances, strict=True)
        ]

    def outputs(self, texts: Sequence[str]) -> np.ndarray:
        """The model's outputs, float32 [E, C].

        Raises TrainError, naming the line, for a text that is longer than the model was trained on.
        """
        rows = [self._row(number, text) for number, text in enumerate(texts, 1)]
        outputs = np.zeros((len(texts), self.trained.run.model.head.outputs or 0), np.float32)
        for indices, length, n_rows in self._batches(rows):
            batch = pad_and_stack([rows[i] for i in indices], n_rows, length)
            with jax.set_mesh(self.trained.mesh):
                batch = to_devices(batch, self.trained.mesh)
                result = np.asarray(self._outputs(self.trained.params, batch))
            outputs[indices] = result[: len(indices)]
        return outputs

    def _row(self, number: int, text: str) -> Arrays:
        names = ("text", "pair")
        parts = text.split("\t")
        if len(parts) > 2:
            raise TrainError(f"line {number} has {len(parts)} texts between tabs: give one or two")
        ids = self.trained.tokenizer.encode_batch(parts)
        example = dict(zip(names, ids, strict=False)) | {"label": np.array(0, np.int32)}
        rng = np.random.default_rng(0)
        objective = OBJECTIVES[self.config.objective]
        row = objective.row(example, rng, self.config, self.trained.tokenizer)
        length = len(row["inputs"])
        if length > self.config.max_length:
            raise TrainError(
                f"line {number} has {length} tokens, more than data.max_length = "
                f"{self.config.max_length} of the training: shorten it"
            )
        return model_inputs(self.trained.run.model, row)

    def _batches(self, rows: Sequence[Arrays]) -> Iterator[tuple[list[int], int, int]]:
        """Yields (indices of rows, length, number of rows), few distinct shapes."""
        mesh = self.trained.mesh.shape
        devices = mesh["data"] * mesh["fsdp"]
        lengths = [len(row["inputs"]) for row in rows]
        buckets: dict[int, list[int]] = {}
        for i in np.argsort(lengths, kind="stable"):
            bucket = max(SHORTEST, 1 << (lengths[i] - 1).bit_length())
            bucket = min(bucket, self.config.max_length)
            buckets.setdefault(bucket, []).append(int(i))
        for length, indices in buckets.items():
            n_rows = max(self.config.batch_tokens // length, 1)
            n_rows = min(n_rows, 1 << (len(indices) - 1).bit_length())
            n_rows = -(-n_rows // devices) * devices
            for start in range(0, len(indices), n_rows):
                yield indices[start : start + n_rows], length, n_rows
