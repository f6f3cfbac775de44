"""Instruction sets: three aligned data sets (ids, attention mask, labels), padded or packed to the sequence length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from arriero.common.errors import UserError
from arriero.common.text import escape
from arriero.data.config import TooLong
from arriero.data.indexed import IndexedDataset
from arriero.data.prefix import INSTRUCTION_FIELDS

if TYPE_CHECKING:
    from arriero.data.batch import Batch

_NO_LABEL = np.iinfo(np.int64).max
PAD_ID = 0  # any id does: padding stands after the text, attention is causal, and no loss falls on it


def pack_best_fit(sizes: np.ndarray, capacity: int) -> list[list[int]]:
    """Packs items into bins by best-fit decreasing: each goes where the least room is left over.

    Bit n of an integer is set if a bin with n free places exists: each item costs a shift and a lowest set bit.

    Args:
        sizes: item sizes, none above `capacity`; equal sizes keep their order.
        capacity: of a bin.

    Returns:
        the items (positions in `sizes`) of each bin.
    """
    bins: list[list[int]] = []
    rooms: dict[int, list[int]] = {}  # free room -> bins
    exists = 0
    for item in np.argsort(-sizes.astype(np.int64), kind="stable").tolist():
        size = int(sizes[item])
        fitting = exists >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            chosen = rooms[room].pop()
            if not rooms[room]:
                exists &= ~(1 << room)
            bins[chosen].append(item)
        else:
            room, chosen = capacity, len(bins)
            bins.append([item])
        left = room - size
        rooms.setdefault(left, []).append(chosen)
        exists |= 1 << left
    return bins


@dataclass(frozen=True)
class LabelCoverage:
    """How many samples keep a label that carries a loss once they are cut at the sequence length."""

    samples: int
    """Samples that were looked at: all of them, unless there are very many labels."""
    without_labels: int
    """Of these, samples that keep none."""
    never: int
    """Of these, samples that have none at any length."""
    sufficient_length: int
    """The least sequence length at which all the others keep one; 0 where there are no others."""


class InstructionSet:
    """Records of an instruction set as samples.

    A record of n tokens fills n - 1 places: tokens are ids[:-1], labels are labels[1:], as AscendSpeed pairs them.
    `too_long` decides what is done with longer ones.

    Attributes:
        samples_per_epoch: records, or bins when packed.
        records: documents of at least two tokens.
        long: those of them that fill more places than a sample has.

    Raises:
        UserError: the three files do not belong together, or records are too long and that is an error.
    """

    def __init__(
        self, prefix: str, documents: np.ndarray, *, length: int, seed: int, pack: bool, by_document: bool,
        too_long: TooLong = "cut",
    ) -> None:  # fmt: skip
        self._ids, mask, self._labels = (
            IndexedDataset(f"{prefix}_packed_{name}_document") for name in INSTRUCTION_FIELDS
        )
        if not (np.array_equal(self._ids.sizes, mask.sizes) and np.array_equal(self._ids.sizes, self._labels.sizes)):
            raise UserError(f"{prefix}: the three packed files have different lengths", "prepare the data set again")
        self._length, self._seed, self._by_document = length, seed, by_document
        places = self._ids.sizes[documents].astype(np.int64) - 1
        documents = documents[places > 0]
        places = places[places > 0]
        self.prefix, self.records, self.long, self._too_long = prefix, documents, documents[places > length], too_long
        if too_long == "error" and len(self.long):
            raise UserError(self._describe_long(), "raise train.sequence_length, or set data.too_long to cut or drop")
        if too_long == "drop":
            documents, places = documents[places <= length], places[places <= length]
            if len(self.long) and not len(documents):
                raise UserError(f"{self._describe_long()}: none is left", "raise train.sequence_length")
        # Packed once, not anew in each epoch: the number of samples of an epoch must not depend on the epoch.
        bins = pack_best_fit(np.minimum(places, length), length) if pack else [[i] for i in range(len(documents))]
        self._members = np.array([documents[i] for one in bins for i in one], np.int64)
        self._firsts = np.concatenate([[0], np.cumsum([len(one) for one in bins], dtype=np.int64)]).astype(np.int64)
        self.samples_per_epoch = len(bins)
        self._epochs: dict[int, np.ndarray] = {}

    def _describe_long(self) -> str:
        longest = int(self._ids.sizes[self.long].max()) - 1
        return (
            f"{escape(self.prefix)}: {len(self.long):,} of {len(self.records):,} records are longer than "
            f"train.sequence_length {self._length:,} (the longest: {longest:,} tokens)"
        )

    def notice(self) -> str:
        """What becomes of records that are too long, one sentence; empty where there are none. Reads their labels."""
        if not len(self.long):
            return ""
        if self._too_long == "drop":
            return f"{self._describe_long()}; they are left out (data.too_long = drop)"
        learned = lost = 0
        for member in self.long.tolist():
            valid = self._labels[member][1:] != -100
            learned += int(valid.sum())
            lost += int(valid[self._length :].sum())
        return (
            f"{self._describe_long()}; they are cut (data.too_long = cut): {lost / max(1, learned):.0%} of the tokens "
            "that they are to teach are lost"
        )

    def label_coverage(self, most: int = 1 << 28) -> LabelCoverage:
        """Looks at the labels of all samples, or of evenly spaced ones where there are more than `most` labels."""
        step = max(1, -(-len(self._labels.tokens) // most))
        chosen = np.arange(0, self.samples_per_epoch, step)
        counts = np.diff(self._firsts)[chosen]
        member_at = np.arange(counts.sum()) + np.repeat(self._firsts[chosen] - (np.cumsum(counts) - counts), counts)
        first = self._first_labels(self._members[member_at])
        nearest = np.minimum.reduceat(first, np.cumsum(counts) - counts)
        without, never = nearest >= self._length, nearest == _NO_LABEL
        enough = nearest[without & ~never].max(initial=-1) + 1
        return LabelCoverage(len(chosen), int(without.sum()), int(never.sum()), int(enough))

    def _first_labels(self, members: np.ndarray) -> np.ndarray:
        """The place of each record's first label that carries a loss, from 0; _NO_LABEL where there is none."""
        labels, found = self._labels, [np.empty(0, np.int64)]
        begin, size = labels.starts[members] + 1, labels.sizes[members].astype(np.int64) - 1
        batch = np.cumsum(size) // (1 << 22)
        for some in np.split(np.arange(len(members)), np.flatnonzero(np.diff(batch)) + 1):
            if not len(some):
                continue
            stretches = zip(begin[some].tolist(), (begin + size)[some].tolist(), strict=True)
            flat = np.concatenate([labels.tokens[a:b] for a, b in stretches])
            starts = np.cumsum(size[some]) - size[some]
            place = np.arange(len(flat)) - np.repeat(starts, size[some])
            place[flat == -100] = _NO_LABEL
            found.append(np.minimum.reduceat(place, starts))
        return np.concatenate(found)

    def check_ids(self, samples: np.ndarray, vocab_size: int) -> None:
        """Raises OutsideVocabulary for the first id or label of these samples that is not in 0 to vocab_size - 1."""
        for sample in samples.tolist():
            epoch, within = divmod(sample, self.samples_per_epoch)
            chosen = int(self._shuffle(epoch)[within])
            for member in self._members[self._firsts[chosen] : self._firsts[chosen + 1]].tolist():
                for data, ignored in ((self._ids, None), (self._labels, -100)):
                    first = int(data.starts[member])
                    data.check_ids(vocab_size, first=first, end=first + int(data.sizes[member]), ignored=ignored)

    def _shuffle(self, epoch: int) -> np.ndarray:
        if epoch not in self._epochs:
            random = np.random.RandomState(np.random.MT19937(np.random.SeedSequence([self._seed, epoch])))
            self._epochs = {epoch: random.permutation(self.samples_per_epoch)}
        return self._epochs[epoch]

    def fill(self, samples: np.ndarray, rows: np.ndarray, buffer: np.ndarray, out: Batch) -> None:
        """Writes the samples into the given rows of `out` (whose tokens lie in `buffer`)."""
        out.tokens[rows], out.labels[rows] = PAD_ID, -100
        if out.positions is not None and out.documents is not None:
            out.positions[rows], out.documents[rows] = 0, 0
        for sample, row in zip(samples.tolist(), rows.tolist(), strict=True):
            epoch, within = divmod(sample, self.samples_per_epoch)
            chosen = int(self._shuffle(epoch)[within])
            members = self._members[self._firsts[chosen] : self._firsts[chosen + 1]]
            at = 0
            for number, member in enumerate(members.tolist()):
                ids, labels = self._ids[member][:-1], self._labels[member][1:]
                end = min(at + len(ids), self._length)
                out.tokens[row, at:end] = ids[: end - at]
                out.labels[row, at:end] = labels[: end - at]
                if self._by_document and out.positions is not None and out.documents is not None:
                    out.positions[row, at:end] = np.arange(end - at)
                    out.documents[row, at:end] = number
                at = end
            if self._by_document and out.documents is not None and out.positions is not None:
                # Padding is a document of its own, so that every row of an attention mask has something to attend to.
                out.documents[row, at:] = len(members)
                out.positions[row, at:] = np.arange(self._length - at)
