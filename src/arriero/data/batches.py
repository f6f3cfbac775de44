"""Samples as a pure function of (seed, number): no iterator state, so resuming and re-dividing the work cost nothing.

batches = Batches(DataConfig(prefix="runs/alpaca_text_document"), sequence_length=2048, global_batch=512, seed=1234)
batch = batches.samples(3584, 4)      # samples 3584 to 3587 of the run: rows 0 to 3 of step 7, from 0
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from arriero.common.errors import UserError
from arriero.common.text import escape
from arriero.data.batch import Batch
from arriero.data.config import DataConfig, parse_split
from arriero.data.indexed import IndexedDataset, OutOfVocabularyError
from arriero.data.instruct import InstructionSet
from arriero.data.order import MegatronBlend, MegatronOrder, StableOrder, blend_stable, choose_documents
from arriero.data.prefix import INSTRUCTION_FIELDS, Blend, is_instruction, parse_prefix

SPLITS = ("train", "valid", "test")


@dataclass
class _TextSet:
    """One plain data set and the order of its samples."""

    data: IndexedDataset
    order: StableOrder | MegatronOrder
    length: int
    by_document: bool
    samples_per_epoch: int = field(init=False)

    def __post_init__(self) -> None:
        self.samples_per_epoch = self.order.samples_per_epoch

    def check_ids(self, samples: np.ndarray, vocab_size: int) -> None:
        """Raises OutsideVocabulary for the first id of these samples that is not in 0 to vocab_size - 1."""
        for windows, _, within in self.order.groups(samples):
            begin, end, _ = windows.token_ranges(within, self.data.sizes, self.data.starts)
            for a, b in zip(begin.tolist(), end.tolist(), strict=True):
                self.data.check_ids(vocab_size, first=a, end=b)

    def fill(self, samples: np.ndarray, rows: np.ndarray, buffer: np.ndarray, out: Batch) -> None:
        """Writes the samples' windows into the given rows of `buffer`, and what follows from them into `out`."""
        for windows, mine, within in self.order.groups(samples):
            begin, end, count = windows.token_ranges(within, self.data.sizes, self.data.starts)
            tokens = self.data.tokens
            stretches = [tokens[a:b] for a, b in zip(begin.tolist(), end.tolist(), strict=True)]
            into = rows[mine]
            if len(into) == len(buffer):  # then `into` counts up from 0, and the tokens are copied only once
                np.concatenate(stretches, out=buffer.reshape(-1), casting="unsafe")
            else:
                buffer[into] = np.concatenate(stretches, dtype=np.int64, casting="unsafe").reshape(len(into), -1)
            if self.by_document:
                same = _mark_documents(end - begin, count, into, out)
                out.labels[into] = np.where(same, buffer[into, 1:], -100)
            elif out.labels.base is not buffer:
                out.labels[into] = buffer[into, 1:]


def _mark_documents(sizes: np.ndarray, count: np.ndarray, rows: np.ndarray, out: Batch) -> np.ndarray:
    """Fills in positions and document numbers; returns where a label lies in the same document as its token."""
    assert out.positions is not None
    assert out.documents is not None
    ends = np.cumsum(sizes)
    width = out.tokens.shape[1] + 1
    positions = (np.arange(ends[-1]) - np.repeat(ends - sizes, sizes)).reshape(-1, width)
    first = np.cumsum(count) - count
    number = np.arange(len(sizes)) - np.repeat(first, count)
    documents = np.repeat(number, sizes).reshape(-1, width)
    out.positions[rows], out.documents[rows] = positions[:, :-1], documents[:, :-1]
    return documents[:, 1:] == documents[:, :-1]


