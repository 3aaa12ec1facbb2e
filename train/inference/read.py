"""Hidden states and log-probabilities of texts, with the parameters of a run."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from heedful.data.batch import pad_and_stack
from heedful.data.objectives import Arrays, source_and_target
from heedful.model.config import ModelConfig
from heedful.model.transformer import build
from heedful.train.errors import TrainError, require
from heedful.train.inference.batching import require_length, shapes
from heedful.train.load import Trained
from heedful.train.model_loss import model_inputs
from heedful.train.sharding import replicated, whole_to_devices
from heedful.train.tasks import TASKS, Task, task_of

Text = str | tuple[str, ...]
"""A text, or a pair of texts: source and target, or the two texts of a classified pair."""


class Reader:
    """A reader of texts with the parameters of a run.

    Texts get begin and end as in training, and are sorted by length and batched; the results keep
    the order of the texts. Encoder-decoders read pairs (source, target).
    """

    def __init__(self, trained: Trained):
        self.trained, self.config = trained, trained.run.data
        jitted = partial(jax.jit, static_argnums=0, out_shardings=replicated(trained.mesh))
        self._hidden, self._scores = jitted(_hidden), jitted(_scores)

    def hidden_states(self, texts: Sequence[Text]) -> list[Float[np.ndarray, "T D"]]:
        """Return the last hidden states [tokens, width] of each text, float32.

        Those of an encoder-decoder are the encoder's, of the source. Raises TrainError for a text
        that is empty, or too long for the model.
        """
        is_encoder = self.trained.run.model.architecture == "encoder_decoder"
        side = "encoder_inputs" if is_encoder else "inputs"
        rows = [self._row(number, text, is_encoder) for number, text in enumerate(texts, 1)]
        return self._read(self._hidden, rows, side)

    def scores(self, texts: Sequence[Text]) -> list[Float[np.ndarray, " n"]]:
        """Return the log-probability of each token of each text, or of each class; see TrainedRun.

        Raises TrainError for a task without such scores, and for a text that is empty or too long.
        """
        run = self.trained.run
        objective = run.data.objective_spec
        if run.model.head.kind == "classifier":
            require(
                objective.label == "class",
                f"{run.data.objective} predicts a number, which has no log-probability: use "
                "classify",
            )
        else:
            require(
                _scores_texts(task_of(run.data)),
                f"{run.data.objective} gives no probability of a whole text: use a run of "
                f"{' or '.join(name for name, each in TASKS.items() if _scores_texts(each))}, or "
                "hidden_states",
            )
            require(
                self.trained.tokenizer.eos is not None,
                "the tokenizer has no end token, so that a text has no probability: use "
                "hidden_states",
            )
        rows = [self._row(number, text, False) for number, text in enumerate(texts, 1)]
        is_class = run.model.head.kind == "classifier"
        return self._read(self._scores, rows, None if is_class else "inputs")

    def _row(self, number: int, text: Text, source_only: bool) -> Arrays:
        """Return the arrays of one text, as the objective of the run makes them."""
        run, tokenizer = self.trained.run, self.trained.tokenizer
        objective, parts = run.data.objective_spec, [text] if isinstance(text, str) else list(text)
        if source_only:
            parts = parts[:1] * len(objective.fields)  # The target is not read.
        names = objective.fields + objective.optional_fields
        require(
            len(objective.fields) <= len(parts) <= len(names),
            f"text {number} has {len(parts)} parts: {run.data.objective} needs "
            f"{' and '.join(objective.fields)}",
        )
        require(all(part.strip() for part in parts), f"text {number} is empty: give some words")
        ids = tokenizer.encode_batch(parts)
        example = dict(zip(names, ids, strict=False))
        if objective.label:
            example["label"] = np.array(0, np.int32)
        if run.model.architecture == "encoder_decoder":
            row = source_and_target(ids[0], ids[-1], tokenizer)
        elif objective.is_text:
            row = framed(ids[0], self.trained)
        else:
            row = objective.row(example, None, run.data, tokenizer)
        length = max(len(row[side]) for side in ("inputs", "encoder_inputs") if side in row)
        require_length(f"text {number}", length, run.train.decode)
        positions = run.model.positions
        if positions.has_table and length > positions.max_length:
            raise TrainError(
                f"text {number} has {length} tokens, more than model.positions.max_length = "
                f"{positions.max_length}: shorten the text"
            )
        return row

    def _read(self, read: Callable, rows: list[Arrays], side: str | None) -> list[np.ndarray]:
        results: list[np.ndarray] = [np.empty(0)] * len(rows)
        for indices, batch in self._batches(rows):
            with jax.set_mesh(self.trained.mesh):
                batch = whole_to_devices(batch, self.trained.mesh)
                found = np.asarray(read(self.trained.run.model, self.trained.params, batch))
            for i, values in zip(indices, found, strict=False):
                results[i] = values if side is None else values[: len(rows[i][side])]
        return results

    def _batches(self, rows: list[Arrays]) -> Iterator[tuple[list[int], Arrays]]:
        """Yield (indices of texts, their arrays); both sides of a pair have the same length."""
        sides = ("inputs", "encoder_inputs")
        lengths = {i: max(len(row[s]) for s in sides if s in row) for i, row in enumerate(rows)}
        positions = self.trained.run.model.positions
        longest = positions.max_length if positions.has_table else None
        size = self.trained.run.train.decode.batch_tokens
        for indices, count, length in shapes(lengths, size, self.trained.mesh, longest):
            yield indices, pad_and_stack([rows[i] for i in indices], count, length, length)


def framed(ids: np.ndarray, trained: Trained) -> Arrays:
    """Return the row of a text of a language model: begin, text and end, none of them masked.

    A decoder predicts the end token and never reads it.
    """
    tokenizer = trained.tokenizer
    begin, end = ([] if i is None else [i] for i in (tokenizer.bos, tokenizer.eos))
    whole = np.concatenate([begin, ids, end]).astype(np.int32)
    if trained.run.model.architecture == "encoder_only":
        return {"inputs": whole}
    row = {"inputs": whole[: len(whole) - len(end)]}
    if end:
        row["targets"] = whole[1:]
    if trained.run.data.objective_spec.has_prefix:
        row["prefix_len"] = np.array(len(row["inputs"]), np.int32)
    return row


def _hidden(config: ModelConfig, params: dict, batch: dict) -> jax.Array:
    model, inputs = build(config), model_inputs(config, batch)
    if config.architecture != "encoder_decoder":
        hidden = model.apply({"params": params}, **inputs, return_logits=False)
    else:
        names = ("encoder_inputs", "encoder_segment_ids", "encoder_positions")
        given = (inputs[name] for name in names)
        hidden = model.apply({"params": params}, *given, method="encode")
    return hidden.astype(jnp.float32)  # type: ignore[union-attr]


def _scores(config: ModelConfig, params: dict, batch: dict) -> jax.Array:
    logits = build(config).apply({"params": params}, **model_inputs(config, batch))
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32))  # type: ignore[union-attr]
    if config.head.kind == "classifier":
        return log_probabilities
    targets = batch["targets"][..., None]
    return jnp.take_along_axis(log_probabilities, targets, -1)[..., 0]


def _scores_texts(task: Task) -> bool:
    """Tell if the task predicts each token of a text, so that the text has a probability."""
    return task.use in ("generate", "translate") and not task.objective.arrays
