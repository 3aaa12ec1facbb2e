"""From texts to classes, or to numbers."""

from collections.abc import Sequence

import jax
import numpy as np

from data.batch import pad_and_stack
from data.objectives import OBJECTIVES, Arrays
from model.transformer import build
from train.config import TrainError
from train.load import Trained
from train.rows import shapes
from train.sharding import whole, whole_to_devices
from train.step import model_inputs


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
        self._outputs = jax.jit(
            lambda params, batch: model.apply({"params": params}, **batch),
            out_shardings=whole(trained.mesh),
        )

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
        lengths = {i: len(row["inputs"]) for i, row in enumerate(rows)}
        config, mesh = self.config, self.trained.mesh
        for indices, count, length in shapes(lengths, config.batch_tokens, mesh, config.max_length):
            batch = pad_and_stack([rows[i] for i in indices], count, length)
            with jax.set_mesh(mesh):
                batch = whole_to_devices(batch, mesh)
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
        objective = OBJECTIVES[self.config.objective]
        row = objective.row(example, None, self.config, self.trained.tokenizer)
        length = len(row["inputs"])
        if length > self.config.max_length:
            raise TrainError(
                f"line {number} has {length} tokens, more than data.max_length = "
                f"{self.config.max_length} of the training: shorten it"
            )
        return model_inputs(self.trained.run.model, row)
