"""The lines of an untrusted log: read in pieces, each of a bounded length, without colours."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from arriero.common.errors import UserError
from arriero.common.files import open_regular, os_error_text
from arriero.common.text import escape

MAX_LINE = 1 << 20
"""Bytes of one line at most: a step's line has a few hundred, a wide table's header some ten thousand."""
_CHUNK = 1 << 16
_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\^_=>])")
"""What a terminal obeys: colours and cursor movements (CSI), titles and links (OSC), two-character escapes."""


@dataclass(frozen=True)
class TextLine:
    """One line of a text file."""

    number: int
    """From 1, as an editor counts; pieces between carriage returns, as a progress bar prints them, share a number."""
    text: str
    """Without its end and without a terminal's escape sequences; at most MAX_LINE bytes."""
    whole: bool
    """False for a last line without an end, which a kill may have cut off."""
    cut: bool
    """True if it was longer than MAX_LINE; the rest is not in `text`."""


@contextmanager
def open_text(path: Path) -> Iterator[BinaryIO]:
    """Opens a file that the user has named for reading.

    Raises:
        UserError: it cannot be opened or read, or is no regular file.
    """
    fix = "check the path and its permissions"
    try:
        handle = open_regular(path, follow=True)
    except FileNotFoundError:
        raise UserError(f"{escape(path)}: no such file", fix) from None
    except (OSError, ValueError) as error:  # ValueError: NUL or a lone surrogate in the name
        raise UserError(f"{escape(path)}: cannot be read ({os_error_text(error)})", fix) from None
    with open(handle, "rb") as file:
        try:
            yield file
        except OSError as error:
            raise UserError(f"{escape(path)}: cannot be read ({os_error_text(error)})", fix) from None


def read_lines(file: BinaryIO) -> Iterator[TextLine]:
    """The lines of `file` in order; memory does not grow with the file or with a line.

    A line ends at a line feed or at a carriage return. Bytes that are not UTF-8 become U+FFFD.
    """
    number, held, passing = 1, b"", False  # passing: over the rest of a line that was too long
    while chunk := file.read(_CHUNK):
        feeds = chunk.split(b"\n")
        for i, feed in enumerate(feeds):
            pieces = feed.split(b"\r")
            for j, piece in enumerate(pieces):
                room = MAX_LINE - len(held)
                held = b"" if passing else held + piece[:room]
                if len(piece) > room and not passing:
                    yield TextLine(number, _clean(held), False, True)
                    held, passing = b"", True
                if j < len(pieces) - 1 or i < len(feeds) - 1:
                    if not passing:
                        yield TextLine(number, _clean(held), True, False)
                    held, passing = b"", False
            number += i < len(feeds) - 1
    if held:
        yield TextLine(number, _clean(held), False, False)


def _clean(raw: bytes) -> str:
    text = raw.decode("utf-8", "replace").removeprefix("\ufeff")
    return _ESCAPES.sub("", text) if "\x1b" in text else text
