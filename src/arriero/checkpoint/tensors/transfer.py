"""The loop that copies weights: read rows, check, cast, write them to every file that needs them.

`weights` are the model's tensors under Hugging Face's names. A chunk of whole rows of one of them is read once (from
several files where the source is sharded by columns) and written to every file that holds a part of these rows before
the next chunk is read. Peak memory is the chunks in flight, whatever the model's size.
"""

from __future__ import annotations

import os
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

from arriero.checkpoint.tensors.stream import CHUNK_BYTES, ITEMSIZE, Bytes, TensorView, buffer, matrix_shape
from arriero.checkpoint.tensors.values import cast, is_finite, partial_fingerprint
from arriero.common.errors import UserError

THREADS = 3  # more than the cores would need: some wait for the disk


@dataclass(frozen=True)
class WriteOp:
    """Writes a rectangle of tensor `name` to byte `offset` of a file, row after row."""

    name: str
    row: int
    rows: int
    column: int
    columns: int
    offset: int
    step: int = 1  # 0 repeats row `row`: vocabulary padding


@dataclass
class OutputFile:
    """A file to write: its size, the bytes known beforehand (headers), and the writes that fill the rest."""

    path: Path
    size: int
    blobs: list[tuple[int, bytes]] = field(default_factory=list)
    writes: list[WriteOp] = field(default_factory=list)


def transfer(
    weights: Mapping[str, TensorView],
    files: Sequence[OutputFile],
    *,
    dtype: str | None = None,
    advance: Callable[[int], None] | None = None,
    reopen: Callable[[], Mapping[str, TensorView]] | None = None,
) -> tuple[dict[str, int], dict[str, int]]:
    """Writes `files` from the weights, without a final fsync: `new_directory` does it.

    Args:
        weights: the model under Hugging Face names.
        files: what to write; parents exist.
        dtype: dtype of everything written; None keeps each tensor's own. Puts count in this dtype's bytes.
        advance: called with the bytes read since the last call, for a progress bar.
        reopen: opens what is written under Hugging Face names, once the headers are in place. Each tensor is then read
            back through it shortly after it was written, while it is still in memory.

    Returns:
        The fingerprint of every tensor as written (see `fingerprint`), and as read back (empty without `reopen`).

    Raises:
        UserError: a value is NaN or infinite, or does not fit `dtype`; a source file ends early.
    """
    routes: dict[str, list[tuple[int, WriteOp]]] = {name: [] for name in weights}
    locks: dict[int, threading.Lock] = defaultdict(
        threading.Lock
    )  # cheaper than the kernel's own lock on a file, which spins
    descriptors = [os.open(file.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666) for file in files]
    try:
        for fd, file in zip(descriptors, files, strict=True):
            os.truncate(fd, file.size)
            for offset, blob in file.blobs:
                write_at(fd, memoryview(blob), offset)
            for put in file.writes:
                routes[put.name].append((fd, put))

        def move(name: str, row: int, rows: int) -> int:
            chunk = read_chunk(name, weights[name], row, rows, dtype)
            for fd, put in routes[name]:
                with locks[fd]:
                    _write_part(chunk, first=row, size=ITEMSIZE[dtype or weights[name].dtype], fd=fd, put=put)
            if advance:
                advance(rows * matrix_shape(weights[name].shape)[1] * ITEMSIZE[weights[name].dtype])
            return partial_fingerprint(chunk, row)

        written = reopen() if reopen else None
        return _run(
            weights, move, (lambda *chunk: _reread(written, *chunk)) if written is not None else None, descriptors
        )
    finally:
        for fd in descriptors:
            os.close(fd)


def _reread(written: Mapping[str, TensorView], name: str, row: int, rows: int) -> int:
    return partial_fingerprint(_read_rows(written[name], row, rows), row) if name in written else 0


