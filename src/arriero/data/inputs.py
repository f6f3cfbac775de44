"""The files that `prepare` is given: which there are, of which kind, and their bytes, whatever they are packed with."""

from __future__ import annotations

import contextlib
import glob
import gzip
import io
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from arriero.common.errors import UserError
from arriero.common.text import escape
from arriero.common.untrusted import require_inside

KINDS = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".txt": "text",
}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
BLOCK = 1 << 20
SCRATCH_DIRECTORY: str | None = (
    None  # where compressed parquet and arrow files are unpacked; None is the system's choice
)
MAX_RECORD_BYTES = 1 << 30  # of text; the largest documents that were seen have a fifth of it
MAX_UNPACKED = 200  # times the packed size, where a compressed file must be unpacked to a scratch file, and 1 GiB


def ignore_progress(fraction: Callable[[], float]) -> None:
    """Ignores how much has been read."""


TrackRead = Callable[[Callable[[], float]], None]


def kind_of(path: Path) -> str | None:
    """The kind of a file by its name (a compression's suffix is looked through), or None."""
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return KINDS.get(suffixes[-1]) if suffixes else None


def find_inputs(inputs: tuple[str, ...]) -> tuple[str, list[Path]]:
    """Expands files, globs and directories; returns their one kind and the files, each argument's sorted by name.

    Raises:
        UserError: nothing found, an unknown ending, or files of several kinds (which are listed).
    """
    files: list[Path] = []
    for given in inputs:
        path = Path(given)
        if not given:
            raise UserError("an input is empty", "give a file, a directory, or a glob in quotes")
        if os.path.isdir(given):  # as below, False for names that no file can have
            found = sorted(p for p in path.iterdir() if p.is_file() and not p.name.startswith("."))
            files += [require_inside(path, p) for p in found if kind_of(p)]
            if not any(kind_of(p) for p in found):
                raise UserError(
                    f"no data file in directory {path}", f"known endings: {', '.join(KINDS)} (also .gz, .zst)"
                )
        elif os.path.isfile(given):
            files.append(path)
        elif os.path.exists(given):
            raise UserError(f"{escape(given)}: is not a regular file", "give a file, a directory, or a glob in quotes")
        elif matched := sorted(p for p in map(Path, glob.glob(given, recursive=True)) if p.is_file()):
            files += matched
        else:
            raise UserError(f"no such file: {escape(given)}", "give a file, a directory, or a glob in quotes")
    kinds: dict[str, list[Path]] = {}
    for path in files:
        kind = kind_of(path)
        if kind is None:
            raise UserError(f"{path}: unknown ending", f"known endings: {', '.join(KINDS)} (also .gz, .zst)")
        kinds.setdefault(kind, []).append(path)
    if len(kinds) > 1:
        listed = "; ".join(f"{len(paths)} {kind} ({paths[0].name})" for kind, paths in sorted(kinds.items()))
        raise UserError(f"files of several kinds: {listed}", "prepare each kind on its own, then join with --merge")
    return next(iter(kinds)), files


def _compression(path: Path) -> str | None:
    return COMPRESSIONS.get(path.suffix.lower())


def open_input(path: Path, track: TrackRead = ignore_progress) -> BinaryIO:
    """A file's bytes, decompressed."""
    raw = path.open("rb", buffering=BLOCK)
    size = path.stat().st_size
    how = _compression(path)
    if how is not None and size == 0:  # which gzip and zstd would take for empty text
        raw.close()
        raise UserError(f"{path}: is empty, which no compressed file is", "copy it again")
    track(lambda: 1.0 if raw.closed else raw.tell() / max(1, size))  # the last batches are written after the close
    if how == "gzip":
        return cast(BinaryIO, gzip.open(raw, "rb"))
    if how == "zstd":
        import pyarrow

        return cast(BinaryIO, io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"), BLOCK))
    return raw


@contextlib.contextmanager
def seekable(path: Path) -> Iterator[Any]:
    """A file that can be read at any place: a compressed one is unpacked to a scratch file first."""
    if _compression(path) is None:
        yield str(path)
        return
    with tempfile.NamedTemporaryFile(dir=SCRATCH_DIRECTORY) as scratch:
        left = MAX_RECORD_BYTES + MAX_UNPACKED * path.stat().st_size
        with open_input(path) as packed:
            while block := packed.read(BLOCK):
                left -= len(block)
                if left < 0:
                    raise UserError(f"{path}: unpacks to more than {MAX_UNPACKED} times its size", "unpack it yourself")
                scratch.write(block)
        scratch.flush()
        yield scratch.name
