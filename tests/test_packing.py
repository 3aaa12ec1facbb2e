"""Test plans of batches: buckets by length, packed rows, and their order in each epoch."""

import dataclasses
import itertools
import time
from collections import Counter

import numpy as np
import pytest

from heedful.data.config import DataConfig
from heedful.data.errors import DataError
from heedful.data.packing import BatchPlan, PackedPlan, Pieces, choose_buckets, pack


def random_lengths(seed, n, longest):
    return np.random.default_rng(seed).integers(1, longest + 1, (2, n))


def positions(lengths, buckets):
    return sum(min(b for b in buckets if b >= length) for length in lengths)


@pytest.mark.parametrize("multiple", [8, 13])
@pytest.mark.parametrize("buckets", [1, 2, 3, 5])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_buckets_are_the_best_there_are(seed, buckets, multiple):
    rng = np.random.default_rng(seed)
    lengths = np.minimum(rng.geometric(0.05, 101), 53)
    config = DataConfig(buckets=buckets, max_length=53, length_multiple=multiple)
    found = choose_buckets(lengths, config)
    # 53 is the largest allowed length; it replaces the next multiple, which is larger.
    candidates = [*range(multiple, 53, multiple), 53]
    least = min(
        positions(lengths, chosen)
        for chosen in itertools.combinations(candidates, buckets)
        if max(chosen) >= lengths.max()
    )
    assert len(found) == buckets
    assert positions(lengths, found) == least


def test_no_more_buckets_than_lengths():
    assert choose_buckets(np.array([3, 5, 11]), DataConfig(buckets=7)) == [8, 16]
    assert choose_buckets(np.array([3]), DataConfig(buckets=3, max_length=5)) == [5]
    assert choose_buckets(np.array([3, 5, 5]), DataConfig(length_multiple=1)) == [3, 5]


@pytest.mark.parametrize("shuffle", [True, False])
def test_every_example_exactly_once_per_epoch(shuffle):
    lengths = random_lengths(3, 997, 61)
    config = DataConfig(batch_tokens=401, batch_multiple=3)
    plan = BatchPlan(lengths, config, 5, shuffle=shuffle)
    for epoch in (0, 1, 2):
        seen = []
        for i in range(plan.batches_per_epoch):
            shape, examples = plan.rows(epoch * plan.batches_per_epoch + i)
            assert shape in plan.shapes
            n_rows, length = shape.rows, max(shape.lengths)
            assert n_rows % 3 == 0
            assert n_rows * length <= 401 < (n_rows + 3) * length
            assert 0 < len(examples) <= n_rows
            assert (lengths[:, examples].max(1) <= shape.lengths).all()
            seen.extend(examples)
        assert sorted(seen) == list(range(997))


def test_padding_share_is_what_the_batches_hold():
    lengths = random_lengths(7, 499, 37)
    plan = BatchPlan(lengths, DataConfig(batch_tokens=301, batch_multiple=2), 0)
    batches = [plan.rows(i) for i in range(plan.batches_per_epoch)]
    places = sum(shape.rows * sum(shape.lengths) for shape, _ in batches)
    assert plan.padding_share == pytest.approx(1 - lengths.sum() / places)


def test_each_side_has_a_length_of_its_own():
    lengths = np.array([[3, 11, 61, 30], [5, 2, 19, 41]])
    config = DataConfig(batch_tokens=301, batch_multiple=1, max_length=61, buckets=2)
    plan = BatchPlan(lengths, config, 0)
    assert plan.shapes == [(2, (16, 8)), (2, (61, 48))]
    assert list(map(str, plan.shapes)) == ["2 x (16 + 8)", "2 x (61 + 48)"]
    assert str(BatchPlan(lengths[:, :1], config, 0).shapes[0]) == "1 x 8"


def test_a_batch_has_no_more_rows_than_its_bucket():
    lengths = np.array([[7] * 11 + [60] * 3])
    config = DataConfig(batch_tokens=64, batch_multiple=2, max_length=64, buckets=2)
    with pytest.raises(DataError, match=r"does not hold data.batch_multiple 2 rows of 64 tokens"):
        BatchPlan(lengths, config, 0)
    plan = BatchPlan(lengths, dataclasses.replace(config, batch_tokens=257), 0)
    assert plan.shapes == [(12, (8,)), (4, (64,))]  # 32 rows of 8 tokens would fit.


