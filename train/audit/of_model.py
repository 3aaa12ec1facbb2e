"""Audit a model and its parameters, without a run and without a tokenizer."""

import warnings
from typing import Any

import flax.linen as nn
import jax

from heedful.data.config import DataConfig
from heedful.data.objectives import Objective
from heedful.model.attention import spec_of
from heedful.model.config import ModelConfig
from heedful.model.transformer import ARCHITECTURES
from heedful.train.audit import audit as methods
from heedful.train.audit.examples import TOKENS_PER_POSITION, tokenizer_of_words
from heedful.train.audit.findings import Finding
from heedful.train.audit.subject import Subject, require_fits, untested_window
from heedful.train.config import TrainConfig
from heedful.train.errors import TrainError, require
from heedful.train.start import require_fit
from heedful.train.tasks import TASKS, task_named

LENGTH, MIN_LENGTH = 16, 8
"""Lengths of the rows: the usual one, and the smallest."""


def audit(
    model: nn.Module | ModelConfig, params: Any, *, task: str | None = None, length: int = LENGTH
) -> list[Finding]:
    """Return what the model sees and must not see, or may see and does not: [] if all is right.

    The masks, the dependences through all layers by bits and by gradients, dropout, packed rows,
    forbidden keys with extreme scores, and decoding with a cache are compared with the config, on
    three artificial rows of `length` tokens (at most the learned positions of the model). A method
    that the attention core does not support, and a window that is wider than the rows, are left
    out, with a warning.

    model: a model of `build`, or its config. params: its parameters, a plain tree.
    task: task whose rows are used (causal_lm, masked_lm, ...); None: the usual task of the model.
    Packed rows are used where the task and the model allow them.

    Raises TrainError for a model that `build` did not make, for parameters of another model, and
    for a vocabulary that is too small for rows of distinct tokens.

    Example:
        >>> import jax, heedful as hf
        >>> config = hf.ModelConfig(architecture="decoder_only", vocab_size=64, width=16, layers=1,
        ...     attention=hf.AttentionConfig(heads=2))
        >>> model = hf.build(config)
        >>> hf.audit(model, hf.init(model, jax.random.key(0)))
        []
    """
    config: ModelConfig = getattr(model, "config", model)  # type: ignore[assignment]
    is_ours = isinstance(model, ModelConfig) or type(model) in ARCHITECTURES.values()
    require(
        is_ours and isinstance(config, ModelConfig),
        f"model is {type(model).__name__}: only models of heedful.build can be audited, as the "
        "audit builds the model of the config",
    )
    require_fits(config, params)
    task = task or _usual_task(config)
    objective = task_named(task).objective
    data = DataConfig(source="texts", objective=task, packing=_can_pack(config, objective))
    require_fit(config, data, TrainConfig(label_smoothing=0.0))
    require(length >= MIN_LENGTH, f"length = {length}: give at least {MIN_LENGTH}")
    tokenizer = tokenizer_of_words(TOKENS_PER_POSITION * length, task)
    require(
        (config.vocab_size or 0) >= tokenizer.vocab_size,
        f"model.vocab_size = {config.vocab_size}: rows of length {length} need "
        f"{tokenizer.vocab_size} tokens; give a smaller length (at least {MIN_LENGTH})",
    )
    if window := untested_window(config, length):
        warnings.warn(
            f"not audited: the window of {window}, as the rows are too short; give a length of at "
            f"least {window + 2}",
            stacklevel=2,
        )
    params = jax.device_get(params)
    result = methods.audit(Subject.of(config, data, length, (params, tokenizer)))
    for line in result.unsupported:
        warnings.warn(f"not audited: {line}", stacklevel=2)
    return result.findings


def _usual_task(config: ModelConfig) -> str:
    """Return the first task that the model can learn."""
    is_number = config.head.kind == "classifier" and config.head.outputs == 1
    fitting = (
        name
        for name, task in TASKS.items()
        if task.fits(config) and (task.objective.label == "number") == is_number
    )
    if (found := next(fitting, None)) is None:
        raise TrainError(
            f"no task fits model.architecture {config.architecture} with model.head.kind "
            f"{config.head.kind}: name one in task"
        )
    return found


def _can_pack(config: ModelConfig, objective: Objective) -> bool:
    if not objective.is_packable:
        return DataConfig.packing
    sites = config.sites
    cores = (spec_of(config.attention.core_of(site)).one_document_at for site in sites)
    separates = all(site not in at for site, at in zip(sites, cores, strict=True))
    return separates and not config.attention.global_tokens
