"""Reads one parquet or arrow file in a process of its own, whose memory is bounded.

A few hundred bytes of such a file may unpack to any size (dictionaries, shared prefixes, run lengths, views, compressed
pages), its metadata need not be true, and pyarrow has no bound and may end its process. So columns.py
starts this file as a program and reads the records from a pipe.
"""

from __future__ import annotations

import json
import marshal
import os
import resource
import struct
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from arriero.common.errors import UserError
from arriero.data.inputs import BLOCK, MAX_UNPACKED

MAX_ROWS = 512  # at max_rows in one piece
SLICE_BYTES = 8 << 20  # of text that is aimed at in one piece
MAX_ELEMENTS = 1 << 22  # of the lists of one piece: 100 MB of Python's objects at the least
FRAME = struct.Struct("<Q")
EXIT_REFUSED = 3  # exit code: the problem and its fix stand on stderr, as JSON
MIN_ROW_BYTES = 16  # bytes that a row counts at least, so that rows of nothing come to an end too


class Limits(NamedTuple):
    """What a file may take: bytes of memory while it is read, and bytes of text in all."""

    memory: int
    unpacked: int


def _text_bytes(value: Any) -> int:
    """About the bytes of a record's texts."""
    if isinstance(value, (str, bytes)):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_text_bytes, value.values()))
    return 8 + (sum(map(_text_bytes, value)) if isinstance(value, list) else 0)


