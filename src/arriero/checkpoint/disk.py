"""Every change that a checkpoint makes on the disk, one function each, so that tests can make any one of them fail.

`before_operation` is called before each: tests, and the processes that `arriero torture` starts, replace it by a
function that raises an OSError or ends the process.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from arriero.checkpoint.tensors import transfer

CREATE_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
"""Flags of os.open for a file that must not exist yet; no link is followed."""


def no_fault(path: Path, write_half: Callable[[], object] | None = None) -> None:
    """Called before an operation on `path`; `write_half`, of a write, writes the first half of its data."""


before_operation: Callable[[Path, Callable[[], object] | None], None] = no_fault


def write_at(handle: int, data: memoryview, offset: int, path: Path) -> None:
    """Writes all of `data` at a byte of an open file."""
    before_operation(path, lambda: os.pwrite(handle, data[: len(data) // 2], offset))
    try:
        transfer.write_at(handle, data, offset)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None  # the kernel gives no name


def start_writeback(handle: int, offset: int, length: int) -> None:
    """Starts writing to the disk what was just written to the page cache; without it all waits for the fsync.

    Linux's sync_file_range with SYNC_FILE_RANGE_WRITE: half of the time of a save, measured. Elsewhere nothing happens.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).sync_file_range(handle, ctypes.c_int64(offset), ctypes.c_int64(length), 2)


def write_file(path: Path, data: bytes) -> None:
    """Writes a small file that is not there yet and waits until the disk has it."""
    handle = os.open(path, CREATE_NEW, 0o644)
    try:
        write_at(handle, memoryview(data), 0, path)
        sync(handle, path)
    finally:
        os.close(handle)


def sync(handle: int, path: Path) -> None:
    """Waits until the disk has what was written."""
    before_operation(path, None)
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
    before_operation(source, None)
    os.rename(source, target)


def make_directory(path: Path) -> None:
    """Makes a directory that is not there yet."""
    before_operation(path, None)
    path.mkdir(parents=True)


def remove(path: Path) -> None:
    """Removes a file."""
    before_operation(path, None)
    path.unlink()


def remove_tree(path: Path) -> None:
    """Removes a directory and all in it; nothing happens if there is none."""
    before_operation(path, None)
    shutil.rmtree(path, ignore_errors=True)
