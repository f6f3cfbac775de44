"""JSON records: from one line, and from a file of arrays and objects, read piece by piece.

The values are decoded by the standard library's own scanner. ijson is not used: its yajl turns a lone surrogate into
`?` without a word, refuses the NaN that Python's own writer makes, and has no bound on nesting.
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
from arriero.data.inputs import BLOCK, MAX_RECORD_BYTES, Meter, open_input

LONGEST_LITERAL = 16  # characters: `-Infinity` has 9, an escaped surrogate pair 12
_BLANK = re.compile(r"[ \t\r\n]*")
_IN_LINE = re.compile(r"[ \t\r]*")
_BETWEEN = re.compile(r"[ \t\r\n\ufeff]*")  # between the values of joined files there may be a byte order mark
_repr = reprlib.Repr()
_repr.maxlevel, _repr.maxdict, _repr.maxlist, _repr.maxstring, _repr.maxother = 4, 20, 20, 500, 200


class Bad(NamedTuple):
    """A record that could not be read."""

    reason: str
    raw: str


Numbered = Iterator[tuple[int, dict[str, Any] | Bad]]


class _Repeated(dict[str, Any]):
    """An object in which a key stands twice with different values; `json` would keep the last one only."""

    key = ""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        for key, value in pairs:
            if found[key] != value:
                found = _Repeated(found)
                found.key = key
                break
    return found


_decoder = json.JSONDecoder(object_pairs_hook=_object)


def brief(value: Any) -> str:
    """At most 2,000 characters of a value of any size, that can be encoded as UTF-8."""
    text = value[:2000] if isinstance(value, str) else _repr.repr(value)[:2000]
    return text.encode("utf-8", "backslashreplace").decode()


def record_of(value: Any) -> dict[str, Any] | Bad:
    """A decoded value as a record."""
    if not isinstance(value, dict):
        return Bad(f"not an object but {type(value).__name__}", brief(value))
    for one in (value, *(turn for column in value.values() if isinstance(column, list) for turn in column)):
        if isinstance(one, _Repeated):
            return Bad(f"key {one.key[:80]!r} stands twice, with different values", brief(value))
    return value


def parse_line(raw: bytes) -> dict[str, Any] | Bad:
    """The record of one JSON line."""
    try:
        return record_of(_decoder.decode(raw.decode("utf-8-sig")))
    except UnicodeDecodeError as error:
        reason = f"invalid UTF-8 ({error.reason} at byte {error.start})"
    except (ValueError, RecursionError) as error:
        reason = f"broken JSON ({error})"
    return Bad(reason, raw[:2000].decode("utf-8", "backslashreplace"))


class _Text:
    """The text of a file, of which only what is not yet decoded is held.

    Bytes that are not UTF-8 become lone surrogates, which the next stage refuses record by record.
    """

    def __init__(self, path: Path, file: io.TextIOWrapper) -> None:
        self.path, self._file = path, file
        self.held, self.began, self.at, self._line, self._column = "", 0, 0, 1, 1  # `began`: where the last value does
        self._more, self._want = True, BLOCK
        self.records = 0

    def _fill(self) -> bool:
        """Reads on, each time twice as much until a value is whole: one huge value costs linear time."""
        self._line, self._column = self._position(self.at)
        piece = self._file.read(self._want)
        self._more, self._want = bool(piece), self._want * 2
        self.held, self.at = self.held[self.at :] + piece, 0
        if len(self.held) > MAX_RECORD_BYTES:
            large = f"{self.path}: record {self.records + 1} is larger than {MAX_RECORD_BYTES:,} bytes"
            raise UserError(large, "cut it into several records")
        return self._more

    def _position(self, at: int) -> tuple[int, int]:
        newlines = self.held.count("\n", 0, at)
        if newlines:
            return self._line + newlines, at - self.held.rfind("\n", 0, at)
        return self._line, self._column + at

    def wrong(self, problem: str, at: int | None = None) -> UserError:
        """The error that names a place, by default where the text is read on."""
        line, column = self._position(self.at if at is None else at)
        where = f"line {line}, column {column}, after record {self.records}"
        return UserError(f"{self.path}: {problem} ({where})", "repair the file; nothing was written")

    def peek(self, blank: re.Pattern[str] = _BLANK) -> str:
        """The next character that is not blank, which stays; empty at the end of the file."""
        while True:
            found = blank.match(self.held, self.at)
            assert found is not None
            self.at = found.end()
            if self.at < len(self.held):
                return self.held[self.at]
            self._want = BLOCK
            if not self._fill():
                return ""

    def value(self) -> Any:
        """Decodes the next value. Raises UserError with the place of what is wrong."""
        self._want = BLOCK
        while True:
            try:
                found, end = _decoder.raw_decode(self.held, self.at)
            except RecursionError:
                raise self.wrong("broken JSON: nested too deep") from None
            except json.JSONDecodeError as error:
                # What is wrong near the end of the text that is held may only be cut there.
                left = 0 if error.msg.startswith("Unterminated") else len(self.held) - error.pos
                if not (self._more and left <= LONGEST_LITERAL):
                    ended = left == 0 and not self._more
                    what = "ends within a value" if ended else "broken JSON"
                    raise self.wrong(f"{what}: {error.msg}", error.pos) from None
            except ValueError as error:  # a number of more digits than Python reads
                raise self.wrong(f"broken JSON: {error}") from None
            else:
                if end < len(self.held) or not self._more or self.held[end - 1] in '}]"':
                    self.began, self.at = self.at, end
                    return found
            self._fill()  # a number at the end may go on: `12` may be the start of `123`


def json_records(path: Path, meter: Meter) -> Numbered | None:
    """Records of a .json file: the elements of its arrays, and its objects outside of arrays, one after the other.

    Returns:
        None for a file of JSON lines: its first line is one whole object.
    """
    with open_input(path, meter) as raw:
        text = _open(path, raw)
        if text.peek(_BETWEEN) == "{":
            text.value()
            on_one_line = "\n" not in text.held[text.began : text.at]
            if on_one_line and text.peek(_IN_LINE) in ("", "\n"):
                return None
    return _stream(path, meter)


def _open(path: Path, raw: BinaryIO) -> _Text:
    if cast(io.BufferedReader, raw).peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        raise UserError(f"{path} is UTF-16", f"convert it: iconv -f utf-16 -t utf-8 {path}")
    file = io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape", newline="")
    return _Text(path, file)


def _stream(path: Path, meter: Meter) -> Numbered:
    with open_input(path, meter) as raw:
        text = _open(path, raw)
        while first := text.peek(_BETWEEN):
            if first == "[":
                text.at += 1
                yield from _array(text)
            elif first == "{":
                text.records += 1
                yield text.records, record_of(text.value())
            elif text.records == 0:
                raise text.wrong("is neither a JSON array nor JSON lines: it must begin with [ or {")
            else:
                raise text.wrong(f"{first!r} stands outside of an array")


def _array(text: _Text) -> Numbered:
    """The elements up to the closing bracket."""
    if text.peek() == "]":
        text.at += 1
        return
    while True:
        if not text.peek():
            raise text.wrong("ends within an array")
        value = text.value()
        text.records += 1
        yield text.records, record_of(value)
        sign = text.peek()
        if sign not in (",", "]"):
            raise text.wrong("ends within an array" if not sign else f"broken JSON: {sign!r} where , or ] is due")
        text.at += 1
        if sign == "]":
            return
