"""Scores of predictions against references, by the libraries that papers use."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

# Main scores of each task of GLUE (arXiv:1804.07461 table 1).
GLUE = {
    "cola": ("matthews",),
    "sst2": ("accuracy",),
    "mrpc": ("f1", "accuracy"),
    "stsb": ("pearson", "spearman"),
    "qqp": ("f1", "accuracy"),
    "mnli": ("accuracy",),
    "qnli": ("accuracy",),
    "rte": ("accuracy",),
    "wnli": ("accuracy",),
}


def classification(outputs: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """Return accuracy, F1 and Matthews correlation of outputs [E, C] and classes [E].

    E is the number of examples, C the number of classes. With two classes, F1 is the F1 of class 1,
    as in GLUE; otherwise it is the mean over the classes.
    """
    import sklearn.metrics  # This takes a second, and most commands do not need it.

    predicted = outputs.argmax(-1)
    average = "binary" if outputs.shape[-1] == 2 else "macro"
    f1 = sklearn.metrics.f1_score(targets, predicted, average=average, zero_division=0.0)  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "A single label")  # The correlation is 0 then.
        matthews = sklearn.metrics.matthews_corrcoef(targets, predicted)
    accuracy = np.mean(predicted == targets)
    return {"accuracy": float(accuracy), "f1": float(f1), "matthews": float(matthews)}


def regression(outputs: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """Return Pearson and Spearman correlation of outputs [E, 1] and targets [E]; 0 if constant."""
    if len(targets) < 2:
        return {"pearson": 0.0, "spearman": 0.0}
    from scipy import stats  # Slow to import, too.

    predicted = outputs[:, 0].astype(np.float64)  # Differences between outputs may be tiny.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.ConstantInputWarning)
        results: dict[str, Any] = {
            "pearson": stats.pearsonr(predicted, targets),
            "spearman": stats.spearmanr(predicted, targets),
        }
    return {name: float(np.nan_to_num(x.statistic)) for name, x in results.items()}


def translation(
    hypotheses: Sequence[str], references: Sequence[str], *, pretokenized: bool = False
) -> dict[str, tuple[float, str]]:
    """Return corpus BLEU and chrF with sacreBLEU's signatures (arXiv:1804.08771).

    With `pretokenized`, texts are already split into words, and are not tokenised again.
    """
    # `force` only silences the warning about tokenised text, which is intended here.
    bleu = BLEU(tokenize="none" if pretokenized else "13a", force=pretokenized)
    scores = {}
    for name, metric in (("BLEU", bleu), ("chrF", CHRF())):
        score = metric.corpus_score(list(hypotheses), [list(references)]).score
        scores[name] = (score, str(metric.get_signature()))
    return scores


def main_scores(source: str, scores: dict[str, float]) -> list[str]:
    """Return the names of the main scores of the data `source`: all, unless it is a GLUE task."""
    if source.startswith("tfds:glue/"):
        task = source.removeprefix("tfds:glue/").split(":")[0].split("_")[0]
        return [name for name in GLUE.get(task, scores) if name in scores]
    return list(scores)
