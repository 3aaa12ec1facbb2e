"""A trained run in Python: generate, translate, classify, evaluate, and look inside."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from jaxtyping import Float
from numpy import ndarray
from rich.console import Console

from heedful.data.pipeline import Dataset
from heedful.data.tokenizer import Tokenizer
from heedful.model.config import ModelConfig
from heedful.train import load as loading
from heedful.train.config import DecodeConfig
from heedful.train.errors import TrainError
from heedful.train.evaluation.evaluate import report
from heedful.train.experiment import Experiment
from heedful.train.inference.classify import Classifier, Prediction
from heedful.train.inference.generate import Generator
from heedful.train.inference.read import Reader
from heedful.train.inference.translate import Translator
from heedful.train.inspection.attention_picture import AttentionWeights, attention_of
from heedful.train.load import Trained
from heedful.train.messages import quiet
from heedful.train.metrics import last_values
from heedful.train.state import parameter_count


def load(
    directory: str | Path,
    *,
    checkpoint: str | int | None = None,
    fallback: bool = False,
    console: Console | None = None,
) -> "TrainedRun":
    """Load a trained run from its directory.

    checkpoint: average (of the newest train.average_last checkpoints), last, best, or a step; None:
    average if train.average_last of the run is above 1, else best.
    fallback: skip corrupt checkpoints, instead of raising CorruptCheckpoint.
    console: for messages; None: no messages.
    Raises TrainError for a directory that is no run or has no such checkpoint.

    Example:
        >>> import heedful as hf
        >>> try:
        ...     hf.load("runs/nowhere")
        ... except hf.TrainError as error:
        ...     print(error)
        runs/nowhere is no run directory: it does not exist; give the directory of a run
    """
    which = None if checkpoint is None else str(checkpoint)
    found = loading.load(Path(directory), console or quiet(), checkpoint=which, fallback=fallback)
    return TrainedRun(found)


class TrainedRun:
    """A trained run: its parameters, its tokenizer, and what it can do. `fit` and `load` return it.

    Texts go in and come out as lists, in the same order. Programs are compiled once for each new
    length and setting. Errors of the user are HeedfulErrors.

    Example:
        >>> import tempfile, heedful as hf
        >>> texts = ["red cat sleeps", "blue bird sings"] * 32
        >>> tokenizer = hf.Tokenizer.train(texts, hf.TokenizerConfig(kind="words"))
        >>> data = hf.Dataset.from_texts(texts, tokenizer, max_length=8, batch_tokens=64)
        >>> experiment = hf.Experiment(
        ...     model=hf.ModelConfig(architecture="decoder_only", width=16, layers=1,
        ...         attention=hf.AttentionConfig(heads=2)),
        ...     train=hf.TrainConfig(steps=2, decode=hf.DecodeConfig(beam=1, max_tokens=3)))
        >>> run = hf.fit(experiment, tempfile.mkdtemp(), train=data, valid=data, audit=False)
        >>> len(run.generate(["red cat"]))
        1
        >>> run.hidden_states(["red cat"])[0].shape        # begin, red, cat
        (3, 16)
        >>> sorted(run.evaluate())
        ['checkpoints', 'valid_frequency_loss', 'valid_loss']
    """

    def __init__(self, trained: Trained, data: Mapping[str, Dataset] | None = None):
        self.trained = trained
        self._data = dict(data or {})
        self._writers: dict[Any, Any] = {}

    # What it is ---------------------------------------------------------------------------------

    @property
    def directory(self) -> Path:
        return self.trained.run.directory

    @property
    def config(self) -> ModelConfig:
        """The model, with all sizes."""
        return self.trained.run.model

    @property
    def experiment(self) -> Experiment:
        """The settings of the run: model, data and training."""
        run = self.trained.run
        return Experiment(model=run.model, data=run.data, train=run.train)

    @property
    def params(self) -> Any:
        """The parameters, a plain tree of arrays on the devices of the run's mesh.

        They come from the checkpoints of `steps`: by default their mean.
        """
        return self.trained.params

    @property
    def tokenizer(self) -> Tokenizer:
        return self.trained.tokenizer

    @property
    def steps(self) -> list[int]:
        """Steps of the checkpoints from which the parameters come."""
        return self.trained.steps

    def facts(self) -> dict[str, str]:
        """Return what the run is, in short texts by name."""
        run = self.trained.run
        facts = {
            "directory": str(run.directory),
            "task": f"{run.data.objective} on {run.data.source}",
            "model": f"{run.model.architecture}, {parameter_count(self.params):,} parameters",
            "checkpoint": "step " + ", ".join(f"{step:,}" for step in self.steps),
        }
        return facts | {name: f"{value:.4g}" for name, value in last_values(run.metrics).items()}

    def __repr__(self) -> str:
        lines = [f"    {name}: {value}\n" for name, value in self.facts().items()]
        return f"TrainedRun(\n{''.join(lines)})"

    def _repr_html_(self) -> str:
        row = "<tr><th style='text-align:left'>{}</th><td style='text-align:left'>{}</td></tr>"
        cells = ((html.escape(name), html.escape(value)) for name, value in self.facts().items())
        return f"<table>{''.join(row.format(*pair) for pair in cells)}</table>"

    # What it does -------------------------------------------------------------------------------

    def generate(self, prompts: Sequence[str], *, seed: int = 0, **decode: Any) -> list[str]:
        """Return each prompt with its continuation, as `heedful generate` prints them.

        decode: fields of `DecodeConfig` that differ from the run's, such as max_tokens=50. The
        default is a beam search; to sample, give beam=1 and temperature=0.8. An empty prompt
        begins a new text. Raises TrainError for a model that does not generate, and for prompts
        that are too long.
        """
        has_prefix = self.trained.run.data.objective_spec.has_prefix
        continue_ = self._writer(Generator, seed, decode, prefix=has_prefix)
        rests = continue_(_listed(prompts))
        return [prompt + rest for prompt, rest in zip(prompts, rests, strict=True)]

    def translate(self, texts: Sequence[str], *, seed: int = 0, **decode: Any) -> list[str]:
        """Return the translation of each text, in one line; for `decode` see `generate`."""
        return self._writer(Translator, seed, decode)(_listed(texts))

    def classify(self, texts: Sequence[str | tuple[str, str]]) -> list[Prediction] | list[float]:
        """Return (label, probability) of each text or pair of texts; floats for a regression."""
        return self._classifier.predict(_listed(texts))

    def evaluate(
        self,
        *,
        valid: Dataset | None = None,
        test: Dataset | None = None,
        console: Console | None = None,
        **settings: Any,
    ) -> dict[str, Any]:
        """Return losses and scores on validation and test data, and write them to result.json.

        Keys: valid_loss and test_loss in nats per token (or per example), valid_frequency_loss and
        test_frequency_loss of a guess by frequency, the scores of the task with the same prefixes
        (such as valid_accuracy), test_bleu of a translation, and checkpoints, the steps.

        valid, test: the data if the run was trained on texts of a program, as `fit` got them. The
        scores of a split that is not given are left out then.
        console: for messages and samples; None: no messages.
        settings: seed, stride and other_data of `heedful evaluate`, and fields of `DecodeConfig`.
        """
        own = {name: settings.pop(name) for name in REPORT_SETTINGS if name in settings}
        given = {"valid": valid, "test": test}
        own_data = {k: replace(x, split=k) for k, x in given.items() if x is not None}
        data = self._data | own_data
        decode = self._decode(settings)
        return report(self.trained, decode, console or quiet(), data=data or None, **own)

    def hidden_states(self, texts: Sequence[str | tuple[str, ...]]) -> list[Float[ndarray, "T D"]]:
        """Return the last hidden states of each text, float32 [tokens, width].

        Tokens include begin and end as in training (a decoder never reads the end). The states of
        an encoder-decoder are the encoder's.
        """
        return self._reader.hidden_states(_listed(texts))

    def scores(self, texts: Sequence[str | tuple[str, ...]]) -> list[Float[ndarray, " n"]]:
        """Return natural log-probabilities of all tokens, the end included, float32 [tokens].

        The sum is the log-probability of the text. For translation give pairs (source, target): the
        tokens are the target's. For classification, the log-probability of each class [classes].
        Raises TrainError for other tasks.
        """
        return self._reader.scores(_listed(texts))

    def attention(
        self,
        text: str,
        *,
        target: str | None = None,
        which: str | None = None,
        layer: int | None = None,
        mean: bool = False,
    ) -> AttentionWeights:
        """Return the attention weights of a text, which a notebook shows as a picture.

        target: second text; None: the model's own output in an encoder-decoder.
        which: self, cross or encoder; None: the last of these that the model has.
        layer: counted from 1; None: the last.
        mean: take the mean over the heads.
        """
        return attention_of(self.trained, text, target=target, which=which, layer=layer, mean=mean)

    # Programs -----------------------------------------------------------------------------------

    @cached_property
    def _classifier(self) -> Classifier:
        return Classifier(self.trained, pairs=False)

    @cached_property
    def _reader(self) -> Reader:
        return Reader(self.trained)

    def _decode(self, changes: Mapping[str, Any]) -> DecodeConfig:
        return replace(self.trained.run.train.decode, **changes)

    def _writer(self, kind: Any, seed: int, changes: Mapping[str, Any], **own: Any) -> Any:
        """Return a Translator or Generator, made once for each seed and settings of decoding."""
        decode = self._decode(changes)
        if (kind, seed, decode) not in self._writers:
            self._writers[kind, seed, decode] = self.trained.writer(kind, decode, seed, **own)
        return self._writers[kind, seed, decode]


REPORT_SETTINGS = ("seed", "stride", "other_data")


def _listed(texts: Sequence[Any]) -> list[Any]:
    """Return the texts as a list; raise TrainError for one text, which is a sequence of letters."""
    if isinstance(texts, str):
        raise TrainError(f"texts is one string, {texts[:20]!r}: give a list of texts")
    return list(texts)