def _marshallable(value: Any) -> Any:
    """A value as marshal writes it: those of other types are none that a format could use, and become their type."""
    if value is None or type(value) in (str, bytes, int, float, bool):
        return value
    if isinstance(value, dict):
        return {str(key): _marshallable(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_marshallable(one) for one in value]
    return (type(value).__name__,)


def _count_elements(array: Any) -> int:
    """How many values the lists of an array hold, at all depths: run lengths give any number of them for nothing."""
    import pyarrow

    kind = array.type
    if pyarrow.types.is_struct(kind):
        return sum(map(_count_elements, array.flatten()))
    if pyarrow.types.is_nested(kind) and hasattr(array, "flatten"):
        inside = array.flatten()
        return len(inside) + _count_elements(inside)
    return 0


def _slice_rows(batch: Any, at: int, count: int) -> list[Any]:
    """Rows as records; one whose text is not UTF-8 becomes a sentence with the error."""
    rows = batch.slice(at, count)
    if sum(map(_count_elements, rows.columns)) > MAX_ELEMENTS:
        raise MemoryError
    try:
        return rows.to_pylist()
    except UnicodeDecodeError as error:
        if count == 1:
            return [f"invalid UTF-8 ({error.reason} at byte {error.start})"]
        return [row for i in range(count) for row in _slice_rows(batch, at + i, 1)]


def _row_slices(batches: Iterator[Any], bounds: Limits, path: str) -> Iterator[list[Any]]:
    """Records in pieces of about PIECE_BYTES. Raises UserError when the file gives more than it may."""
    count, total = 1, 0
    for batch in batches:
        at = 0
        while at < batch.num_rows:
            count = min(count, batch.num_rows - at)
            try:
                rows = _slice_rows(batch, at, count)
            except MemoryError:
                if count == 1:
                    raise
                count = 1
                continue
            size = sum(map(_text_bytes, rows))
            total += size + MIN_ROW_BYTES * count
            if total > bounds.unpacked:
                raise UserError(f"{path}: unpacks to more than {bounds.unpacked:,} bytes", "do not trust this file")
            yield [_marshallable(row) for row in rows]
            at += count
            count = (
                min(2 * count, MAX_ROWS)
                if size < SLICE_BYTES // 4
                else max(1, count // 2)
                if size > SLICE_BYTES
                else count
            )


def _select_columns(names: list[str], columns: list[str] | None, path: str) -> list[str] | None:
    """The columns to read. Raises UserError when there is none, or one of them twice."""
    if columns is None:
        return None
    found = [name for name in columns if name in names]
    if not found:
        listed = ", ".join(names[:20])
        raise UserError(f"{path}: has no column {columns[0]!r}; it has {listed}", "check --format and --keys")
    for name in found:
        if names.count(name) > 1:
            raise UserError(f"{path}: has the column {name!r} {names.count(name)} times", "rename all but one")
    return found


def _parquet(path: str, source: str, columns: list[str] | None) -> tuple[Iterator[Any], Callable[[], float]]:
    import mmap

    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(source, pre_buffer=False, buffer_size=BLOCK, memory_map=False)
    meta, size = file.metadata, os.stat(source).st_size
    if meta.num_rows > MAX_UNPACKED * size + (1 << 26):
        raise UserError(f"{path}: {meta.num_rows:,} rows in {size:,} bytes", "do not trust this file")
    wanted = _select_columns(file.schema_arrow.names, columns, path)
    groups = [meta.row_group(i) for i in range(meta.num_row_groups)]
    # In a file that was joined from two, the last one's footer counts, and its places lead into the first one.
    ends = [
        column.data_page_offset + column.total_compressed_size
        for group in groups
        for column in map(group.column, range(group.num_columns))
    ]
    with open(source, "rb") as raw, mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ) as whole:
        if whole.find(b"PAR1PAR1", min(max(ends, default=0), size), size - 8 - meta.serialized_size) >= 0:
            raise UserError(f"{path}: two parquet files are joined in it", "cut them apart again: only one can be read")
    done = 0

    def batches() -> Iterator[Any]:
        nonlocal done
        for i, group in enumerate(groups):
            average = group.total_byte_size // max(1, group.num_rows) + 1
            rows = max(1, min(MAX_ROWS, 4 * SLICE_BYTES // average))
            for batch in file.iter_batches(batch_size=rows, row_groups=[i], columns=wanted, use_threads=False):
                yield batch
                done += batch.num_rows

    return batches(), lambda: done / max(1, meta.num_rows)


def _validate(batch: Any) -> None:
    """Checks every offset and length of a batch of mapped memory: arrow believes them, and would read beyond its file.

    Raises:
        ValueError: one leads outside. Strings that are not UTF-8 pass: their own record alone is rejected later.
    """
    import pyarrow

    raw = {pyarrow.string(): pyarrow.binary(), pyarrow.large_string(): pyarrow.large_binary()}
    for column in batch.columns:
        (column.view(raw[column.type]) if column.type in raw else column).validate(full=True)


_MAGIC, _END = b"ARROW1", b"\xff\xff\xff\xff\0\0\0\0"


def _arrow(path: str, source: str, columns: list[str] | None) -> tuple[Iterator[Any], Callable[[], float]]:
    """Arrow's file format (also feather version 2) and its stream format, of which several may be joined."""
    import pyarrow.ipc

    mapped = pyarrow.memory_map(source)
    size = mapped.size()
    head = mapped.read(8)
    max_rows = MAX_UNPACKED * size + (1 << 26)

    def checked(batch: Any) -> Any:
        if batch.num_rows > max_rows:
            raise UserError(f"{path}: {batch.num_rows:,} rows in {size:,} bytes", "do not trust this file")
        wanted = _select_columns(batch.schema.names, columns, path)
        chosen = batch if wanted is None else batch.select(wanted)
        _validate(chosen)
        return chosen

    def of_file() -> Iterator[Any]:
        _check_footer(mapped, path)
        reader = pyarrow.ipc.open_file(mapped)
        for i in range(reader.num_record_batches):
            yield checked(reader.get_batch(i))

    def of_streams() -> Iterator[Any]:
        at = 0
        while at < size:
            mapped.seek(at)
            yield from map(checked, pyarrow.ipc.open_stream(mapped))
            at = mapped.tell()
            if head[:4] == _END[:4] and mapped.read_at(8, at - 8) != _END:  # files of before 2019 have another mark
                raise UserError(f"{path}: ends without arrow's end mark: it may be cut short", "copy it again")

    mapped.seek(0)
    return (of_file() if head.startswith(_MAGIC) else of_streams()), lambda: mapped.tell() / max(1, size)


def _check_footer(mapped: Any, path: str) -> None:
    """Refuses a file that was joined from two: the last one's footer counts, and leads into the first one."""
    import pyarrow.ipc

    mapped.seek(8)
    reader = pyarrow.ipc.MessageReader.open_stream(mapped)
    try:
        for _ in reader:
            pass
    except (pyarrow.ArrowInvalid, OSError):
        return  # a writer without an end mark: this cannot be checked
    end = mapped.size() - 10
    length = struct.unpack("<i", mapped.read_at(4, end))[0] if end > 0 else 0
    if end - length - mapped.tell() > 64:
        raise UserError(f"{path}: more is in it than its footer lists: two files joined?", "cut them apart again")


def main(arguments: list[str]) -> int:
    """The program: PATH SOURCE KIND COLUMNS BOUNDS, the last two as JSON; frames to stdout.

    A frame is its length and, marshalled, the share of the file that has been read and a list of records.
    """
    path, source, kind = arguments[:3]
    columns, bounds = json.loads(arguments[3]), Limits(*json.loads(arguments[4]))
    out = os.fdopen(os.dup(1), "wb", buffering=BLOCK)
    os.dup2(2, 1)  # what a library prints does not get between the frames
    try:
        batches, fraction = (_parquet if kind == "parquet" else _arrow)(path, source, columns)
        for rows in _row_slices(batches, bounds, path):
            frame = marshal.dumps((fraction(), rows))
            out.write(FRAME.pack(len(frame)))
            out.write(frame)
        out.write(FRAME.pack(0))
        out.flush()
    except BrokenPipeError:
        return 0
    except UserError as error:
        problem, fix = error.problem, error.fix
    except MemoryError:  # also pyarrow's
        problem = f"{path}: a record, or a page or batch of it, unpacks to more than {bounds.memory >> 20:,} MiB"
        fix = "do not trust this file; if it is your own, write it in smaller pieces, or as JSON lines"
    except OSError as error:  # pyarrow's I/O errors are OSError too
        problem = f"{path}: cannot be read ({str(error).splitlines()[0]})"
        fix = "the file is damaged or cut short"
    except (ValueError, TypeError, NotImplementedError) as error:  # ValueError: pyarrow.lib.ArrowInvalid
        problem, fix = f"{path}: not a whole {kind} file ({str(error).splitlines()[0]})", "copy it again"
    else:
        return 0
    out.flush()
    sys.stderr.write(f"\n{json.dumps([problem, fix])}")
    return EXIT_REFUSED


if __name__ == "__main__":
    memory = json.loads(sys.argv[5])[0]
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    sys.stderr.flush()
    code = main(sys.argv[1:])
    sys.stderr.flush()
    os._exit(code)  # without the destructors of whatever a hostile file has left behind
