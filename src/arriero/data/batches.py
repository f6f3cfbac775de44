"""Samples as a pure function of (seed, number): no iterator state, so resuming and re-dividing the work cost nothing.

batches = Batches(DataConfig(prefix="runs/alpaca_text_document"), sequence_length=2048, global_batch=512, seed=1234)
batch = batches.samples(3584, 4)      # samples 3584 to 3587 of the run: rows 0 to 3 of step 7, from 0
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from arriero.common.errors import UserError
from arriero.data.indexed import IndexedDataset, idx_path
from arriero.data.instruct import INSTRUCTION_FIELDS, InstructionSet
from arriero.data.order import MegatronOrder, StableOrder, blend_megatron, blend_stable, choose_documents

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class DataConfig:
    """What a run reads, and in which order."""

    prefix: str = ""
    """Data set that `arriero prepare` wrote (its path without .bin), or a weighted blend: "0.7 A_text_document 0.3
    B_text_document". An instruction set is named by the part before _packed."""
    split: str = "969,30,1"
    """Shares of train, validation and test documents; any positive scale."""
    split_by: Literal["order", "hash"] = "order"
    """order: contiguous ranges of the file, as Megatron; hash: each document by a hash of its number."""
    order: Literal["stable", "megatron"] = "stable"
    """stable: batch i depends on (seed, i) alone; megatron: Megatron-LM's order, bit for bit, which changes with the
    length of the run."""
    packing: Literal["auto", "pad", "best-fit"] = "auto"
    """Instruction sets only. pad: one record a sample; best-fit: several. auto: pad, and nothing for plain text."""
    attention: Literal["window", "document"] = "window"
    """window: attention reaches over all of a packed sample; document: within each document, with positions that start
    at 0 in each."""

    def problems(self) -> list[UserError]:
        """Everything that is wrong with these values, without opening a data set (but its .idx must exist)."""
        found = []
        for parse in (lambda: parse_split(self.split), self._find):
            try:
                parse()
            except UserError as error:
                found.append(error)
        return found

    def _find(self) -> None:
        for _, prefix in parse_prefix(self.prefix):
            instruction = is_instruction(prefix)
            if not instruction and not idx_path(prefix).is_file():
                raise UserError(f"data.prefix: no data set at {prefix} ({idx_path(prefix)} is missing)", _near(prefix))
            if instruction and self.order == "megatron":
                raise UserError(
                    f'data.order = "megatron" is for plain text; {prefix} is an instruction set', 'use "stable"'
                )
            if not instruction and self.packing != "auto":
                raise UserError(
                    f'data.packing = "{self.packing}" has no effect on plain text ({prefix})', "leave it out"
                )


def _near(prefix: str) -> str:
    """A fix that lists the data sets which begin alike."""
    here = Path(prefix)
    found = (
        sorted(p.name.removesuffix(".idx") for p in here.parent.glob(f"{here.name[:3]}*.idx"))
        if here.parent.is_dir()
        else []
    )
    return f"there is: {', '.join(found[:5])}" if found else "give the prefix that `arriero prepare` printed"


def is_instruction(prefix: str) -> bool:
    """Whether PREFIX names an instruction set: the three files PREFIX_packed_*_document."""
    return idx_path(f"{prefix}_packed_{INSTRUCTION_FIELDS[0]}_document").is_file()


def parse_prefix(text: str) -> list[tuple[float, str]]:
    """Reads "A" or "0.7 A 0.3 B" to (weight, prefix), weights summing to 1. Raises UserError."""
    fix = 'write one prefix, or weights and prefixes in turn: "0.7 A 0.3 B"'
    if not text.strip():
        raise UserError("data.prefix is empty", fix)
    if idx_path(text).is_file() or is_instruction(text):
        return [(1.0, text)]
    try:
        words = shlex.split(text)
        if len(words) == 1:
            return [(1.0, words[0])]
        weights = [float(w) for w in words[::2]]
    except ValueError as error:
        raise UserError(f"data.prefix {text!r} is no blend", fix) from error
    if len(words) % 2 or not all(0 < w < float("inf") for w in weights):
        raise UserError(f"data.prefix {text!r}: every prefix needs a weight above 0", fix)
    return [(w / sum(weights), p) for w, p in zip(weights, words[1::2], strict=True)]


