"""Records to token arrays on several threads, in the order of the input, whatever the number of threads.

Threads, not processes: every engine tokenises outside the interpreter's lock, one process holds the vocabulary once,
and no worker process can be killed on its own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from arriero.common.errors import UserError
from arriero.common.text import escape
from arriero.data.formats import Document, Format, UnusableRecordError
from arriero.data.json_stream import MalformedRecord, abbreviate
from arriero.data.tokenizer import Tokenizer
from arriero.data.tokenizer_safety import TooSlowError

CHUNK_CHARACTERS = (
    1 << 19
)  # of text in one chunk: long enough to hide the cost of submitting it, short enough for memory
CHUNK_RECORDS = 1024


class RecordLocation(NamedTuple):
    """Where a record came from: input file (its number) and line or record number."""

    file: int
    number: int


class RejectedRecord(NamedTuple):
    """A record that was not used, and why."""

    location: RecordLocation
    reason: str
    raw: str


NumberedRecord = tuple[RecordLocation, dict[str, Any] | MalformedRecord]


@dataclass
class EncodedChunk:
    """The token arrays of one chunk.

    Attributes:
        columns: for every output file, the tokens of its documents back to back and their sizes.
        documents: records that became documents.
        text_bytes: UTF-8 bytes that were tokenised.
    """

    columns: list[tuple[np.ndarray, np.ndarray]]
    rejected: list[RejectedRecord] = field(default_factory=list)
    documents: int = 0
    text_bytes: int = 0
    largest_id: int = -1


def chunks(items: Iterable[NumberedRecord]) -> Iterator[list[NumberedRecord]]:
    """Groups records into chunks; the grouping follows from the input alone."""
    chunk: list[NumberedRecord] = []
    size = 0
    for item in items:
        chunk.append(item)
        record = item[1]
        if not isinstance(record, MalformedRecord):
            size += sum(len(v) for v in record.values() if isinstance(v, str))
        if size >= CHUNK_CHARACTERS or len(chunk) >= CHUNK_RECORDS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


@dataclass(frozen=True)
class Encoder:
    """Turns a chunk of records into arrays. Safe to call from several threads."""

    tokenizer: Tokenizer
    format: Format
    bos: int | None
    eos: int | None
    files: Sequence[Path] = ()

    def __call__(self, chunk: list[NumberedRecord]) -> EncodedChunk:
        """Formats, checks and tokenises one chunk."""
        usable: list[list[Document]] = []
        locations: list[RecordLocation] = []
        rejected: list[RejectedRecord] = []
        for location, record in chunk:
            if isinstance(record, MalformedRecord):
                rejected.append(RejectedRecord(location, record.reason, record.raw))
                continue
            try:
                documents = self.format.documents(record)
                for document in documents:
                    for segment in document:
                        _check_unicode(segment.text)
            except UnusableRecordError as error:
                rejected.append(RejectedRecord(location, str(error), abbreviate(record)))
            else:
                usable.append(documents)
                locations.append(location)
        usable, columns = self._tokenise(usable, locations, rejected)
        result = EncodedChunk(columns, rejected, documents=len(usable))
        for n in range(len(self.format.names)):
            chosen = [documents[n] for documents in usable]
            result.text_bytes += sum(len(segment.text.encode()) for document in chosen for segment in document)
        ids = result.columns[:1] if self.format.masked else result.columns
        result.largest_id = max((int(flat.max()) for flat, _ in ids if len(flat)), default=-1)
        return result

    def _tokenise(
        self, usable: list[list[Document]], locations: list[RecordLocation], rejected: list[RejectedRecord]
    ) -> tuple[list[list[Document]], list[tuple[np.ndarray, np.ndarray]]]:
        """The records that the tokenizer takes, and their arrays; each that it fails on is rejected with its location.

        Raises:
            UserError: the tokenizer takes longer than a sound one does; names where.
        """
        try:
            return usable, self._arrays(usable)
        except TooSlowError as error:
            where = (
                f"records {locations[0].number} to {locations[-1].number} of {escape(self.files[locations[0].file])}"
            )
            raise UserError(f"{error.problem} (among {where})", error.fix) from None
        except UserError as error:
            if len(usable) == 1:
                text = "".join(segment.text for segment in usable[0][0])
                rejected.append(RejectedRecord(locations[0], error.problem, abbreviate(text)))
                return [], self._arrays([])
        taken = []
        for documents, location in zip(usable, locations, strict=True):
            taken += self._tokenise([documents], [location], rejected)[0]
        rejected.sort(key=lambda one: one.location)
        return taken, self._arrays(taken)

    def _arrays(self, usable: list[list[Document]]) -> list[tuple[np.ndarray, np.ndarray]]:
        columns: list[tuple[np.ndarray, np.ndarray]] = []
        for n in range(len(self.format.names)):
            chosen = [documents[n] for documents in usable]
            columns += self._masked(chosen) if self.format.masked else self._plain(chosen)
        return columns

    def _plain(self, documents: list[Document]) -> list[tuple[np.ndarray, np.ndarray]]:
        """One segment a document: BOS, text, EOS."""
        encoded = self.tokenizer.encode_arrays([document[0].text for document in documents])
        before = np.array([] if self.bos is None else [self.bos], np.int32)
        after = np.array([] if self.eos is None else [self.eos], np.int32)
        around = len(before) + len(after)
        sizes = np.array([len(ids) + around for ids in encoded], np.int32)
        stretches = [stretch for ids in encoded for stretch in (before, ids, after)]
        flat = np.concatenate(stretches, dtype=np.int32, casting="unsafe") if stretches else np.empty(0, np.int32)
        return [(flat, sizes)]

    def _masked(self, documents: list[Document]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Three aligned columns: ids, attention mask (ones), labels (-100 outside the loss, and on BOS)."""
        firsts = iter(self.tokenizer.encode_arrays([document[0].text for document in documents]))
        later = [segment.text for document in documents for segment in document[1:]]
        rest = iter(self.tokenizer.encode_continuation(later))
        ids: list[np.ndarray] = []
        masks: list[np.ndarray] = []
        sizes = []
        for document in documents:
            before = [] if self.bos is None else [self.bos]
            ids.append(np.array(before, np.int32))
            masks.append(np.zeros(len(before), bool))
            size = len(before)
            for i, segment in enumerate(document):
                tokens = next(firsts) if i == 0 else next(rest)
                if segment.eos and self.eos is not None:
                    tokens = np.append(tokens, self.eos)
                ids.append(tokens)
                masks.append(np.full(len(tokens), segment.in_loss))
                size += len(tokens)
            sizes.append(size)
        flat = np.concatenate(ids, dtype=np.int32, casting="unsafe") if ids else np.empty(0, np.int32)
        keep = np.concatenate(masks) if masks else np.empty(0, bool)
        lengths = np.array(sizes, np.int32)
        labels = np.where(keep, flat, np.int32(-100)).astype(np.int32)
        return [(flat, lengths), (np.ones_like(flat), lengths), (labels, lengths)]


def _check_unicode(text: str) -> None:
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        if 0xDC80 <= code <= 0xDCFF:  # how the CSV reader passes a foreign byte on
            raise UnusableRecordError(f"invalid UTF-8 (byte 0x{code - 0xDC00:02x})") from error
        raise UnusableRecordError(f"lone surrogate U+{code:04X}") from error


def map_in_order(
    encode: Callable[[list[NumberedRecord]], EncodedChunk], chunks: Iterable[list[NumberedRecord]], *, workers: int
) -> Iterator[EncodedChunk]:
    """Results of the chunks in their order; at most `workers` + 2 chunks are in memory."""
    pool = ThreadPoolExecutor(workers, thread_name_prefix="tokenise")
    waiting: deque[Future[EncodedChunk]] = deque()
    try:
        for chunk in chunks:
            waiting.append(pool.submit(encode, chunk))
            if len(waiting) > workers + 1:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
