import itertools
import time
from collections import Counter

import numpy as np
import pytest

from data.config import DataConfig, DataError
from data.packing import BatchPlan, choose_buckets


def random_lengths(seed, n, longest):
    return np.random.default_rng(seed).integers(1, longest + 1, (2, n))


def positions(lengths, buckets):
    return sum(min(b for b in buckets if b >= length) for length in lengths)


@pytest.mark.parametrize("buckets", [1, 2, 3, 5])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_buckets_are_the_best_there_are(seed, buckets):
    rng = np.random.default_rng(seed)
    lengths = np.minimum(rng.geometric(0.05, 101), 53)
    found = choose_buckets(lengths, buckets, 53)
    # 53 is the largest allowed length, so it stands for the multiple of 8 that it cannot reach.
    candidates = [8, 16, 24, 32, 40, 48, 53]
    least = min(
        positions(lengths, chosen)
        for chosen in itertools.combinations(candidates, buckets)
        if max(chosen) >= lengths.max()
    )
    assert len(found) == buckets
    assert positions(lengths, found) == least


def test_no_more_buckets_than_lengths():
    assert choose_buckets(np.array([3, 5, 11]), 7, 64) == [8, 16]
    assert choose_buckets(np.array([3]), 3, 5) == [5]


@pytest.mark.parametrize("shuffle", [True, False])
def test_every_example_exactly_once_per_epoch(shuffle):
    lengths = random_lengths(3, 997, 61)
    config = DataConfig(batch_tokens=401, batch_multiple=3)
    plan = BatchPlan(lengths, config, 5, shuffle=shuffle)
    for epoch in (0, 1, 2):
        seen = []
        for i in range(plan.batches_per_epoch):
            length, n_rows, examples = plan.rows(epoch * plan.batches_per_epoch + i)
            assert (n_rows, length) in plan.shapes
            assert n_rows % 3 == 0
            assert n_rows * length <= 401 < (n_rows + 3) * length
            assert 0 < len(examples) <= n_rows
            assert lengths[:, examples].max() <= length
            seen.extend(examples)
        assert sorted(seen) == list(range(997))


def test_padding_share_is_what_the_batches_hold():
    lengths = random_lengths(7, 499, 37)
    plan = BatchPlan(lengths, DataConfig(batch_tokens=301, batch_multiple=2), 0)
    batches = [plan.rows(i) for i in range(plan.batches_per_epoch)]
    places = 2 * sum(length * n_rows for length, n_rows, _ in batches)
    assert plan.padding_share == pytest.approx(1 - lengths.sum() / places)


def orders(plan, epoch):
    n = plan.batches_per_epoch
    return [tuple(plan.rows(i)[2]) for i in range(epoch * n, (epoch + 1) * n)]


def test_order_depends_on_seed_and_epoch_alone():
    lengths, config = random_lengths(1, 499, 37), DataConfig(batch_tokens=307, batch_multiple=1)
    plan = BatchPlan(lengths, config, 11)
    first, second = orders(plan, 0), orders(plan, 1)
    assert first != second
    assert Counter(map(len, first)) == Counter(map(len, second))
    # Asked from behind, by another plan: the same.
    again = BatchPlan(lengths, config, 11)
    assert orders(again, 1) == second
    assert orders(again, 0) == first
    assert orders(BatchPlan(lengths, config, 13), 0) != first
    # Batches of one bucket do not follow each other.
    lengths_in_order = [plan.rows(i)[0] for i in range(plan.batches_per_epoch)]
    assert lengths_in_order != sorted(lengths_in_order)


def test_evaluation_order_is_fixed_and_by_bucket():
    lengths, config = random_lengths(1, 101, 37), DataConfig(batch_tokens=307, batch_multiple=1)
    plan = BatchPlan(lengths, config, 11, shuffle=False)
    in_order = [plan.rows(i)[0] for i in range(plan.batches_per_epoch)]
    assert in_order == sorted(in_order)
    assert orders(plan, 0) == orders(BatchPlan(lengths, config, 13, shuffle=False), 0)


def test_batch_tokens_too_small_names_fields_and_fix():
    config = DataConfig(batch_tokens=255, batch_multiple=8, max_length=32)
    with pytest.raises(DataError, match=r"batch_tokens 255 .*batch_multiple 8 .*256 or more"):
        BatchPlan(random_lengths(0, 101, 32), config, 0)
    fixed = DataConfig(batch_tokens=256, batch_multiple=8, max_length=32)
    assert BatchPlan(random_lengths(0, 101, 32), fixed, 0).n_rows[-1] == 8


def test_a_million_examples_are_planned_in_seconds():
    lengths = np.minimum(np.random.default_rng(0).geometric(0.03, (2, 1_000_000)), 256)
    start = time.perf_counter()
    plan = BatchPlan(lengths, DataConfig(max_length=256, buckets=8, batch_tokens=25_000), 0)
    plan.rows(0)
    plan.rows(plan.batches_per_epoch)
    assert time.perf_counter() - start < 10