def parse_split(text: str) -> tuple[float, ...]:
    """Reads "969,30,1" (or with slashes; missing shares are 0). Raises UserError."""
    try:
        shares = [float(s) for s in text.replace("/", ",").split(",")]
    except ValueError as error:
        raise UserError(f"data.split {text!r} is not three numbers", 'write train,valid,test as "969,30,1"') from error
    shares += [0.0] * (3 - len(shares))
    if len(shares) > 3 or not all(0 <= s < float("inf") for s in shares) or sum(shares) <= 0:
        raise UserError(
            f"data.split {text!r} needs up to three shares, none negative", 'write train,valid,test as "969,30,1"'
        )
    return tuple(shares)


class Batch(NamedTuple):
    """Rows of a global batch. `labels` holds the next token, or -100 where no loss falls.

    Attributes:
        tokens, labels: int64 [count, sequence_length]; for plain text they are views of one array.
        positions: int64 [count, sequence_length], starting over in each document; None with attention = "window".
        documents: int64 [count, sequence_length], number of the document within the row; None likewise.
    """

    tokens: np.ndarray
    labels: np.ndarray
    positions: np.ndarray | None
    documents: np.ndarray | None


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

    def fill(self, samples: np.ndarray, rows: np.ndarray, buffer: np.ndarray, out: Batch) -> None:
        """Writes the samples' windows into the given rows of `buffer`, and what follows from them into `out`."""
        for windows, mine, within in self.order.groups(samples):
            begin, end, count = windows.pieces(within, self.data.sizes, self.data.starts)
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
    ) -> None:
        self.config, self.sequence_length, self.global_batch = config, sequence_length, global_batch
        blend = parse_prefix(config.prefix)
        self.weights = [weight for weight, _ in blend]
        self._blend: tuple[np.ndarray, np.ndarray] | None = None
        shares = parse_split(config.split)
        wanted = samples
        if config.order == "megatron":
            if samples is None:
                raise UserError(
                    'data.order = "megatron" needs the number of samples of the run', 'use order = "stable"'
                )
            if len(blend) > 1:
                self._blend = blend_megatron(samples, self.weights)
        self.sets = []
        for weight, prefix in blend:
            if len(blend) > 1 and samples is not None:
                # Megatron draws half a percent more from each set of a blend than its share, rounding up twice.
                wanted = int(np.ceil(np.ceil(samples * weight) * 1.005))
            one = self._open(prefix, shares, SPLITS.index(split), seed, wanted)
            if one.samples_per_epoch == 0:
                raise UserError(
                    f"{prefix}: the {split} split (data.split = {config.split!r}) is shorter than one sample of "
                    f"{sequence_length} tokens",
                    "give it a larger share, prepare more text, or shorten the sequence",
                )
            self.sets.append(one)
        # Of a blend: the pass over its sets taken together.
        self.samples_per_epoch = sum(s.samples_per_epoch for s in self.sets)

    def _open(
        self, prefix: str, shares: tuple[float, ...], which: int, seed: int, samples: int | None
    ) -> _TextSet | InstructionSet:
        config, length = self.config, self.sequence_length
        if is_instruction(prefix):
            count = len(IndexedDataset(f"{prefix}_packed_{INSTRUCTION_FIELDS[0]}_document"))
            documents = choose_documents(count, shares, which, by=config.split_by)
            by_document = config.attention == "document"
            return InstructionSet(
                prefix, documents, length=length, seed=seed, pack=config.packing == "best-fit", by_document=by_document
            )
        data = IndexedDataset(prefix)
        documents = choose_documents(len(data), shares, which, by=config.split_by)
        order: StableOrder | MegatronOrder
        if config.order == "megatron" and len(documents):
            order = MegatronOrder(data.sizes, documents, length=length, seed=seed, samples=samples or 0)
        else:
            order = StableOrder(data.sizes, documents, length=length, seed=seed)
        return _TextSet(data, order, length, config.attention == "document")

    def epoch_of(self, step: int) -> int:
        """The epoch in which the batch of a step starts."""
        return step * self.global_batch // self.samples_per_epoch

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
        if len(self.sets) == 1:
            self.sets[0].fill(samples, np.arange(count), buffer, out)
            return out
        if self._blend is not None:
            which, within = (column[samples % len(self._blend[0])] for column in self._blend)
        else:
            which, within = blend_stable(samples, self.weights)
        for i, one in enumerate(self.sets):
            rows = np.flatnonzero(which == i)
            if len(rows):
                one.fill(np.asarray(within[rows], np.int64), rows, buffer, out)
        return out
