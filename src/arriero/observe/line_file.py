"""Files of a run that grow line by line: log.txt, metrics.jsonl, events.jsonl.

None of them can stop a run. While one cannot be written (a full disk, something else in its place) its lines are kept
in memory and written, in order, once that is possible again; one warning is logged, and a message when it is over.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path

from arriero.common.files import open_regular, os_error_text, write_atomic
from arriero.common.text import escape

MAX_BUFFERED_BYTES = 64 << 20
"""Bytes of one file that are kept in memory: about 90,000 steps of metrics. Lines beyond it are lost, and counted."""
DISK_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE}
"""Errors that are the disk's, so that one warning is enough for all files on it."""


def to_stderr(text: str) -> None:
    """Prints a line on the terminal, where there is one."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


class WriteErrors:
    """Which files of a run cannot be written now; logs one warning, and a message once they can be written again."""

    def __init__(self, log: Callable[[str], None] = to_stderr) -> None:
        self._log = log
        self._failing: dict[Path, int | None] = {}
        self._lost = 0

    def failed(self, path: Path, error: OSError) -> None:
        """A file could not be written."""
        if path in self._failing:
            return
        known = error.errno in DISK_ERRNOS and error.errno in self._failing.values()
        self._failing[path] = error.errno
        if not known:
            until = f"wait in memory until they can be written (at most {MAX_BUFFERED_BYTES >> 20} MiB a file)"
            self._log(
                f"arriero: WARNING: {escape(path)}: {os_error_text(error)}; the run goes on, and its lines {until}"
            )

    def is_failing(self, path: Path) -> bool:
        """Whether a warning about this file was logged."""
        return path in self._failing

    def recovered(self, path: Path, lost: int) -> None:
        """All pending lines were written; `lost` lines had found no room in memory."""
        if path in self._failing:
            del self._failing[path]
            self._lost += lost
            if not self._failing:
                count = f"{self._lost:,} lines are lost" if self._lost else "no line is lost"
                self._log(f"arriero: {escape(path.parent)}: its files are written again, and {count}")
                self._lost = 0

    def not_written(self, path: Path, lines: int) -> None:
        """The run ends, and so many lines were never written."""
        self._log(f"arriero: WARNING: {escape(path)}: {lines:,} lines could not be written")


class LineFile:
    """One such file. Lines are passed to the operating system at once: a kill loses none that was written."""

    def __init__(
        self, path: Path, errors: WriteErrors, *, whole_lines: bool = True, max_bytes: int = MAX_BUFFERED_BYTES
    ) -> None:
        """Opens the file or, where that is impossible now, does so later.

        Args:
            path: the file; an incomplete last line, as a kill leaves it, is removed or, where not `whole_lines`, ended.
            errors: logs what cannot be written.
            whole_lines: whether an incomplete line is useless.
            max_bytes: bytes that are kept in memory while the file cannot be written.
        """
        self.path, self._errors, self._cut_partial, self._max_bytes = path, errors, whole_lines, max_bytes
        self.pending: deque[bytes] = deque()
        """Lines that are not written yet."""
        self._bytes = self._lost = 0
        self._handle = -1
        self.flush()

    def write(self, line: bytes) -> None:
        """Appends a line (without its end), or several."""
        self.pending.append(line + b"\n")
        self._bytes += len(line) + 1
        if self._bytes > self._max_bytes:
            self._bytes -= len(self.pending.pop())
            self._lost += 1
        self.flush()

    def flush(self) -> bool:
        """Writes the pending lines, as far as possible; returns whether all of them were."""
        try:
            if self._handle < 0:
                self._handle = self._open()
            while self.pending:
                self._append(self.pending[0])
                self._bytes -= len(self.pending.popleft())
        except OSError as error:
            self.release()
            self._errors.failed(self.path, error)
            return False
        self._errors.recovered(self.path, self._lost)
        self._lost = 0
        return True

    def discard(self, unwanted: Callable[[bytes], bool]) -> None:
        """Removes pending lines."""
        self.pending = deque(line for line in self.pending if not unwanted(line))
        self._bytes = sum(map(len, self.pending))

    def release(self) -> None:
        """Closes the file; the next line opens it again."""
        if self._handle >= 0:
            with contextlib.suppress(OSError):
                os.close(self._handle)
        self._handle = -1

    def close(self) -> None:
        """Writes the pending lines, logs how many cannot be written, and closes the file."""
        if not self.flush():
            self._errors.not_written(self.path, len(self.pending) + self._lost)
        self.release()

    def _append(self, line: bytes) -> None:
        """Writes all of a line or, as far as the file can be truncated again, nothing."""
        start, done = os.fstat(self._handle).st_size, 0
        try:
            while done < len(line):
                done += os.write(self._handle, line[done:])
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._handle, start)
            raise

    def _open(self) -> int:
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT
        handle = open_regular(self.path, flags)
        try:
            if (
                os.fstat(handle).st_nlink > 1
            ):  # another name of the file, maybe not the run's: that one keeps its content
                os.close(handle)
                handle = -1
                with open(open_regular(self.path), "rb") as old:
                    write_atomic(self.path, iter(partial(old.read, 1 << 20), b""))
                handle = open_regular(self.path, flags)
            end = last_line_end(handle)
            size = os.fstat(handle).st_size
            if end < size and self._cut_partial:
                os.ftruncate(handle, end)
            elif end < size:
                os.write(handle, b"\n")
        except BaseException:
            if handle >= 0:
                os.close(handle)
            raise
        return handle


def last_line_end(handle: int, step: int = 1 << 16) -> int:
    """The byte behind the last line end of an open file; 0 where it has none."""
    at = os.fstat(handle).st_size
    while at > 0:
        start = max(0, at - step)
        found = os.pread(handle, at - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        at = start
    return 0
