"""Input files to records, in constant memory.

Every reader yields `(number, record)`: the number counts lines (or records, where a file has no lines) from 1; the
record is a dictionary, or a `Bad` that says why it is none. What makes the rest of a file unreadable is a UserError.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from arriero.common.errors import UserError
from arriero.data.inputs import BLOCK, MAX_RECORD_BYTES, Meter, no_meter, open_input, seekable
from arriero.data.json_stream import Bad, Numbered, json_records, parse_line


def _lines(path: Path, meter: Meter) -> Iterator[tuple[int, bytes]]:
    """Numbered lines without their line ends; a UTF-8 byte order mark at the start is dropped."""
    with open_input(path, meter) as file:
        first = _line(file, path)
        if first.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise UserError(f"{path} is UTF-16", f"convert it: iconv -f utf-16 -t utf-8 {path}")
        if first:
            yield 1, first.removeprefix(codecs.BOM_UTF8).rstrip(b"\r\n")
        for number, line in enumerate(iter(lambda: _line(file, path), b""), 2):
            yield number, line.rstrip(b"\r\n")


def _line(file: BinaryIO, path: Path) -> bytes:
    """The next line. Raises UserError for one that would fill the memory, as a few KB of gzip can hold."""
    line = file.readline(MAX_RECORD_BYTES + 1)
    if len(line) > MAX_RECORD_BYTES:
        raise UserError(f"{path}: has a line of more than {MAX_RECORD_BYTES:,} bytes", "cut it into records")
    return line


def _show(raw: bytes) -> str:
    return raw[:2000].decode("utf-8", "backslashreplace")


def _text(path: Path, per: str, meter: Meter) -> Numbered:
    """A record {"text": ...} for each line, paragraph (blank lines between) or file. Blank lines are no records."""
    first, held, size = 1, list[bytes](), 0

    def give() -> Iterator[tuple[int, dict[str, Any] | Bad]]:
        raw = b"\n".join(held)
        held.clear()
        if raw.strip():
            try:
                yield first, {"text": raw.decode("utf-8")}
            except UnicodeDecodeError as error:
                yield first, Bad(f"invalid UTF-8 ({error.reason} at byte {error.start})", _show(raw))

    for number, line in _lines(path, meter):
        if per != "file" and not line.strip():
            yield from give()
            continue
        if not held:
            first = number
            size = 0
        held.append(line)
        size += len(line)
        if size > MAX_RECORD_BYTES:
            raise UserError(f"{path}: has a record of more than {MAX_RECORD_BYTES:,} bytes", "cut it into records")
        if per == "line":
            yield from give()
    yield from give()


def _jsonl(path: Path, meter: Meter) -> Numbered:
    for number, line in _lines(path, meter):
        if line.strip():
            yield number, parse_line(line)


def _json(path: Path, meter: Meter) -> Numbered:
    return _jsonl(path, meter) if (found := json_records(path, meter)) is None else found


def _csv(path: Path, meter: Meter) -> Numbered:
    csv.field_size_limit(MAX_RECORD_BYTES)
    with open_input(path, meter) as raw:
        # Bytes that are not UTF-8 come through as lone surrogates, which the next stage refuses record by record.
        file = io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape", newline="")
        rows = csv.reader(iter(lambda: _piece(file, path), ""), strict=True)
        header = next(rows, [])
        line = rows.line_num + 1
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                raise UserError(
                    f"{path}: line {rows.line_num}: {error}", "repair the quoting; the rest cannot be read"
                ) from error
            if row:
                wrong = Bad(f"{len(row)} columns, not {len(header)}", ",".join(row)[:2000])
                yield line, dict(zip(header, row, strict=True)) if len(row) == len(header) else wrong
            line = rows.line_num + 1


def _piece(file: io.TextIOWrapper, path: Path) -> str:
    line = file.readline(MAX_RECORD_BYTES + 1)
    if len(line) > MAX_RECORD_BYTES:
        raise UserError(f"{path}: has a line of more than {MAX_RECORD_BYTES:,} bytes", "cut it into records")
    return line


def _rows(table: Any, first: int) -> Numbered:
    """Records of an arrow record batch; strings that are not UTF-8 spoil their own record only."""
    try:
        for i, record in enumerate(table.to_pylist()):
            yield first + i, record
    except UnicodeDecodeError:
        for i in range(table.num_rows):
            try:
                yield first + i, table.slice(i, 1).to_pylist()[0]
            except UnicodeDecodeError as error:
                yield first + i, Bad(f"invalid UTF-8 ({error.reason} at byte {error.start})", "")


def _parquet(path: Path, columns: tuple[str, ...] | None, meter: Meter) -> Numbered:
    import pyarrow.parquet

    with seekable(path) as source, pyarrow.parquet.ParquetFile(source, pre_buffer=False, buffer_size=BLOCK) as file:
        known = file.schema_arrow.names
        number, total = 1, max(1, file.metadata.num_rows)
        meter(lambda: number / total)
        wanted = [c for c in columns if c in known] if columns is not None else None
        for batch in file.iter_batches(batch_size=512, columns=wanted, use_threads=False):
            yield from _rows(batch, number)
            number += batch.num_rows


def _validate(batch: Any) -> None:
    """Checks every offset and length of a batch of mapped memory: arrow believes them, and would read beyond its file.

    Raises:
        ValueError: one leads outside. Strings that are not UTF-8 are let through: they spoil their own record only.
    """
    import pyarrow

    raw = {pyarrow.string(): pyarrow.binary(), pyarrow.large_string(): pyarrow.large_binary()}
    for column in batch.columns:
        (column.view(raw[column.type]) if column.type in raw else column).validate(full=True)


def _arrow(path: Path, columns: tuple[str, ...] | None, meter: Meter) -> Numbered:
    """Arrow's file format (also feather version 2) and its stream format."""
    import pyarrow.ipc

    with seekable(path) as source, pyarrow.memory_map(source) as mapped:
        head = mapped.read(6)
        mapped.seek(0)
        reader = pyarrow.ipc.open_file(mapped) if head == b"ARROW1" else pyarrow.ipc.open_stream(mapped)
        batches = (reader.get_batch(i) for i in range(reader.num_record_batches)) if head == b"ARROW1" else reader
        number, size = 1, max(1, mapped.size())
        meter(lambda: 1.0 if mapped.closed else mapped.tell() / size)
        for whole in batches:
            _validate(whole)
            batch = whole.select([c for c in columns if c in whole.schema.names]) if columns is not None else whole
            for at in range(0, batch.num_rows, 512):
                yield from _rows(batch.slice(at, 512), number + at)
            number += whole.num_rows


