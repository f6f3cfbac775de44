"""Opening, writing and locking files, for all that writes into a run directory.

A run directory may come from an untrusted source. Only regular files are opened: a pipe would block for ever, and a
symbolic link would let a write change a file outside the run. A file that is replaced is written under a temporary
name and renamed, so that there is never half of it, and a link in its place is replaced, not followed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from arriero.common.checkpoint_names import enclosing_checkpoint, inside_checkpoints_of_run
from arriero.common.errors import UserError
from arriero.common.text import escape

APPEND = os.O_WRONLY | os.O_APPEND | os.O_CREAT
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def open_regular(path: str | os.PathLike[str], flags: int = os.O_RDONLY, *, follow: bool = False) -> int:
    """Opens a regular file and returns its descriptor, which programs that are started do not inherit.

    Args:
        path: the file.
        flags: of os.open, such as os.O_RDONLY, APPEND, or os.O_RDWR | os.O_CREAT.
        follow: whether a symbolic link as the last part of the path is followed: for inputs that a user has named,
            not for files of a run directory.

    Raises:
        OSError: it cannot be opened, or is a directory, pipe, socket, device or, without `follow`, a symbolic link;
            `filename` and `strerror` say which.
    """
    flags |= os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW)
    try:
        handle = os.open(path, flags, 0o644)
    except OSError as error:
        if error.errno == errno.ELOOP and not follow:
            raise OSError(errno.ELOOP, "is a symbolic link, which is not followed here", str(path)) from None
        if error.errno == errno.ENXIO:
            raise OSError(errno.ENXIO, "is not a regular file", str(path)) from None
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "is not a regular file", str(path))
    return handle


def write_atomic(path: Path, data: bytes | str | Iterable[bytes], *, durable: bool = False) -> None:
    """Replaces a file at once: all of it, or what was there before.

    Args:
        path: the file; a symbolic link in its place is replaced, not followed.
        data: its content, or pieces of it; text is written as UTF-8.
        durable: wait until the disk has it.

    Raises:
        OSError: it cannot be written; nothing has changed then, and no temporary file is left.
    """
    beside = path.with_name(f".{path.name[:200]}.{os.getpid()}.tmp")
    with contextlib.suppress(FileNotFoundError):
        beside.unlink()
    handle = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        with open(handle, "wb") as file:
            if isinstance(data, str):
                data = data.encode("utf-8")
            file.writelines([data] if isinstance(data, bytes) else data)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(beside, path)
        if durable:
            sync(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise


def sync(path: Path) -> None:
    """Waits until the disk has a file's bytes or a directory's entries."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(directory: Path) -> None:
    """Waits until the disk has a directory and all in it."""
    for folder, _, names in os.walk(directory):
        for name in (*names, "."):
            sync(Path(folder, name))


def try_lock(handle: int) -> bool:
    """Locks an open file (flock) until it is closed or its process ends; False if another one holds the lock.

    Raises:
        OSError: the file system has no locks.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def new_directory(path: Path, *, need_bytes: int = 0) -> Iterator[Path]:
    """Yields a temporary directory beside `path` that becomes `path` at the end, or is removed on any error.

    The directory of a process that was killed has no lock and is used again.

    Raises:
        UserError: `path` exists and is not empty, or the disk has less than `need_bytes` free.
    """
    path = Path(os.path.abspath(path))
    if path.is_symlink() or (path.exists() and (not path.is_dir() or any(path.iterdir()))):
        raise UserError(f"{escape(path)}: already exists", "name a new directory, or remove this one first")
    make_directory(path.parent, "name a directory that can be made")
    free, fix = shutil.disk_usage(path.parent).free, "make room, or write to another disk"
    if need_bytes > free:
        raise UserError(f"{path.parent}: {need_bytes / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free", fix)
    partial = path.with_name(path.name + ".partial")
    partial.mkdir(exist_ok=True)
    lock = os.open(partial, os.O_RDONLY)
    try:
        if not try_lock(lock):
            fix = "wait for it, or name another directory"
            raise UserError(f"{partial}: another process is writing there", fix)
        for entry in partial.iterdir():
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        try:
            yield partial
            sync_tree(partial)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, OSError) and error.errno in DISK_FULL:
                raise UserError(f"{path.parent}: the disk is full", fix) from None
            raise
        if path.exists():
            path.rmdir()
        partial.rename(path)
        sync(path.parent)
    finally:
        os.close(lock)


def make_directory(path: Path, fix: str, *, follow: bool = True) -> None:
    """Makes a directory and its parents, where they are not there yet.

    Args:
        path: the directory.
        fix: what the user should do if it cannot be made.
        follow: whether the directory itself may be a symbolic link: yes for one that the user has named, no for one
            inside a run directory.

    Raises:
        UserError: it cannot be made, is no directory, is a link that is not to be followed, or lies in a committed
            checkpoint, into which nothing is written.
    """
    if holder := enclosing_checkpoint(path):
        raise UserError(f"{escape(path)}: is or lies in the checkpoint {escape(holder)}, which is only read", fix)
    if holder := inside_checkpoints_of_run(path):
        raise UserError(f"{escape(path)}: lies in {escape(holder)}, where only a run's checkpoints belong", fix)
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not follow and path.is_symlink():
            raise UserError(f"{escape(path)}: is a symbolic link, which is not followed here", fix)
    except (OSError, ValueError) as error:  # ValueError: NUL or a lone surrogate in the name
        raise UserError(f"{escape(path)}: {os_error_text(error)}", fix) from None


def os_error_text(error: OSError | ValueError) -> str:
    """The system's own message, without the path."""
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    return f"no file can have this name ({escape(error)})"
