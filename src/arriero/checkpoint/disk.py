"""Every change that a checkpoint makes on the disk, one function each, so that any one of them can be made to fail.

`ARRIERO_FAULT=WHAT@N[:RANK]` makes the N-th of them (from 1) in the process RANK (0) fail: `kill` ends the process,
`torn` ends it in the middle of what it writes, and the name of an error, such as ENOSPC or EIO, raises it.
`WHAT@N+` fails it and all that follow. Only the first start of a job is hurt, so that a restart can be watched.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import itertools
import os
import shutil
import signal
from pathlib import Path

from arriero.common.errors import UserError
from arriero.weights import transfer

FAULT = "ARRIERO_FAULT"
_count = itertools.count(1)


def _fault() -> str:
    """What shall go wrong in this operation; empty in life."""
    if FAULT not in os.environ or os.environ.get("ARRIERO_ROUND", "0") != "0":
        return ""
    what, _, where = os.environ[FAULT].partition("@")
    number, _, rank = where.partition(":")
    if not number.rstrip("+").isdigit() or not (what in ("kill", "torn") or hasattr(errno, what)):
        raise UserError(f"{FAULT} is {os.environ[FAULT]!r}", "give kill@N, torn@N or ENOSPC@N, with :RANK or without")
    now, due = next(_count), int(number.rstrip("+"))
    mine = os.environ.get("RANK", "0") == (rank or "0")
    return what if mine and (now == due or (now > due and number.endswith("+"))) else ""


def _fail(what: str, path: str) -> None:
    if what in ("kill", "torn"):
        os.kill(os.getpid(), signal.SIGKILL)
    if what:
        code = getattr(errno, what)
        raise OSError(code, os.strerror(code), path)


def write_at(handle: int, data: memoryview, offset: int, path: Path) -> None:
    """Writes all of `data` at a byte of an open file."""
    if what := _fault():
        if what == "torn":
            os.pwrite(handle, data[: len(data) // 2], offset)
        _fail(what, str(path))
    try:
        transfer.write_at(handle, data, offset)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None  # the kernel knows a number, the user a name


def start_writeback(handle: int, offset: int, length: int) -> None:
    """Lets the disk begin with what was just written, while more is prepared; without it all waits for the fsync.

    Linux's sync_file_range with SYNC_FILE_RANGE_WRITE: half of the time of a save, measured. Elsewhere nothing happens.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).sync_file_range(handle, ctypes.c_int64(offset), ctypes.c_int64(length), 2)


def write_file(path: Path, data: bytes) -> None:
    """Writes a small file and waits until the disk has it."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        write_at(handle, memoryview(data), 0, path)
        sync(handle, path)
    finally:
        os.close(handle)


def sync(handle: int, path: Path) -> None:
    """Waits until the disk has what was written."""
    _fail(_fault(), str(path))
    os.fsync(handle)


def sync_directory(path: Path) -> None:
    """Waits until the disk has the directory's entries."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        sync(handle, path)
    finally:
        os.close(handle)


def rename(source: Path, target: Path) -> None:
    """Renames a file or a directory at once."""
    _fail(_fault(), str(source))
    os.rename(source, target)


def make_directory(path: Path) -> None:
    """Makes a directory that is not there yet."""
    _fail(_fault(), str(path))
    path.mkdir(parents=True)


def remove(path: Path) -> None:
    """Removes a file."""
    _fail(_fault(), str(path))
    path.unlink()


def remove_tree(path: Path) -> None:
    """Removes a directory and all in it; nothing happens if there is none."""
    _fail(_fault(), str(path))
    shutil.rmtree(path, ignore_errors=True)