def read_records(
    path: Path,
    kind: str,
    *,
    columns: tuple[str, ...] | None = None,
    per: str = "line",
    meter: Meter = no_meter,
) -> Numbered:
    """Records of one file.

    Args:
        path: the file.
        kind: as `find_inputs` found it.
        columns: the columns that are needed, where a file can be read by column; None for all.
        per: what a text file's record is: line, paragraph or file.
        meter: is given a function that says how much of the file has been read, from 0 to 1.

    Raises:
        UserError: the file, or the rest of it, cannot be read.
    """
    try:
        if kind == "text":
            yield from _text(path, per, meter)
        elif kind == "jsonl":
            yield from _jsonl(path, meter)
        elif kind == "json":
            yield from _json(path, meter)
        elif kind == "csv":
            yield from _csv(path, meter)
        elif kind == "parquet":
            yield from _parquet(path, columns, meter)
        else:
            yield from _arrow(path, columns, meter)
    except UserError:
        raise
    except csv.Error as error:
        raise UserError(f"{path}: {error}", "repair the file") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: the compressed file is damaged or cut short ({error})", "copy it again") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: invalid UTF-8 ({error.reason})", "convert the file to UTF-8") from error
    except OSError as error:  # pyarrow's I/O errors are OSError too
        raise UserError(
            f"{path}: cannot be read ({str(error).splitlines()[0]})", "the file is damaged or cut short"
        ) from error
    except ValueError as error:  # pyarrow.lib.ArrowInvalid
        raise UserError(f"{path}: not a whole {kind} file ({str(error).splitlines()[0]})", "copy it again") from error
