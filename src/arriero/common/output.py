"""Standard output and standard error that cannot be written: no reader of the pipe, a full device, a closed descriptor.

A command whose results are files continues without them; one whose result is the output ends.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TextIO, cast

from arriero.common.errors import UserError

_NO_READER_ERRORS = {errno.EPIPE, errno.ECONNRESET}
"""Errors of a write to a pipe or socket without a reader."""
_NO_READER = "nobody reads it any more"
_NAMES = {1: "standard output", 2: "standard error"}


class OutputClosed(BaseException):
    """Standard output has no reader, for a command whose result is the output (`arriero inspect ... | head -1`).

    Not an Exception, so that no handler on the way mistakes it for a failure of its own work.
    """


class Stream:
    """A text stream whose failed writes end the command (`required`), or are dropped and reported once."""

    def __init__(self, inner: TextIO, number: int, *, required: bool) -> None:
        self.inner, self.number, self.required = inner, number, required
        self.problem = ""
        """Why a write failed; empty while none has."""

    def write(self, text: str) -> int:
        """Writes a text; returns its length, whether it was written or dropped.

        Raises:
            OutputClosed: nobody reads a required stream.
            UserError: a required stream cannot be written for another reason.
        """
        self._try(lambda: self.inner.write(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Writes texts one by one; raises as `write` does."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flushes the buffer; raises as `write` does."""
        self._try(self.inner.flush)

    def _try(self, work: Any) -> None:
        if self.problem and self.required:
            return  # raised before; a stream that is not required is retried, since a disk may have room again
        try:
            work()
        except (OSError, ValueError) as error:  # ValueError: the stream is closed
            first, self.problem = not self.problem, _reason(error)
            if self.required:
                raise OutputClosed if self.problem == _NO_READER else self.error() from None
            if first:
                report_write_failure(self.number, self.problem)

    def error(self) -> UserError:
        """The problem, for the user."""
        fix = "make room where it leads to, or send it elsewhere"
        return UserError(f"{_NAMES[self.number]} cannot be written: {self.problem}", fix)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def _reason(error: OSError | ValueError) -> str:
    if isinstance(error, OSError):
        return _NO_READER if error.errno in _NO_READER_ERRORS else error.strerror or type(error).__name__
    return "it is closed"


_write_failures: list[str] = []


def report_write_failure(number: int, problem: str) -> None:
    """Reports on the other stream that stream `number` (1 or 2) cannot be written; kept for `new_write_failures`."""
    text = f"{_NAMES[number]} cannot be written ({problem}); the work goes on without it"
    _write_failures.append(text)
    print(f"arriero: {text}", file=sys.stderr if number == 1 else sys.stdout, flush=True)


def new_write_failures() -> list[str]:
    """Write failures of this process since the last call, one line for each stream: for the log of a run.

    A run may write nothing to standard error for hours, so whether it still has a reader is checked here.
    """
    stream = sys.stderr
    if isinstance(stream, Stream) and not stream.problem and _has_no_reader(2):
        stream.problem = _NO_READER
        report_write_failure(2, stream.problem)
    found, _write_failures[:] = list(_write_failures), []
    return found


def _has_no_reader(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, 0)
    with contextlib.suppress(OSError):
        return any(event & select.POLLERR for _, event in poll.poll(0))
    return False


@contextlib.contextmanager
def guarded_output(*, required: bool) -> Iterator[None]:
    """Guards standard output and standard error while a command runs; what was printed must be flushed within.

    Args:
        required: whether standard output is the command's result; standard error never is.
    """
    closed = [number for number in (0, 1, 2) if _open_if_closed(number)]
    before = [sys.stdout, sys.stderr]
    streams = [
        Stream(inner or open(os.devnull, "w"), number, required=required and number == 1)  # noqa: SIM115
        for number, inner in ((1, sys.stdout), (2, sys.stderr))
    ]
    sys.stdout, sys.stderr = (cast(TextIO, stream) for stream in streams)
    for stream in streams:
        with contextlib.suppress(AttributeError, ValueError, OSError):
            stream.inner.reconfigure(errors="backslashreplace")  # type: ignore[attr-defined] # a path may hold any byte
        if stream.number in closed and not required:
            stream.problem = "it is closed"
            report_write_failure(stream.number, stream.problem)
    try:
        yield
    finally:  # a stream that failed stays guarded: Python flushes both once more at exit
        sys.stdout, sys.stderr = (
            cast(TextIO, stream) if stream.problem else old for stream, old in zip(streams, before, strict=True)
        )


def _open_if_closed(number: int) -> bool:
    """Opens a closed descriptor on /dev/null, so that no file of the command gets its number; whether it was closed."""
    try:
        os.fstat(number)
    except OSError:
        os.open(os.devnull, os.O_RDWR)  # the lowest free number
        return True
    return False


def write_stderr(text: str) -> None:
    """Writes a line to standard error without Python's buffers: safe in a signal handler and beside other threads."""
    with contextlib.suppress(OSError):
        os.write(2, f"arriero: {text}\n".encode("utf-8", "backslashreplace"))
