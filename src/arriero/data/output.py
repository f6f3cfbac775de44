"""What `prepare` writes: under names that can be files, into files of its own, never through what lies there."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from arriero.common.errors import UserError
from arriero.common.files import make_directory, open_regular, os_error_text
from arriero.common.ranges import path_problem
from arriero.common.text import escape

_FIX = "choose another --out"
OUTPUT_SUFFIXES = (
    ".manifest.json",
    ".manifest.json.partial",
    ".quarantine.jsonl",
    ".quarantine.jsonl.partial",
    ".lock",
)
DATASET_SUFFIXES = (".bin", ".idx", ".bin.partial", ".idx.partial", ".sizes.partial", ".documents.partial")


def check_output(out: str, names: Iterable[str]) -> None:
    """Refuses an --out whose files could not be written.

    Args:
        out: what all names begin with.
        names: of the data sets, which follow after `_`.

    Raises:
        UserError: names that no file can have, or something that is no file in the place of one.
    """
    if not out or out.endswith("/") or Path(out).name in ("", ".", ".."):
        raise UserError(f"--out {out!r} names no file", "give a path that the written names begin with: data/set")
    paths = [f"{out}{ending}" for ending in OUTPUT_SUFFIXES]
    paths += [f"{out}_{name}{ending}" for name in names for ending in DATASET_SUFFIXES]
    for path in paths:
        if wrong := path_problem(path):
            raise UserError(f"--out: a file that it names {wrong}", "choose a shorter --out")
    for path in paths:
        try:
            mode = os.lstat(path).st_mode
        except OSError:  # nothing there, or no way there, which `make_output_directory` reports
            continue
        if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
            raise UserError(f"{escape(path)}: is no file, and a file is to be written there", _FIX)


def make_output_directory(out: str) -> None:
    """Makes the directory of an --out. Raises UserError when it cannot be made."""
    make_directory(Path(out).parent, _FIX)


def create_file(path: Path) -> BinaryIO:
    """Opens a new file for writing, in the place of an earlier one or of a link, which is not followed.

    Raises:
        OSError: it cannot be made.
    """
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644), "wb")


@contextlib.contextmanager
def writing_output(out: str) -> Iterator[None]:
    """Makes the directory of OUT and holds OUT.lock, so that no other process writes the same names meanwhile.

    The lock ends with its process.

    Raises:
        UserError: another process holds it; or for every OSError inside the block, with the file's name.
    """
    make_output_directory(out)
    path = Path(f"{out}.lock")
    try:
        with open(open_regular(path, os.O_RDWR | os.O_CREAT), "wb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                fix = "wait for it, or choose another --out"
                raise UserError(f"another process is preparing {escape(out)}", fix) from error
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        name = escape(error.filename if error.filename is not None else out)
        raise UserError(
            f"{name}: {os_error_text(error)}", "correct that, or choose another --out; nothing was written"
        ) from error
