"""Which tokens sample i consists of: shuffled documents, concatenated, cut into overlapping windows, shuffled again.

Window w of an epoch is `stream[w * length : w * length + length + 1]`: neighbours share one token, so that every token
but the first is a label exactly once. The stream is the documents in shuffled order; only its index is ever built.

Every random draw is numpy's frozen `RandomState`: the same seed gives the same order under every version of numpy.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Windows:
    """The windows of one shuffled stream. Memory: 4 bytes a document and 12 bytes a window.

    Attributes:
        documents: int32, document ids in stream order.
        first: uint32 [windows + 1], position in `documents` where a window starts.
        offset: int32 [windows + 1], tokens to skip in that document.
        shuffle: uint32 [windows], window of sample i.
    """

    documents: np.ndarray
    first: np.ndarray
    offset: np.ndarray
    shuffle: np.ndarray

    def token_ranges(
        self, samples: np.ndarray, sizes: np.ndarray, starts: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where the samples' tokens lie in the flat token array, in order, one row for each range of one document.

        Args:
            samples: [n] sample numbers within this stream.
            sizes, starts: tokens and first token of every document of the data set.

        Returns:
            begin, end: [pieces] half-open ranges of the flat token array; count: [n] pieces of each sample.
        """
        window = self.shuffle[samples].astype(np.int64)
        first, last = self.first[window].astype(np.int64), self.first[window + 1].astype(np.int64)
        count = last - first + 1
        ends = np.cumsum(count)
        position = np.arange(ends[-1] if len(ends) else 0) + np.repeat(first - (ends - count), count)
        documents = self.documents[position]
        begin = starts[documents]
        end = begin + sizes[documents]
        end[ends - 1] = begin[ends - 1] + self.offset[window + 1] + 1  # the token that the next window starts with
        begin[ends - count] += self.offset[window]
        return begin, end, count