def orders(plan, epoch):
    n = plan.batches_per_epoch
    return [tuple(plan.rows(i)[1]) for i in range(epoch * n, (epoch + 1) * n)]


def test_order_depends_on_seed_and_epoch_alone():
    lengths, config = random_lengths(1, 499, 37), DataConfig(batch_tokens=307, batch_multiple=1)
    plan = BatchPlan(lengths, config, 11)
    first, second = orders(plan, 0), orders(plan, 1)
    assert first != second
    assert Counter(map(len, first)) == Counter(map(len, second))
    # Another plan gives the same orders if it is asked for the last epoch first.
    again = BatchPlan(lengths, config, 11)
    assert orders(again, 1) == second
    assert orders(again, 0) == first
    assert orders(BatchPlan(lengths, config, 13), 0) != first
    # Batches of one bucket do not follow each other.
    lengths_in_order = [plan.rows(i)[0].lengths for i in range(plan.batches_per_epoch)]
    assert lengths_in_order != sorted(lengths_in_order)


def test_evaluation_order_is_fixed_and_by_bucket():
    lengths, config = random_lengths(1, 101, 37), DataConfig(batch_tokens=307, batch_multiple=1)
    plan = BatchPlan(lengths, config, 11, shuffle=False)
    in_order = [max(plan.rows(i)[0].lengths) for i in range(plan.batches_per_epoch)]
    assert in_order == sorted(in_order)
    assert orders(plan, 0) == orders(BatchPlan(lengths, config, 13, shuffle=False), 0)


def test_the_plan_in_order_is_the_plan_for_evaluation():
    lengths, config = random_lengths(1, 101, 37), DataConfig(batch_tokens=307, batch_multiple=1)
    plan = BatchPlan(lengths, config, 11)
    first = orders(plan, 0)
    in_order = plan.in_order()
    assert orders(in_order, 0) == orders(BatchPlan(lengths, config, 11, shuffle=False), 0)
    assert orders(in_order, 1) == orders(in_order, 0)
    assert orders(plan, 0) == first != orders(in_order, 0)


def test_batch_tokens_too_small_names_fields_and_fix():
    config = DataConfig(batch_tokens=255, batch_multiple=8, max_length=32)
    with pytest.raises(DataError, match=r"batch_tokens 255 .*batch_multiple 8 .*256 or more"):
        BatchPlan(random_lengths(0, 101, 32), config, 0)
    fixed = DataConfig(batch_tokens=256, batch_multiple=8, max_length=32)
    assert BatchPlan(random_lengths(0, 101, 32), fixed, 0).shapes[-1].rows == 8


def test_a_million_examples_are_planned_in_seconds():
    lengths = np.minimum(np.random.default_rng(0).geometric(0.03, (2, 1_000_000)), 256)
    start = time.perf_counter()
    plan = BatchPlan(lengths, DataConfig(max_length=256, buckets=8, batch_tokens=25_000), 0)
    plan.rows(0)
    plan.rows(plan.batches_per_epoch)
    assert time.perf_counter() - start < 10


# Packed rows -------------------------------------------------------------------------------------

SIZES = [0, 3, 17, 1, 0, 0, 5, 41, 2, 0]  # numbers of positions of documents; some are empty


def packed(sizes=SIZES, seed=7, shuffle=True, **changes):
    starts = np.concatenate([[0], np.cumsum(sizes)])
    how = {"max_length": 11, "batch_tokens": 37, "batch_multiple": 1} | changes
    return PackedPlan(starts, DataConfig(**how), seed, shuffle=shuffle)


def all_rows(plan, epoch):
    """Return the row numbers of an epoch in their order."""
    n = plan.batches_per_epoch
    batches = [plan.rows(epoch * n + i) for i in range(n)]
    assert {shape for shape, _ in batches} == set(plan.shapes)
    return np.concatenate([numbers for _, numbers in batches]).tolist()


def positions_of(plan, epoch, row):
    spans = plan.spans(epoch, row)
    assert all(start < stop for _, start, stop in spans)
    return [(d, i) for d, start, stop in spans for i in range(start, stop)]


def joined(lists):
    return list(itertools.chain.from_iterable(lists))


EVERY = [(d, i) for d, size in enumerate(SIZES) for i in range(size)]


