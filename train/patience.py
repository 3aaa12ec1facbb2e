"""Patience: the end of a training that has become no better for too long."""

import math
from collections.abc import Mapping

from heedful.train.config import TrainConfig
from heedful.train.metrics import score
from heedful.train.observers import Observer


class Patience(Observer):
    """Knows the step of the best checkpoint, and when it has become too old."""

    def __init__(self, config: TrainConfig, scores: Mapping[int, float]):
        """Begin with the scores of the checkpoints that are there, by step."""
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
        """Tell if no checkpoint up to this step was better for `train.patience` of them."""
        return self._limit is not None and step - self.best_step >= self._limit