def window_starts(sizes: np.ndarray, documents: np.ndarray, length: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Start of `count` windows and of the one after them: (position in `documents`, token in that document)."""
    lengths = sizes[documents]
    ends = np.cumsum(lengths, dtype=np.int64)
    places = np.arange(count + 1, dtype=np.int64) * length
    # The first document that ends after the place: empty documents are passed over.
    first = np.searchsorted(ends, places, side="right")
    offset = places - ends[first] + lengths[first]
    return first.astype(np.uint32), offset.astype(np.int32)


class StableOrder:
    """Each epoch is shuffled on its own, from (seed, epoch) alone: nothing depends on how long the run is.

    Attributes:
        samples_per_epoch: windows in one pass; the stream's tail, shorter than a window, is dropped.
    """

    def __init__(self, sizes: np.ndarray, documents: np.ndarray, *, length: int, seed: int) -> None:
        self._sizes, self._documents, self._length, self._seed = sizes, documents.astype(np.int32), length, seed
        tokens = int(sizes[documents].sum(dtype=np.int64))
        self.samples_per_epoch = max(0, (tokens - 1) // length)
        self._epochs: OrderedDict[int, Windows] = OrderedDict()

    def windows(self, epoch: int) -> Windows:
        """The windows of an epoch; the two used last are kept."""
        if epoch not in self._epochs:
            while len(self._epochs) > 1:
                self._epochs.popitem(last=False)
            random = np.random.RandomState(np.random.MT19937(np.random.SeedSequence([self._seed, epoch])))
            documents = self._documents.copy()
            random.shuffle(documents)
            first, offset = window_starts(self._sizes, documents, self._length, self.samples_per_epoch)
            shuffle = np.arange(self.samples_per_epoch, dtype=np.uint32)
            random.shuffle(shuffle)
            self._epochs[epoch] = Windows(documents, first, offset, shuffle)
        self._epochs.move_to_end(epoch)
        return self._epochs[epoch]

    def groups(self, samples: np.ndarray) -> list[tuple[Windows, np.ndarray, np.ndarray]]:
        """Sorts sample numbers by epoch: (windows, rows of `samples`, sample numbers within the epoch)."""
        epochs, within = np.divmod(samples, self.samples_per_epoch)
        found = []
        for epoch in np.unique(epochs):
            rows = np.flatnonzero(epochs == epoch)
            found.append((self.windows(int(epoch)), rows, within[rows]))
        return found


class MegatronOrder:
    """The indices of Megatron-LM's GPTDataset, bit for bit. They depend on how many samples the whole run draws.

    Source: Megatron-LM, `megatron/core/datasets/gpt_dataset.py`; checked against megatron-core 0.16.1.

    Args:
        sizes, documents: tokens of every document, and the documents to read; at least two tokens together.
        samples: samples that the run draws from this set; the epochs that they need are shuffled together, unless the
            last one is used for less than 80%: it is then shuffled on its own. None for exactly one epoch.
    """

    def __init__(
        self, sizes: np.ndarray, documents: np.ndarray, *, length: int, seed: int, samples: int | None
    ) -> None:  # fmt: skip
        per_epoch = int(sizes[documents].sum(dtype=np.int64))
        epochs = 1 if samples is None else max(1, -(-(samples * length + 1) // per_epoch))
        before = ((epochs - 1) * per_epoch - 1) // length  # samples of all epochs but the last
        separate = epochs > 1 and (samples or 0) - before < int(0.80 * ((per_epoch - 1) // length))
        random = np.random.RandomState(seed)

        def shuffled(n: int) -> np.ndarray:
            many = np.tile(documents.astype(np.int32), n)
            random.shuffle(many)
            return many

        order = np.concatenate([shuffled(epochs - 1), shuffled(1)]) if separate else shuffled(epochs)
        total = (epochs * per_epoch - 1) // length
        first, offset = window_starts(sizes, order, length, total)
        kind = np.uint32 if total < np.iinfo(np.uint32).max - 1 else np.int64
        parts = (
            [np.arange(0, before, dtype=kind), np.arange(before, total, dtype=kind)]
            if separate
            else [np.arange(total, dtype=kind)]
        )
        for part in parts:
            random.shuffle(part)
        self._windows = Windows(order, first, offset, np.concatenate(parts))
        self.total = total
        self.samples_per_epoch = max(0, (per_epoch - 1) // length)

    def windows(self, epoch: int = 0) -> Windows:
        """All windows of the run."""
        return self._windows

    def groups(self, samples: np.ndarray) -> list[tuple[Windows, np.ndarray, np.ndarray]]:
        """As `StableOrder.groups`; samples past the end start over."""
        return [(self._windows, np.arange(len(samples)), samples % self.total)]


def choose_documents(count: int, split: tuple[float, ...], which: int, *, by: str) -> np.ndarray:
    """Document ids of one part of a split, in file order.

    Args:
        count: documents in the data set.
        split: shares of train, validation and test; any positive scale.
        which: 0, 1 or 2.
        by: "order" cuts the file into contiguous ranges, as Megatron does; "hash" draws each document by a hash of its
            number, so that a part is a fair sample and documents appended later move no earlier one.
    """
    if by == "order":  # shares are normalised, then added up: in another order a boundary may be rounded otherwise
        ends = np.cumsum([0.0, *normalize_weights(split)])
        low, high = (round(float(ends[which + k]) * float(count)) for k in (0, 1))
        return np.arange(low, high, dtype=np.int32)
    edges = np.cumsum([0.0, *split]) / sum(split)
    # splitmix64 (Steele, Lea, Flood 2014) of the document number, as a fraction of 2^64.
    x = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    place = ((x ^ (x >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) / 2.0**53
    return np.flatnonzero((place >= edges[which]) & (place < edges[which + 1])).astype(np.int32)


def blend_stable(samples: np.ndarray, weights: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """Which set sample t of a blend comes from, and its number within that set; a closed form, so nothing is stored.

    Set 0 takes sample t where floor(t w) steps up, so its count never strays from t w by one; the rest is shared out
    among the other sets in the same way.

    Returns:
        set number and sample number, both [len(samples)].
    """
    which = np.full(len(samples), len(weights) - 1)
    within = samples.astype(np.int64)
    left, remaining = np.arange(len(samples)), float(sum(weights))
    for i, weight in enumerate(weights[:-1]):
        share = weight / remaining
        here = within[left]
        before = np.floor(here * share).astype(np.int64)
        taken = np.floor((here + 1) * share).astype(np.int64) > before
        which[left[taken]], within[left[taken]] = i, before[taken]
        within[left[~taken]] -= before[~taken]
        left, remaining = left[~taken], remaining - weight
    return which, within


def normalize_weights(weights: Sequence[float]) -> list[float]:
    """Weights that sum to 1, to the bit as Megatron-LM's `normalize` makes them."""
    array = np.array(weights, np.float64)
    found: list[float] = (array / np.sum(array)).tolist()
    return found


class MegatronBlend:
    """The blend of Megatron-LM's BlendedMegatronDatasetBuilder and BlendedDataset, bit for bit.

    Source: Megatron-LM, `megatron/core/datasets/blended_megatron_dataset_builder.py` and `blended_dataset.py`.

    Args:
        weights: one a set, in any scale; None: each set counts by its length, and is passed over once.
        samples: samples that the run draws in all.

    Attributes:
        drawn: with weights, samples that the order of each set is made for: half a percent more than its share.
        samples: as given.
        total: samples that the blend has, after which it starts over; without weights at most one pass.
    """

    def __init__(self, weights: Sequence[float] | None, samples: int) -> None:
        self._weights, self.samples = (None if weights is None else normalize_weights(weights)), samples
        shares = [math.ceil(samples * weight) for weight in self._weights or []]
        self.drawn = [math.ceil(share * (1 + 0.005)) for share in shares]
        self.total = sum(shares)
        self._which = self._within = np.empty(0, np.int64)

    def assign(self, lengths: Sequence[int]) -> None:
        """Decides for every sample which set it comes from; `lengths` are the sets' samples in one pass."""
        if self._weights is None:
            self._weights, self.total = [float(n) for n in lengths], min(self.samples, sum(lengths))
        # A second time: the first quotients need not sum to 1, and a last bit decides between sets that are level.
        self._which, self._within = blend_megatron(self.total, normalize_weights(self._weights))

    def lookup(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Set number and sample number within the set of each of these samples; past the end they start over."""
        return self._which[samples % self.total], self._within[samples % self.total]


def blend_megatron(count: int, weights: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """Megatron's greedy blend: sample t goes to the set that is furthest behind its share (the first of equals).

    Returns:
        set number (int16) and sample number within the set (int64), both [count].
    """
    taken = [0] * len(weights)
    which, within = np.empty(count, np.int16), np.empty(count, np.int64)
    for t in range(count):
        scale = float(t or 1)
        errors = [w * scale - n for w, n in zip(weights, taken, strict=True)]
        best = errors.index(max(errors))
        which[t], within[t] = best, taken[best]
        taken[best] += 1
    return which, within