def chunks(name: str, tensor: TensorView) -> Iterator[tuple[str, int, int]]:
    """(name, first row, rows) of a tensor's chunks, in order."""
    total, columns = matrix_shape(tensor.shape)
    step = max(1, CHUNK_BYTES // max(1, columns * ITEMSIZE[tensor.dtype]))
    for row in range(0, total, step):
        yield name, row, min(step, total - row)


Work = Callable[[str, int, int], int]
READ_BACK_LAG = 4  # tensors between writing one and reading it back, so that threads rarely wait for each other


def _run(
    weights: Mapping[str, TensorView], first: Work, second: Work | None = None, sync: Sequence[int] = ()
) -> tuple[dict[str, int], dict[str, int]]:
    """Does `first` for all chunks on a few threads, and `second` for a tensor's when `first` is done with it.

    Meanwhile `sync` is written back, so that the disk never idles until a final sync. Returns what both return, summed
    by name.
    """
    names = list(weights)
    parts = {name: list(chunks(name, weights[name])) for name in names}
    jobs: list[tuple[bool, tuple[str, int, int]]] = []
    for i in range(len(names) + READ_BACK_LAG):
        jobs += [(False, chunk) for chunk in (parts[names[i]] if i < len(names) else [])]
        if second and i >= READ_BACK_LAG:
            jobs += [(True, chunk) for chunk in parts[names[i - READ_BACK_LAG]]]
    sums = (dict.fromkeys(names, 0), dict.fromkeys(names, 0))
    left = {name: len(parts[name]) for name in names}
    queue, changed, stop = iter(jobs), threading.Condition(), threading.Event()

    def work() -> None:
        while not stop.is_set():
            with changed:
                again, chunk = next(queue, (False, ("", 0, 0)))
                while again and left[chunk[0]] and not stop.is_set():
                    changed.wait(0.1)
            if not chunk[0] or stop.is_set():
                return
            value = second(*chunk) if again and second else first(*chunk)
            with changed:
                sums[again][chunk[0]] = (sums[again][chunk[0]] + value) % 2**64
                left[chunk[0]] -= not again
                changed.notify_all()

    def flush() -> None:
        while sync and not stop.wait(0.2):
            for fd in sync:
                os.fdatasync(fd)

    with ThreadPoolExecutor(THREADS + 1) as pool:
        flusher = pool.submit(flush)
        workers = [pool.submit(work) for _ in range(THREADS)]
        try:
            wait(workers, return_when=FIRST_EXCEPTION)
        finally:  # also on Ctrl-C; a worker ends without an error only when the queue is empty
            if not all(worker.done() and not worker.exception() for worker in workers):
                stop.set()
        wait(workers)
        stop.set()
        for future in (*workers, flusher):
            future.result()
    return sums[0], sums[1] if second else {}


def read_chunk(name: str, tensor: TensorView, row: int, rows: int, dtype: str | None = None) -> Bytes:
    """Rows [row, row + rows) as bytes, cast to `dtype`, checked to be finite.

    The bytes lie in a buffer of the calling thread, which its next call overwrites.
    """
    chunk = _read_rows(tensor, row, rows)
    if not is_finite(chunk, tensor.dtype):
        where = tensor.slices[0].source.label
        raise UserError(f"{where}: {name} holds NaN or infinity", "take an earlier checkpoint")
    if dtype and dtype != tensor.dtype:
        chunk = cast(chunk, tensor.dtype, dtype)
        if not is_finite(chunk, dtype):
            raise UserError(f"{name} holds values too large for {dtype}", "keep the dtype, or use float32 or bfloat16")
    return chunk


def _read_rows(tensor: TensorView, row: int, rows: int) -> Bytes:
    chunk = buffer("chunk", rows, matrix_shape(tensor.shape)[1] * ITEMSIZE[tensor.dtype])
    tensor.read_window(row, 0, chunk)
    return chunk


def _write_part(chunk: Bytes, *, first: int, size: int, fd: int, put: WriteOp) -> None:
    """Writes the part of a chunk (rows from `first` on, elements of `size` bytes) that belongs to one put."""
    left, right = put.column * size, (put.column + put.columns) * size
    width = right - left
    if put.step == 0:
        if first <= put.row < first + chunk.shape[0]:
            line = chunk[put.row - first, left:right].tobytes()
            write_at(fd, memoryview(line * put.rows), put.offset)
        return
    start, stop = max(first, put.row), min(first + chunk.shape[0], put.row + put.rows)
    if start < stop:
        part = chunk[start - first : stop - first, left:right]
        if not part.flags.c_contiguous:
            stage = buffer("stage", *part.shape)
            stage[:] = part
            part = stage
        write_at(fd, part.reshape(-1).data, put.offset + (start - put.row) * width)


def write_at(fd: int, data: memoryview, offset: int) -> None:
    """Writes all of `data` at `offset`."""
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], offset + done)


def read_fingerprints(
    weights: Mapping[str, TensorView], *, advance: Callable[[int], None] | None = None
) -> dict[str, int]:
    """Reads every tensor once and returns its fingerprint; raises UserError on NaN, infinity or a short file."""

    def work(name: str, row: int, rows: int) -> int:
        chunk = read_chunk(name, weights[name], row, rows)
        if advance:
            advance(chunk.nbytes)
        return partial_fingerprint(chunk, row)

    return _run(weights, work)[0]