def test_every_position_exactly_once_per_epoch():
    plan = packed()
    shifts = set()
    for epoch in range(29):
        rows = all_rows(plan, epoch)
        assert sorted(rows) == list(range(7))
        held = [positions_of(plan, epoch, row) for row in range(7)]
        assert sorted(joined(held)) == EVERY
        assert list(map(len, held)) == [11] * 6 + [len(EVERY) - 66]
        # An epoch is the same stream from another position on.
        first = EVERY.index(held[0][0])
        assert joined(held) == EVERY[first:] + EVERY[:first]
        shifts.add(first)
    assert len(shifts) > 17


def test_evaluation_of_the_stream_is_in_order():
    for plan in (packed(shuffle=False), packed().in_order()):
        for epoch in (0, 1):
            assert all_rows(plan, epoch) == list(range(7))
            assert joined(positions_of(plan, epoch, row) for row in range(7)) == EVERY


def test_order_of_packed_rows_depends_on_seed_and_epoch_alone():
    def epochs(plan, *which):
        return {e: (all_rows(plan, e), [plan.spans(e, r) for r in range(7)]) for e in which}

    plan = packed()
    found = epochs(plan, 0, 1, 2)
    assert epochs(packed(), 2, 0, 1) == found
    assert found[0] != found[1] != found[2]
    assert epochs(packed(seed=11), 0) != {0: found[0]}
    assert any(rows != sorted(rows) for rows, _ in found.values())


def test_batches_of_packed_rows():
    plan = packed()
    assert plan.shapes == [(3, (11,))] and str(plan.shapes[0]) == "3 x 11"
    assert plan.batches_per_epoch == 3
    assert [len(plan.rows(i)[1]) for i in range(3)] == [3, 3, 1]
    assert plan.padding_share == pytest.approx(1 - 69 / (3 * 3 * 11))
    with pytest.raises(DataError, match=r"batch_tokens 7 .* 11 tokens"):
        packed(batch_tokens=7)


@pytest.mark.parametrize("sizes", [[3], [0, 2, 1, 0], [11], [22, 0], [12]])
def test_short_streams(sizes):
    plan = packed(sizes)
    every = [(d, i) for d, size in enumerate(sizes) for i in range(size)]
    for epoch in range(5):
        rows = sorted(all_rows(plan, epoch))
        assert sorted(joined(positions_of(plan, epoch, row) for row in rows)) == every


@pytest.mark.parametrize("longest", [1, 3, 17, 50])
def test_pieces_are_the_documents(longest):
    pieces = Pieces(np.concatenate([[0], np.cumsum(SIZES)]), longest)
    lengths = pieces.lengths()
    spans = [pieces[u] for u in range(len(lengths))]
    assert [(d, i) for d, start, stop in spans for i in range(start, stop)] == EVERY
    assert [stop - start for _, start, stop in spans] == lengths.tolist()
    assert lengths.max() <= longest
    for (document, _, stop), (after, start, _) in itertools.pairwise(spans):
        assert start == (stop if document == after else 0)
        assert document == after or stop == SIZES[document]


def test_pack_numbers_the_rows():
    packed = pack([{"inputs": np.full(n, n)} for n in (3, 1, 2)])
    assert packed["inputs"].tolist() == [3, 3, 3, 1, 2, 2]
    assert packed["segment_ids"].tolist() == [1, 1, 1, 2, 3, 3]
    assert packed["positions"].tolist() == [0, 1, 2, 0, 0, 1]
    assert packed["segment_ids"].dtype == packed["positions"].dtype == np.int32
    rows = [{"inputs": np.full(n, n), "positions": np.full(n, 7)} for n in (3, 1)]
    assert pack(rows)["positions"].tolist() == [7, 7, 7, 7]


def test_millions_of_documents_are_packed_in_seconds():
    starts = np.concatenate([[0], np.cumsum(np.random.default_rng(0).geometric(0.03, 3_000_000))])
    start = time.perf_counter()
    plan = PackedPlan(starts, DataConfig(max_length=128, batch_tokens=65_536), 0)
    for epoch in (0, 1):
        _, rows = plan.rows(epoch * plan.batches_per_epoch)
        assert sum(stop - start for row in rows for _, start, stop in plan.spans(epoch, row)) > 65e3
    assert time.perf_counter() - start < 5
