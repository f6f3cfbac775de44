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
from arriero.data.columns import read_columns
from arriero.data.inputs import MAX_RECORD_BYTES, Meter, no_meter, open_input
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
        else:
            yield from read_columns(path, kind, columns, meter)
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
