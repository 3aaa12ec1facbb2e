"""Test scores against their definitions, computed by hand."""

import warnings

import numpy as np
import pytest
from scipy.stats import rankdata

from heedful.train.evaluation import scores


def outputs(predicted: list[int], classes: int) -> np.ndarray:
    """Return outputs in which the predicted class has the largest value."""
    return np.eye(classes, dtype=np.float32)[predicted] + np.float32(0.25)


@pytest.fixture(autouse=True)
def loud():
    """Raise warnings of libraries as errors, because users would see them within the output."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_two_classes():
    targets = np.array([1, 1, 1, 0, 0, 0, 0], np.int32)
    got = scores.classification(outputs([1, 1, 0, 1, 0, 0, 0], 2), targets)
    tp, fp, fn, tn = 2, 1, 1, 3
    assert got["accuracy"] == pytest.approx(5 / 7)
    assert got["f1"] == pytest.approx(2 * tp / (2 * tp + fp + fn))  # F1 of class 1
    product = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    assert got["matthews"] == pytest.approx((tp * tn - fp * fn) / product**0.5)


def test_f1_of_two_classes_is_that_of_class_1():
    targets = np.array([1, 0, 0, 0], np.int32)
    assert scores.classification(outputs([0, 0, 0, 0], 2), targets)["f1"] == 0
    assert scores.classification(outputs([1, 1, 1, 1], 2), targets)["f1"] == pytest.approx(2 / 5)


def test_three_classes():
    targets = np.array([0, 0, 1, 1, 2, 2, 2], np.int32)
    predicted = [0, 1, 1, 1, 2, 0, 2]
    got = scores.classification(outputs(predicted, 3), targets)
    assert got["accuracy"] == pytest.approx(5 / 7)
    f1 = [2 * 1 / (2 * 1 + 1 + 1), 2 * 2 / (2 * 2 + 1 + 0), 2 * 2 / (2 * 2 + 0 + 1)]
    assert got["f1"] == pytest.approx(np.mean(f1))
    # With several classes it is the correlation of the one-hot matrices of both.
    x, y = np.eye(3)[predicted], np.eye(3)[targets]
    covariance = lambda a, b: ((a - a.mean(0)) * (b - b.mean(0))).sum()  # noqa: E731
    expected = covariance(x, y) / np.sqrt(covariance(x, x) * covariance(y, y))
    assert got["matthews"] == pytest.approx(expected)


def test_one_class_only():
    targets = np.zeros(5, np.int32)
    got = scores.classification(outputs([0] * 5, 2), targets)
    assert got == {"accuracy": 1.0, "f1": 0.0, "matthews": 0.0}


def test_correlations():
    x = np.array([[0.5], [2.0], [2.0], [3.0], [-1.0]], np.float32)  # with a tie
    y = np.array([1.0, 1.5, 4.0, 4.0, 0.5], np.float32)
    got = scores.regression(x, y)
    assert got["pearson"] == pytest.approx(np.corrcoef(x[:, 0], y)[0, 1], rel=1e-5)
    # Equal values share the mean of their ranks: 2, 3.5, 3.5, 5, 1 and 2, 3, 4.5, 4.5, 1.
    ranks = [[2, 3.5, 3.5, 5, 1], [2, 3, 4.5, 4.5, 1]]
    np.testing.assert_array_equal(ranks, [rankdata(x[:, 0]), rankdata(y)])
    assert got["spearman"] == pytest.approx(np.corrcoef(ranks)[0, 1], rel=1e-6)


@pytest.mark.parametrize(
    "x", [[2.0] * 4, [1.0, 1.0, 1.0, 1.0 + 2**-23], [2.0]], ids=["equal", "nearly", "single"]
)
def test_no_correlation_of_what_does_not_vary(x: list[float]):
    """All outputs may equal the bias in the first steps of training."""
    y = np.arange(len(x), dtype=np.float32)
    got = scores.regression(np.array(x, np.float32)[:, None], y)
    assert all(np.isfinite(value) for value in got.values())
    if len(set(x)) == 1:
        assert got == {"pearson": 0.0, "spearman": 0.0}


def test_bleu_and_chrf_with_their_signatures():
    references = ["The device is offline.", "No new updates, today!"]
    got = scores.translation(references, references)
    assert got["BLEU"][0] == pytest.approx(100) and got["chrF"][0] == pytest.approx(100)
    assert got["BLEU"][1].startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    assert got["chrF"][1].startswith("nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:")
    worse = scores.translation(["The device is online.", "No updates, today!"], references)
    assert 0 < worse["BLEU"][0] < worse["chrF"][0] < 100


def test_text_that_is_tokenised_stays_as_it_is():
    hypotheses, references = ["it is a dog ."], ["it is a dog."]
    assert scores.translation(hypotheses, references)["BLEU"][0] == pytest.approx(100)
    got = scores.translation(hypotheses, references, pretokenized=True)["BLEU"]
    assert got[0] < 100 and "tok:none" in got[1]


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("tfds:glue/cola", ["matthews"]),
        ("tfds:glue/mrpc:2.0.0", ["f1", "accuracy"]),
        ("tfds:glue/mnli_matched", ["accuracy"]),
        ("tfds:glue/ax", ["accuracy", "f1", "matthews"]),
        ("tfds:imdb_reviews", ["accuracy", "f1", "matthews"]),
        ("sentiment", ["accuracy", "f1", "matthews"]),
    ],
)
def test_the_scores_that_decide(source: str, names: list[str]):
    assert scores.main_scores(source, {"accuracy": 0.9, "f1": 0.8, "matthews": 0.7}) == names


def test_the_scores_that_decide_about_numbers():
    measured = {"pearson": 0.9, "spearman": 0.8}
    assert scores.main_scores("tfds:glue/stsb", measured) == ["pearson", "spearman"]
