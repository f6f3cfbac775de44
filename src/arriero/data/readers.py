"""Input files to records, in constant memory.

Every reader yields `(number, record)`: the number counts lines (or records, where a file has no lines) from 1; the
record is a dictionary, or a `MalformedRecord` with the reason why it is none. An error after which the rest of a file
cannot be read is a UserError.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from arriero.common.errors import UserError
from arriero.data.columns import read_columns
from arriero.data.inputs import KINDS, MAX_RECORD_BYTES, TrackRead, ignore_progress, open_input
from arriero.data.json_stream import MalformedRecord, NumberedRecords, json_records, parse_line


class ReadOptions(NamedTuple):
    """How a file is read.

    Attributes:
        columns: the columns that are needed, where a file can be read by column; None for all.
        per: what a text file's record is: line, paragraph or file.
        track: takes a function that returns the fraction of the file that has been read, from 0 to 1.
    """

    columns: tuple[str, ...] | None = None
    per: str = "line"
    track: TrackRead = ignore_progress


def _lines(path: Path, track: TrackRead) -> Iterator[tuple[int, bytes]]:
    """Numbered lines without their line ends; a UTF-8 byte order mark at the start is dropped."""
    with open_input(path, track) as file:
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


def _abbreviate_bytes(raw: bytes) -> str:
    return raw[:2000].decode("utf-8", "backslashreplace")


def _text(path: Path, options: ReadOptions) -> NumberedRecords:
    """A record {"text": ...} for each line, paragraph (blank lines between) or file. Blank lines are no records."""
    per = options.per
    first, lines, size = 1, list[bytes](), 0

    def flush() -> Iterator[tuple[int, dict[str, Any] | MalformedRecord]]:
        raw = b"\n".join(lines)
        lines.clear()
        if raw.strip():
            try:
                yield first, {"text": raw.decode("utf-8")}
            except UnicodeDecodeError as error:
                yield (
                    first,
                    MalformedRecord(f"invalid UTF-8 ({error.reason} at byte {error.start})", _abbreviate_bytes(raw)),
                )

    for number, line in _lines(path, options.track):
        if per != "file" and not line.strip():
            yield from flush()
            continue
        if not lines:
            first = number
            size = 0
        lines.append(line)
        size += len(line)
        if size > MAX_RECORD_BYTES:
            raise UserError(f"{path}: has a record of more than {MAX_RECORD_BYTES:,} bytes", "cut it into records")
        if per == "line":
            yield from flush()
    yield from flush()


def _jsonl(path: Path, options: ReadOptions) -> NumberedRecords:
    for number, line in _lines(path, options.track):
        if line.strip():
            yield number, parse_line(line)


def _json(path: Path, options: ReadOptions) -> NumberedRecords:
    return _jsonl(path, options) if (found := json_records(path, options.track)) is None else found


def _csv(path: Path, options: ReadOptions) -> NumberedRecords:
    csv.field_size_limit(MAX_RECORD_BYTES)
    with open_input(path, options.track) as raw:
        # Bytes that are not UTF-8 come through as lone surrogates, which the next stage refuses record by record.
        file = io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape", newline="")
        rows = csv.reader(iter(lambda: _csv_line(file, path), ""), strict=True)
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
                wrong = MalformedRecord(f"{len(row)} columns, not {len(header)}", ",".join(row)[:2000])
                yield line, dict(zip(header, row, strict=True)) if len(row) == len(header) else wrong
            line = rows.line_num + 1


def _csv_line(file: io.TextIOWrapper, path: Path) -> str:
    line = file.readline(MAX_RECORD_BYTES + 1)
    if len(line) > MAX_RECORD_BYTES:
        raise UserError(f"{path}: has a line of more than {MAX_RECORD_BYTES:,} bytes", "cut it into records")
    return line


READERS: dict[str, Callable[[Path, ReadOptions], NumberedRecords]] = {
    "text": _text,
    "jsonl": _jsonl,
    "json": _json,
    "csv": _csv,
    "parquet": lambda path, options: read_columns(path, "parquet", options.columns, options.track),
    "arrow": lambda path, options: read_columns(path, "arrow", options.columns, options.track),
}
"""How each kind of file is read; `register_reader` adds one."""


def register_reader(
    kind: str, read: Callable[[Path, ReadOptions], NumberedRecords], *, suffixes: tuple[str, ...]
) -> None:
    """Adds a kind of input file: files whose names end in one of `suffixes` (such as ".warc") are read by `read`.

    `read` yields a number and a record for each record of the file, or a MalformedRecord; see `read_records`.
    """
    READERS[kind] = read
    KINDS.update(dict.fromkeys(suffixes, kind))


def read_records(
    path: Path,
    kind: str,
    *,
    columns: tuple[str, ...] | None = None,
    per: str = "line",
    track: TrackRead = ignore_progress,
) -> NumberedRecords:
    """Records of one file.

    Args:
        path: the file.
        kind: one of READERS, as `find_inputs` found it.
        columns, per, track: see `ReadOptions`.

    Raises:
        UserError: the file, or the rest of it, cannot be read.
    """
    try:
        yield from READERS[kind](path, ReadOptions(columns, per, track))
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
