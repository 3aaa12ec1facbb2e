"""Patience: stop a training run that has not improved for some checkpoints."""

import math
from collections.abc import Mapping

from heedful.train.config import TrainConfig
from heedful.train.metrics import score
from heedful.train.observers import Observer


class Patience(Observer):
    """Observer that finds the best checkpoint, and tells when it is too old."""

    def __init__(self, config: TrainConfig, scores: Mapping[int, float]):
        """Start with the scores of existing checkpoints, by step."""
        self._metric = config.metric
        self._limit = config.patience and config.patience * config.checkpoint_every
        self.best_step, self._best = 0, -math.inf
        for step in sorted(scores):
            self.add(step, scores[step])

    def on_evaluation(self, step: int, measured: dict[str, float]) -> None:
        self.add(step, score(measured, self._metric))

    def add(self, step: int, score: float) -> None:
        """Take the score of a checkpoint: the higher the better."""
        if score > self._best:
            self.best_step, self._best = step, score

    def is_over(self, step: int) -> bool:
        """Return True if `train.patience` checkpoints up to this step brought no improvement."""
        return self._limit is not None and step - self.best_step >= self._limit
