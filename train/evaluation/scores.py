"""Scores of predictions against references, by the libraries that papers use."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

# What is reported of each task of GLUE (arXiv:1804.07461 table 1), and decides between models.
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
    """Return accuracy, F1 and Matthews correlation, of outputs [E, C] and classes [E].

    F1 is that of class 1 where there are two (GLUE), else the mean over classes.
    """
    import sklearn.metrics  # a second, which most runs need not wait for

    predicted = outputs.argmax(-1)
    average = "binary" if outputs.shape[-1] == 2 else "macro"
    f1 = sklearn.metrics.f1_score(targets, predicted, average=average, zero_division=0.0)  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "A single label")  # there is no correlation then: 0
        matthews = sklearn.metrics.matthews_corrcoef(targets, predicted)
    accuracy = np.mean(predicted == targets)
    return {"accuracy": float(accuracy), "f1": float(f1), "matthews": float(matthews)}


def regression(outputs: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """Return Pearson and Spearman correlation of outputs [E, 1] and numbers [E]; 0 if constant."""
    if len(targets) < 2:
        return {"pearson": 0.0, "spearman": 0.0}
    from scipy import stats  # as above

    predicted = outputs[:, 0].astype(np.float64)  # their differences may be tiny
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

    Text that is tokenised already is compared as it is.
    """
    # `force` only silences the warning about text that is tokenised: here it is meant to be.
    bleu = BLEU(tokenize="none" if pretokenized else "13a", force=pretokenized)
    scores = {}
    for name, metric in (("BLEU", bleu), ("chrF", CHRF())):
        score = metric.corpus_score(list(hypotheses), [list(references)]).score
        scores[name] = (score, str(metric.get_signature()))
    return scores


def main_scores(source: str, scores: dict[str, float]) -> list[str]:
    """Return the names of the scores that judge the task of `source`; all, where none is known."""
    if source.startswith("tfds:glue/"):
        task = source.removeprefix("tfds:glue/").split(":")[0].split("_")[0]
        return [name for name in GLUE.get(task, scores) if name in scores]
    return list(scores)
