"""An experiment: the settings of a model, its data and its training."""

from dataclasses import dataclass, field

from heedful.data.config import DataConfig
from heedful.model.config import ModelConfig
from heedful.readable import Readable
from heedful.train.config import TrainConfig


@dataclass(frozen=True, kw_only=True, repr=False)
class Experiment(Readable):
    """Settings of one experiment.

    Example:
        >>> import heedful as hf
        >>> hf.Experiment(model=hf.ModelConfig(layers=2), train=hf.TrainConfig(steps=100))
        Experiment(model=ModelConfig(layers=2), train=TrainConfig(steps=100))
    """

    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
