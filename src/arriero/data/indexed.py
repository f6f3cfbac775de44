"""Megatron's indexed data set, version 1: PREFIX.bin holds the tokens back to back, PREFIX.idx their places.

    offset       type      content                                    (little-endian, nothing aligned)
    0            9 bytes   MMIDIDX\\0\\0
    9            u64       version, 1
    17           u8        dtype code
    18           u64       S, number of sequences
    26           u64       D, number of document boundaries = documents + 1
    34           i32[S]    tokens in each sequence
    34 + 4S      i64[S]    byte offset of each sequence in .bin
    34 + 12S     i64[D]    first sequence of each document, then S

One document is one sequence in everything that `prepare` writes.
"""

from __future__ import annotations

import hashlib
import os
import struct
from pathlib import Path

import numpy as np

from arriero.common.errors import UserError
from arriero.common.files import os_error_text
from arriero.common.text import escape
from arriero.data.output import create_file

MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")  # 34 bytes
# Codes 6 and 7 are float64 and float32, exchanged between Megatron's eras; token ids are never floats.
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}
PREPARE_AGAIN = "prepare the data set again"
_CHUNK = 1 << 20  # entries of the index copied at a time


def best_dtype(vocab_size: int) -> np.dtype:
    """uint16 under 65,500 entries, else int32: the threshold is Megatron's, exactly."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


def bin_path(prefix: str | Path) -> Path:
    """PREFIX.bin."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    """PREFIX.idx."""
    return Path(f"{prefix}.idx")


class OutOfVocabularyError(UserError):
    """A token id that the model has no row for."""


class IndexedDataset:
    """Reads PREFIX.bin and PREFIX.idx through memory maps, written by any program.

    Attributes:
        sizes: int32 [sequences], tokens in each sequence.
        starts: int64 [sequences], offset of each sequence in `tokens`, in elements.
        documents: int64 [documents + 1], first sequence of each document.
        tokens: flat array of the whole .bin, in its own dtype.

    Raises:
        UserError: a missing or foreign file, or an index that does not fit its .bin.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix, self._name = str(prefix), escape(prefix)
        idx, data = idx_path(prefix), bin_path(prefix)
        for path in (idx, data):
            if not os.path.isfile(path):  # a directory or a pipe is no data set, and an impossible name none either
                fix = "give the prefix that `arriero prepare` printed"
                raise UserError(f"no data set at {self._name}: {escape(path)} is missing", fix)
        try:
            length = data.stat().st_size
            self._read_index(idx)
            # A memory map of nothing is an error; an empty array is what a set without tokens has.
            whole = length // self.dtype.itemsize
            self.tokens = (
                np.asarray(np.memmap(data, self.dtype, "r", shape=(whole,))) if whole else np.empty(0, self.dtype)
            )
        except OSError as error:
            raise UserError(
                f"{self._name}: cannot be read ({os_error_text(error)})", "look at the files' permissions"
            ) from None
        self._check(length)
        self.starts = self.pointers // self.dtype.itemsize

    def _read_index(self, idx: Path) -> None:
        """Maps the index, once its header fits its length."""
        size, name = idx.stat().st_size, f"{self._name}.idx"
        if size < _HEADER.size:
            raise UserError(f"{name} is {size} bytes long: not an index", PREPARE_AGAIN)
        with idx.open("rb") as file:
            magic, version, code, sequences, boundaries = _HEADER.unpack(file.read(_HEADER.size))
        if magic != MAGIC or version != 1:
            raise UserError(f"{name} is not a Megatron index of version 1", PREPARE_AGAIN)
        if code not in DTYPES:
            raise UserError(f"{name}: dtype code {code} holds no token ids", f"known codes: {sorted(DTYPES)}")
        need = _HEADER.size + 12 * sequences + 8 * boundaries
        if size not in (need, need + sequences):  # one byte a sequence more in multimodal sets: not read
            raise UserError(f"{name} is {size} bytes long, its header asks for {need}", PREPARE_AGAIN)
        self.dtype = np.dtype(DTYPES[code]).newbyteorder("<")
        raw = np.memmap(idx, mode="r", dtype=np.uint8)
        at = _HEADER.size
        self.sizes = np.frombuffer(raw, "<i4", sequences, at)
        self.pointers = np.frombuffer(raw, "<i8", sequences, at + 4 * sequences)
        self.documents = np.frombuffer(raw, "<i8", boundaries, at + 12 * sequences)

    def _check(self, length: int) -> None:
        """Every sequence lies inside .bin, and they do not overlap: one pass over the index, without the tokens.

        Raises:
            UserError: names the sequence, or the document.
        """
        width, tokens = self.dtype.itemsize, 0
        for first in range(0, len(self.sizes), _CHUNK):
            sizes = self.sizes[first : first + _CHUNK].astype(np.int64)
            pointers = self.pointers[first : first + _CHUNK]
            # A sum of pointer and size could overflow; `length - size` cannot.
            bad = (sizes < 0) | (pointers < 0) | (pointers % width != 0) | (pointers > length - sizes * width)
            if bad.any():
                i = int(np.flatnonzero(bad)[0])
                raise UserError(
                    f"{self._name}.idx: sequence {first + i} has {int(sizes[i])} tokens from byte {int(pointers[i])}, "
                    f"but {self._name}.bin has {length} bytes",
                    "one of the two files is cut short or belongs to another set: prepare it again",
                )
            tokens += int(sizes.sum())
        if tokens * width > length:  # an index of some KB must not become an order of some GB
            reason = (
                f"its sequences have {tokens} tokens together, {self._name}.bin has {length // width}: they overlap"
            )
            raise UserError(f"{self._name}.idx: {reason}", PREPARE_AGAIN)
        docs, last = self.documents, len(self.sizes)
        if len(docs) == 0 or docs[0] != 0 or docs[-1] != last or not self._rises(docs):
            raise UserError(f"{self._name}.idx: the document boundaries do not run from 0 to {last}", PREPARE_AGAIN)

    @staticmethod
    def _rises(docs: np.ndarray) -> bool:
        """Whether no boundary lies before the one ahead of it; compared, for a difference could overflow."""
        return not any(
            bool((docs[i + 1 : i + 1 + _CHUNK] < docs[i : i + _CHUNK][: len(docs) - i - 1]).any())
            for i in range(0, len(docs) - 1, _CHUNK)
        )

    def check_ids(
        self, vocab_size: int | None, *, first: int = 0, end: int | None = None, ignored: int | None = None,
        whose: str = "the model's",
    ) -> None:  # fmt: skip
        """Looks for ids that are not in 0 to vocab_size - 1, about 1 GB/s.

        Args:
            vocab_size: rows of the model; None where it is not known: then ids below 0 alone are looked for.
            first, end: the part of `tokens` to look at; all of it by default.
            ignored: a value that is none and may stand there, such as the label of a token that carries no loss.
            whose: vocabulary it is, for the message.

        Raises:
            OutsideVocabulary: for the first one; names the file and the place in it.
        """
        stop = len(self.tokens) if end is None else end
        most = 1 << 62 if vocab_size is None else vocab_size
        entries = "ids count from 0" if vocab_size is None else f"{whose} vocabulary has {vocab_size} entries"
        for at in range(first, stop, _CHUNK):
            part = self.tokens[at : min(at + _CHUNK, stop)]
            if int(part.max()) < most and (self.dtype.kind == "u" or int(part.min()) >= 0):
                continue
            outside = (part < 0) | (part >= most)
            if ignored is not None:
                outside &= part != ignored
            if outside.any():
                i = int(np.flatnonzero(outside)[0])
                place = f"token {at + i}, at byte {(at + i) * self.dtype.itemsize}"
                raise OutOfVocabularyError(
                    f"{self._name}.bin holds token id {int(part[i])}, {entries} ({place})",
                    "prepare the text with the model's own tokenizer",
                )

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, i: int) -> np.ndarray:
        start = int(self.starts[i])
        return self.tokens[start : start + int(self.sizes[i])]


