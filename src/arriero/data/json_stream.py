"""JSON records: from one line, and from a file of arrays and objects, read piece by piece.

The values are decoded by the standard library's own scanner. ijson is not used: its yajl turns a lone surrogate into
`?` silently, refuses the NaN that Python's own writer makes, and has no bound on nesting.
"""

from __future__ import annotations

import codecs
import io
import json
import re
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from arriero.common.errors import UserError
from arriero.data.inputs import BLOCK, MAX_RECORD_BYTES, TrackRead, open_input

LONGEST_LITERAL = 16  # characters: `-Infinity` has 9, an escaped surrogate pair 12
_BLANK = re.compile(r"[ \t\r\n]*")
_IN_LINE = re.compile(r"[ \t\r]*")
_BETWEEN = re.compile(r"[ \t\r\n\ufeff]*")  # between the values of joined files there may be a byte order mark
_repr = reprlib.Repr()
_repr.maxlevel, _repr.maxdict, _repr.maxlist, _repr.maxstring, _repr.maxother = 4, 20, 20, 500, 200


class MalformedRecord(NamedTuple):
    """A record that could not be read."""

    reason: str
    raw: str


NumberedRecords = Iterator[tuple[int, dict[str, Any] | MalformedRecord]]


class _ConflictingKeys(dict[str, Any]):
    """An object in which a key stands twice with different values; `json` would keep the last one only."""

    key = ""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        for key, value in pairs:
            if found[key] != value:
                found = _ConflictingKeys(found)
                found.key = key
                break
    return found


_decoder = json.JSONDecoder(object_pairs_hook=_object)


def abbreviate(value: Any) -> str:
    """At most 2,000 characters of a value of any size, that can be encoded as UTF-8."""
    text = value[:2000] if isinstance(value, str) else _repr.repr(value)[:2000]
    return text.encode("utf-8", "backslashreplace").decode()


def check_record(value: Any) -> dict[str, Any] | MalformedRecord:
    """A decoded value as a record."""
    if not isinstance(value, dict):
        return MalformedRecord(f"not an object but {type(value).__name__}", abbreviate(value))
    for one in (value, *(turn for column in value.values() if isinstance(column, list) for turn in column)):
        if isinstance(one, _ConflictingKeys):
            return MalformedRecord(f"key {one.key[:80]!r} stands twice, with different values", abbreviate(value))
    return value


def parse_line(raw: bytes) -> dict[str, Any] | MalformedRecord:
    """The record of one JSON line."""
    try:
        return check_record(_decoder.decode(raw.decode("utf-8-sig")))
    except UnicodeDecodeError as error:
        reason = f"invalid UTF-8 ({error.reason} at byte {error.start})"
    except (ValueError, RecursionError) as error:
        reason = f"broken JSON ({error})"
    return MalformedRecord(reason, raw[:2000].decode("utf-8", "backslashreplace"))