class Batches:
    """Batches of one split.

    Args:
        config: what to read.
        sequence_length: tokens in a row.
        global_batch: rows in the batch of one step.
        seed: of the order.
        split: train, valid or test.
        samples: rows that the whole run will draw from this split; only `order = "megatron"` needs it.
        vocab_size: of the model; ids outside it are refused when they are read. None: not looked at.

    Raises:
        UserError: a data set is missing, damaged, or too short for one sample.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        sequence_length: int,
        global_batch: int,
        seed: int,
        split: str = "train",
        samples: int | None = None,
        vocab_size: int | None = None,
    ) -> None:
        self.config, self.sequence_length, self.global_batch = config, sequence_length, global_batch
        self.vocab_size, self.split = vocab_size, split
        if config.order == "megatron" and samples is None:
            raise UserError('data.order = "megatron" needs the number of samples of the run', 'use order = "stable"')
        blend = parse_prefix(config.prefix)
        several = len(blend.prefixes) > 1
        self.blend: MegatronBlend | None = None
        """Megatron's, which a lone set with a weight is as well."""
        if config.order == "megatron" and samples and (several or blend.weights is not None):
            self.blend = MegatronBlend(blend.weights, samples)
        shares, self.sets = parse_split(config.split), []
        for number, prefix in enumerate(blend.prefixes):
            wanted = self._megatron_samples(blend, number, samples)
            one = self._open(prefix, shares, SPLITS.index(split), seed, wanted)
            if one.samples_per_epoch == 0 and wanted is None:
                raise UserError(
                    f"{escape(prefix)}: the {split} split (data.split = {config.split!r}) is shorter than one sample "
                    f"of {sequence_length} tokens",
                    "give it a larger share, prepare more text, or shorten the sequence",
                )
            self.sets.append(one)
        # Of a blend: the pass over its sets taken together.
        self.samples_per_epoch = sum(s.samples_per_epoch for s in self.sets)
        lengths = [s.samples_per_epoch for s in self.sets]
        weights = blend.weights or lengths
        self.weights = [weight / sum(weights) for weight in weights]
        if self.blend is not None and several:
            self.blend.assign(lengths)

    def _megatron_samples(self, blend: Blend, number: int, samples: int | None) -> int | None:
        """How many samples Megatron's order of one set is made for; None for one pass over it."""
        if self.config.order != "megatron":
            return None
        if self.blend is None:
            return samples
        return None if blend.weights is None else self.blend.drawn[number]

    def _open(
        self, prefix: str, shares: tuple[float, ...], which: int, seed: int, samples: int | None
    ) -> _TextSet | InstructionSet:
        config, length = self.config, self.sequence_length
        if is_instruction(prefix):
            count = len(IndexedDataset(f"{prefix}_packed_{INSTRUCTION_FIELDS[0]}_document"))
            documents = choose_documents(count, shares, which, by=config.split_by)
            by_document = config.attention == "document"
            return InstructionSet(
                prefix, documents, length=length, seed=seed, pack=config.packing == "best-fit", by_document=by_document,
                too_long=config.too_long,
            )  # fmt: skip
        data = IndexedDataset(prefix)
        documents = choose_documents(len(data), shares, which, by=config.split_by)
        order: StableOrder | MegatronOrder
        if config.order == "megatron":
            if int(data.sizes[documents].sum(dtype=np.int64)) < 2:  # Megatron's helper ends the process on it
                fix = "prepare more text, or give this split a larger share"
                raise UserError(f"{escape(prefix)}: the {self.split} split has no two tokens to draw samples from", fix)
            order = MegatronOrder(data.sizes, documents, length=length, seed=seed, samples=samples)
        else:
            order = StableOrder(data.sizes, documents, length=length, seed=seed)
        if config.attention == "document" and len(documents) and data.sizes[documents].max() < 2:
            problem = (
                f"{escape(prefix)}: no document of the {self.split} split has two tokens, so that none has a label"
            )
            raise UserError(problem, 'use data.attention = "window"')
        return _TextSet(data, order, length, config.attention == "document")

    def notices(self) -> list[str]:
        """One notice for each set with records that are too long, with what is lost of them."""
        return [note for one in self.sets if isinstance(one, InstructionSet) and (note := one.notice())]

    def epoch_of(self, step: int) -> int:
        """The epoch in which the batch of a step starts."""
        return step * self.global_batch // max(1, self.samples_per_epoch)

    def batch(self, step: int, first: int, count: int) -> Batch:
        """Rows [first, first + count) of the global batch of `step` (from 0), every step having the same batch."""
        return self.samples(step * self.global_batch + first, count)

    def samples(self, first: int, count: int) -> Batch:
        """Samples [first, first + count) of the run's order, each a function of its number and the seed alone."""
        samples = np.arange(first, first + count, dtype=np.int64)
        shape = (count, self.sequence_length)
        marked = self.config.attention == "document"
        buffer = np.empty((count, self.sequence_length + 1), np.int64)
        plain = not marked and all(isinstance(one, _TextSet) for one in self.sets)
        out = Batch(
            buffer[:, :-1],
            buffer[:, 1:] if plain else np.empty(shape, np.int64),
            np.empty(shape, np.int64) if marked else None,
            np.empty(shape, np.int64) if marked else None,
        )
        for one, rows, within in self._by_dataset(samples):
            one.fill(within, rows, buffer, out)
        if self.vocab_size is not None:
            self._check_ids(samples, [buffer] if plain else [out.tokens, out.labels], np.uint64(self.vocab_size))
        return out

    def _by_dataset(self, samples: np.ndarray) -> Iterator[tuple[_TextSet | InstructionSet, np.ndarray, np.ndarray]]:
        """For each set that has some of the samples: the set, their rows, and their numbers within the set."""
        if len(self.sets) == 1:
            yield self.sets[0], np.arange(len(samples)), samples
            return
        which, within = self.blend.lookup(samples) if self.blend is not None else blend_stable(samples, self.weights)
        for i, one in enumerate(self.sets):
            rows = np.flatnonzero(which == i)
            if len(rows):
                yield one, rows, np.asarray(within[rows], np.int64)

    def _check_ids(self, samples: np.ndarray, read: list[np.ndarray], vocab_size: np.uint64) -> None:
        """Refuses ids that the model has no row for: they are looked at as they are read, not in a pass of their own.

        Raises:
            UserError: names the file and the place in it.
        """
        assert self.vocab_size is not None
        for ids in read:
            # Seen as unsigned, a negative id is above every vocabulary; -100 stands where no loss falls.
            outside = ids.view(np.uint64) >= vocab_size
            if ids is not read[0]:
                outside &= ids != -100
            if outside.any():
                chosen = samples[np.flatnonzero(outside.any(1))]
                raise self._outside(chosen)

    def _outside(self, samples: np.ndarray) -> UserError:
        """The error for samples that hold an id outside the vocabulary."""
        assert self.vocab_size is not None
        for one, _, within in self._by_dataset(samples):
            try:
                one.check_ids(within, self.vocab_size)
            except OutOfVocabularyError as error:
                return error
        return UserError(f"data.prefix: samples {samples.tolist()[:8]} changed while they were read", "read them again")