class IndexedWriter:
    """Writes PREFIX.bin and PREFIX.idx in constant memory: lengths go to a scratch file until the end.

    The final names appear only on `close()`; `abort()` leaves nothing. Also a context manager.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype) -> None:
        self.prefix = str(prefix)
        self.dtype = np.dtype(dtype)
        self.sequences = self.documents = self.tokens = 0
        self._hash = hashlib.sha256()
        Path(self.prefix).parent.mkdir(parents=True, exist_ok=True)
        self._parts = {n: Path(f"{self.prefix}.{n}.partial") for n in ("bin", "idx", "sizes", "documents")}
        self._bin = create_file(self._parts["bin"])
        self._sizes = create_file(self._parts["sizes"])
        self._docs = create_file(self._parts["documents"])
        self._docs.write(struct.pack("<q", 0))

    def add(self, ids: np.ndarray | list[int]) -> None:
        """Appends one sequence to the current document."""
        self.add_sequences(np.asarray(ids), np.array([len(ids)], np.int32))

    def end_document(self) -> None:
        """Ends the current document (it may be empty)."""
        self._docs.write(struct.pack("<q", self.sequences))
        self.documents += 1

    def add_documents(self, flat: np.ndarray, sizes: np.ndarray) -> None:
        """Appends many documents of one sequence each: `flat` holds their tokens back to back."""
        first = self.sequences + 1
        self.add_sequences(flat, sizes)
        self._docs.write(np.arange(first, self.sequences + 1, dtype="<i8").tobytes())
        self.documents += len(sizes)

    def add_sequences(self, flat: np.ndarray, sizes: np.ndarray) -> None:
        """Appends many sequences to the current document."""
        payload = flat.astype(self.dtype.newbyteorder("<"), copy=False).tobytes()
        self._bin.write(payload)
        self._hash.update(payload)
        self._sizes.write(sizes.astype("<i4", copy=False).tobytes())
        self.sequences += len(sizes)
        self.tokens += len(flat)

    def finish(self) -> dict[str, object]:
        """Completes the temporary files, flushed to disk; returns counts and the SHA-256 of both files."""
        for file in (self._bin, self._sizes, self._docs):
            file.flush()
            os.fsync(file.fileno())
            file.close()
        index_hash = self._write_index()
        self._parts["sizes"].unlink()
        self._parts["documents"].unlink()
        return {
            "dtype": self.dtype.name,
            "sequences": self.sequences,
            "documents": self.documents,
            "tokens": self.tokens,
            "bin_bytes": self.tokens * self.dtype.itemsize,
            "bin_sha256": self._hash.hexdigest(),
            "idx_sha256": index_hash,
        }

    def _write_index(self) -> str:
        digest = hashlib.sha256()
        with create_file(self._parts["idx"]) as out:

            def put(raw: bytes) -> None:
                out.write(raw)
                digest.update(raw)

            put(_HEADER.pack(MAGIC, 1, CODES[self.dtype], self.sequences, self.documents + 1))
            with self._parts["sizes"].open("rb") as file:
                while raw := file.read(4 * _CHUNK):
                    put(raw)
                file.seek(0)
                start = 0
                while raw := file.read(4 * _CHUNK):
                    sizes = np.frombuffer(raw, "<i4").astype("<i8") * self.dtype.itemsize
                    ends = np.cumsum(sizes) + start
                    put((ends - sizes).astype("<i8").tobytes())
                    start = int(ends[-1])
            with self._parts["documents"].open("rb") as file:
                while raw := file.read(8 * _CHUNK):
                    put(raw)
            out.flush()
            os.fsync(out.fileno())
        return digest.hexdigest()

    def publish(self) -> None:
        """Gives the finished files their names; .idx last, since a reader looks for it first."""
        os.replace(self._parts["bin"], bin_path(self.prefix))
        os.replace(self._parts["idx"], idx_path(self.prefix))

    def close(self) -> dict[str, object]:
        """Finishes and publishes; returns what `finish` does."""
        summary = self.finish()
        self.publish()
        return summary

    def abort(self) -> None:
        """Removes everything written so far."""
        for file in (self._bin, self._sizes, self._docs):
            file.close()
        for path in self._parts.values():
            path.unlink(missing_ok=True)

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()
