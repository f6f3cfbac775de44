from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arriero.data.order import StableOrder, blend_stable, choose_documents

SIZES = st.lists(st.integers(0, 12), min_size=1, max_size=40).filter(lambda sizes: sum(sizes) > 4)


def read_all(sizes: list[int], *, length: int, seed: int, epoch: int) -> tuple[list[np.ndarray], StableOrder]:
    lengths = np.array(sizes, np.int32)
    starts = np.cumsum(lengths) - lengths
    tokens = np.arange(lengths.sum())
    order = StableOrder(lengths, np.arange(len(sizes), dtype=np.int32), length=length, seed=seed)
    windows = order.windows(epoch)
    begin, end, count = windows.token_ranges(np.arange(order.samples_per_epoch), lengths, starts)
    parts = [tokens[a:b] for a, b in zip(begin, end, strict=True)]
    ends = np.cumsum(count)
    return [np.concatenate(parts[b - n : b]) for n, b in zip(count, ends, strict=True)], order


@given(SIZES, st.integers(1, 4), st.integers(0, 3), st.integers(0, 2))
@settings(deadline=None)
def test_an_epoch_is_the_shuffled_documents_in_windows(sizes: list[int], length: int, seed: int, epoch: int) -> None:
    samples, order = read_all(sizes, length=length, seed=seed, epoch=epoch)
    windows = order.windows(epoch)
    assert sorted(windows.documents.tolist()) == list(range(len(sizes)))
    starts = np.cumsum(sizes) - sizes
    stream = np.concatenate([np.arange(starts[d], starts[d] + sizes[d]) for d in windows.documents])
    assert order.samples_per_epoch == (sum(sizes) - 1) // length
    for sample, window in zip(samples, windows.shuffle.tolist(), strict=True):
        assert sample.tolist() == stream[window * length : window * length + length + 1].tolist()
    assert sorted(windows.shuffle.tolist()) == list(range(order.samples_per_epoch))


def test_epochs_and_seeds_differ_and_repeat() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        made = StableOrder(np.full(50, 7, np.int32), np.arange(50), length=5, seed=seed)
        return made.windows(epoch).documents.tolist()

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1)
    assert order(1, 0) != order(2, 0)


def test_the_order_is_frozen() -> None:
    """A change of these numbers would break every run that is resumed."""
    windows = StableOrder(np.full(8, 4, np.int32), np.arange(8), length=4, seed=1234).windows(0)
    assert windows.documents.tolist() == [1, 6, 4, 0, 3, 5, 2, 7]
    assert windows.shuffle.tolist() == [0, 6, 2, 5, 4, 1, 3]


@given(
    st.integers(0, 300),
    st.sampled_from([(8.0, 1.0, 1.0), (1.0, 0.0, 0.0), (949.0, 50.0, 1.0)]),
    st.sampled_from(["order", "hash"]),
)
def test_a_split_shares_out_every_document_once(count: int, split: tuple[float, ...], by: str) -> None:
    parts = [choose_documents(count, split, which, by=by) for which in range(3)]
    assert sorted(np.concatenate(parts).tolist()) == list(range(count))


def test_split_in_file_order_is_megatrons_rounding() -> None:
    edges = [choose_documents(52002, (949.0, 50.0, 1.0), which, by="order") for which in range(3)]
    assert [len(e) for e in edges] == [49350, 2600, 52]


def test_a_hash_split_is_fair_and_unmoved_by_appended_documents() -> None:
    small, large = (choose_documents(n, (9.0, 1.0, 0.0), 1, by="hash") for n in (5000, 50000))
    assert small.tolist() == large[large < 5000].tolist()
    assert len(large) == pytest.approx(5000, rel=0.05)


@given(st.lists(st.floats(0.05, 1), min_size=2, max_size=5), st.integers(1, 400))
@settings(deadline=None)
def test_a_blend_keeps_its_shares_and_counts_up_in_each_set(raw: list[float], count: int) -> None:
    weights = [w / sum(raw) for w in raw]
    which, within = blend_stable(np.arange(count), weights)
    for i, weight in enumerate(weights):
        mine = within[which == i]
        assert mine.tolist() == list(range(len(mine)))
        assert abs(len(mine) - weight * count) <= len(weights)


@given(st.integers(0, 300), st.integers(1, 30))
@settings(deadline=None)
def test_a_blends_samples_do_not_depend_on_the_batch_they_are_asked_in(first: int, count: int) -> None:
    weights = [0.5, 0.3, 0.2]
    whole = blend_stable(np.arange(400), weights)
    part = blend_stable(np.arange(first, first + count), weights)
    for a, b in zip(whole, part, strict=True):
        assert a[first : first + count].tolist() == b.tolist()
