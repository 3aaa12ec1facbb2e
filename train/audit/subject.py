"""The subject of an audit: a trained model or a small random model, and rows for the model."""

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax

from heedful.data.config import DataConfig
from heedful.data.pipeline import Dataset
from heedful.data.tokenizer import Tokenizer
from heedful.model.attention import specs
from heedful.model.config import ModelConfig
from heedful.train.audit import declared, examples
from heedful.train.audit.measured import random_params, shapes
from heedful.train.errors import require
from heedful.train.inspection.attention_weights import (
    Attention,
    attention_kinds,
    attentions,
)

LENGTH = 16
"""Length of the rows, unless given."""
LAYERS, WIDTH, HEAD_DIM, HEADS, GROUP = 2, 16, 8, 2, 2
"""Largest sizes of a small model."""


@dataclass(frozen=True)
class Subject:
    """A model, its parameters, and the rows on which the model is audited."""

    model: ModelConfig
    params: Any
    is_trained: bool
    dataset: Dataset
    note: str
    """Description of the model, and of its differences from the config."""

    @classmethod
    def of(
        cls,
        model: ModelConfig,
        data: DataConfig,
        length: int | None = None,
        trained: tuple[Any, Tokenizer] | None = None,
    ) -> "Subject":
        """Return the model with its trained parameters and tokenizer, or a small random model.

        `trained` is (parameters, tokenizer); parameters of another core are not used.
        """
        length, is_own = length or LENGTH, trained is not None and fits(model, trained[0])
        if trained is not None and is_own:
            params, tokenizer = trained
            note = "the model of the run with its parameters"
            if model.positions.has_table:
                length = min(length, model.positions.max_length)
            if window := untested_window(model, length):
                note += f"; give a --length above its window of {window}"
        else:
            tokenizer = examples.tokenizer_of_words(
                examples.TOKENS_PER_POSITION * length, data.objective
            )
            model, note = shrunk(model, length, tokenizer.vocab_size)
            params = random_params(model)
        dataset = examples.dataset(data, tokenizer, length, pairs=model.type_vocab_size > 1)
        return cls(model, params, is_own, dataset, note)

    @cached_property
    def batch(self) -> declared.Batch:
        return examples.batch(self.dataset)

    @cached_property
    def attentions(self) -> dict[Attention, str]:
        """Attentions whose masks differ, with their names."""
        return attentions(self.model)

    @cached_property
    def pairs(self) -> dict[Attention, declared.Pairs]:
        """The allowed pairs of each attention."""
        return {
            attention: declared.attentions(self.model, self.batch, attention.layer)[attention.kind]
            for attention in self.attentions
        }

    @cached_property
    def names(self) -> dict[str, str]:
        return attention_kinds(self.model)

    def where(self, output: str, stream: str) -> str:
        """Return the name of the part of the model that decides about this dependence."""
        if output == "logits" and self.model.head.kind == "classifier":
            return "classifier"
        if stream == "encoder_inputs":
            return self.names["encoder" if output == "encoder" else "cross"]
        return self.names["self"]


def untested_window(model: ModelConfig, length: int) -> int:
    """Return the widest window if rows of `length` are too short to test it; 0: they test it."""
    widest = max(layer.attention.window or 0 for layer in model.period)
    return widest if widest >= length - 1 else 0


def fits(model: ModelConfig, params: Any) -> bool:
    """Tell if the parameters have the shapes of the model; with another core they may differ."""
    expected = dict(jax.tree_util.tree_leaves_with_path(shapes(model)))
    given = dict(jax.tree_util.tree_leaves_with_path(params))
    return {k: x.shape for k, x in expected.items()} == {k: x.shape for k, x in given.items()}


def require_fits(model: ModelConfig, params: Any) -> None:
    """Raise TrainError unless the parameters have the shapes of the model."""
    require(
        fits(model, params),
        "params have other names or shapes than those of the model: give its own",
    )


def shrunk(model: ModelConfig, length: int, vocab_size: int) -> tuple[ModelConfig, str]:
    """Return a small model with the same masks, positions and cores, and a note of the changes.

    A window that covers whole rows of `length` through all layers becomes narrow.
    """
    attention = model.attention
    changes: dict[str, Any] = {"head_dim": HEAD_DIM}
    if not attention.dilation:
        groups = min(attention.heads // model.kv_heads, GROUP)
        kv_heads = min(model.kv_heads, HEADS)
        changes |= {"heads": kv_heads * groups, "kv_heads": kv_heads}

    def narrow(window: Any) -> Any:
        if not isinstance(window, int):
            return window
        reach = window * max(attention.dilation or (1,)) * LAYERS
        return min(window, 2) if reach >= length - 2 else window

    if attention.window is not None:
        changes["window"] = narrow(attention.window)
        changes["global_tokens"] = min(attention.global_tokens, 2)
    pattern = [dataclasses.replace(one, window=narrow(one.window)) for one in model.pattern]
    depth = max(LAYERS, len(pattern) + 1)  # A period, and a layer of the remainder.
    for spec in specs(model).values():
        changes |= spec.shrunk(attention, length)
    small = dataclasses.replace(
        model,
        vocab_size=vocab_size,
        positions=dataclasses.replace(
            model.positions, max_length=max(model.positions.max_length, length)
        ),
        width=WIDTH,
        layers=min(model.layers, depth),
        encoder_layers=model.encoder_layers and min(model.encoder_layers, depth),
        pattern=tuple(pattern),
        attention=dataclasses.replace(attention, **changes),
        feed_forward=dataclasses.replace(model.feed_forward, width=WIDTH),
        head=dataclasses.replace(
            model.head, outputs=2 if model.head.kind == "classifier" else model.head.outputs
        ),
        lora=dataclasses.replace(model.lora, rank=min(model.lora.rank, 2)),
        unroll=1,
    )
    note = (
        f"random parameters in a small model, {small.layers} layers of width {WIDTH}, "
        f"{small.attention.heads} heads"
    )
    if pattern:
        note += f", layers in the pattern {' '.join(map(str, pattern))}"
    if small.attention.window != attention.window:
        note += f", a window of {small.attention.window} in place of {attention.window}"
    return small, note


def with_core(model: ModelConfig, core: str) -> ModelConfig:
    """Return the model with this attention core at all sites."""
    attention = model.attention
    others = {k: type(x)() for k, x in attention.core_options.items() if k != core}
    changes = {"core": core, "decoder_core": None, "cross_core": None, **others}
    return dataclasses.replace(model, attention=dataclasses.replace(attention, **changes))