class _JsonBuffer:
    """The text of a file, of which only what is not yet decoded is kept in `buffer`.

    Bytes that are not UTF-8 become lone surrogates, which the next stage refuses record by record.
    """

    def __init__(self, path: Path, file: io.TextIOWrapper) -> None:
        self.path, self._file = path, file
        self.buffer, self.at = "", 0
        self.value_start = 0  # where the last value begins
        self._line, self._column = 1, 1
        self._more, self._read_size = True, BLOCK
        self.records = 0

    def _fill(self) -> bool:
        """Reads on, each time twice as much until a value is whole: one huge value costs linear time."""
        self._line, self._column = self._position(self.at)
        piece = self._file.read(self._read_size)
        self._more, self._read_size = bool(piece), self._read_size * 2
        self.buffer, self.at = self.buffer[self.at :] + piece, 0
        if len(self.buffer) > MAX_RECORD_BYTES:
            large = f"{self.path}: record {self.records + 1} is larger than {MAX_RECORD_BYTES:,} bytes"
            raise UserError(large, "cut it into several records")
        return self._more

    def _position(self, at: int) -> tuple[int, int]:
        newlines = self.buffer.count("\n", 0, at)
        if newlines:
            return self._line + newlines, at - self.buffer.rfind("\n", 0, at)
        return self._line, self._column + at

    def syntax_error(self, problem: str, at: int | None = None) -> UserError:
        """The error that names a place, by default the current one."""
        line, column = self._position(self.at if at is None else at)
        where = f"line {line}, column {column}, after record {self.records}"
        return UserError(f"{self.path}: {problem} ({where})", "repair the file; nothing was written")

    def peek(self, blank: re.Pattern[str] = _BLANK) -> str:
        """The next character that is not blank, which stays; empty at the end of the file."""
        while True:
            found = blank.match(self.buffer, self.at)
            assert found is not None
            self.at = found.end()
            if self.at < len(self.buffer):
                return self.buffer[self.at]
            self._read_size = BLOCK
            if not self._fill():
                return ""

    def value(self) -> Any:
        """Decodes the next value. Raises UserError that names the place of an error."""
        self._read_size = BLOCK
        while True:
            try:
                found, end = _decoder.raw_decode(self.buffer, self.at)
            except RecursionError:
                raise self.syntax_error("broken JSON: nested too deep") from None
            except json.JSONDecodeError as error:
                # An error near the end of the buffer may only mean that the value goes on behind it.
                left = 0 if error.msg.startswith("Unterminated") else len(self.buffer) - error.pos
                if not (self._more and left <= LONGEST_LITERAL):
                    ended = left == 0 and not self._more
                    what = "ends within a value" if ended else "broken JSON"
                    raise self.syntax_error(f"{what}: {error.msg}", error.pos) from None
            except ValueError as error:  # a number of more digits than Python reads
                raise self.syntax_error(f"broken JSON: {error}") from None
            else:
                if end < len(self.buffer) or not self._more or self.buffer[end - 1] in '}]"':
                    self.value_start, self.at = self.at, end
                    return found
            self._fill()  # a number at the end may go on: `12` may be the start of `123`


def json_records(path: Path, track: TrackRead) -> NumberedRecords | None:
    """Records of a .json file: the elements of its arrays, and its objects outside of arrays, one after the other.

    Returns:
        None for a file of JSON lines: its first line is one whole object.
    """
    with open_input(path, track) as raw:
        text = _open(path, raw)
        if text.peek(_BETWEEN) == "{":
            text.value()
            on_one_line = "\n" not in text.buffer[text.value_start : text.at]
            if on_one_line and text.peek(_IN_LINE) in ("", "\n"):
                return None
    return _stream(path, track)


def _open(path: Path, raw: BinaryIO) -> _JsonBuffer:
    if cast(io.BufferedReader, raw).peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        raise UserError(f"{path} is UTF-16", f"convert it: iconv -f utf-16 -t utf-8 {path}")
    file = io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape", newline="")
    return _JsonBuffer(path, file)


def _stream(path: Path, track: TrackRead) -> NumberedRecords:
    with open_input(path, track) as raw:
        text = _open(path, raw)
        while first := text.peek(_BETWEEN):
            if first == "[":
                text.at += 1
                yield from _array(text)
            elif first == "{":
                text.records += 1
                yield text.records, check_record(text.value())
            elif text.records == 0:
                raise text.syntax_error("is neither a JSON array nor JSON lines: it must begin with [ or {")
            else:
                raise text.syntax_error(f"{first!r} stands outside of an array")


def _array(text: _JsonBuffer) -> NumberedRecords:
    """The elements up to the closing bracket."""
    if text.peek() == "]":
        text.at += 1
        return
    while True:
        if not text.peek():
            raise text.syntax_error("ends within an array")
        value = text.value()
        text.records += 1
        yield text.records, check_record(value)
        sign = text.peek()
        if sign not in (",", "]"):
            raise text.syntax_error(
                "ends within an array" if not sign else f"broken JSON: {sign!r} where , or ] is due"
            )
        text.at += 1
        if sign == "]":
            return
