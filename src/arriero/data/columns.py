"""Records of parquet and arrow files, through a process of bounded memory (see column_reader.py)."""

from __future__ import annotations

import json
import marshal
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO

from arriero.common.errors import UserError
from arriero.common.text import escape, escape_message
from arriero.data import inputs
from arriero.data.column_reader import EXIT_REFUSED, FRAME
from arriero.data.inputs import MAX_UNPACKED, TrackRead, seekable
from arriero.data.json_stream import MalformedRecord, NumberedRecords

MEMORY_LIMITS = (
    768 << 20,
    4 << 30,
)  # bytes that reading may take: the least with MAX_UNPACKED times the file, and the most
MIN_UNPACKED_BYTES = 256 << 20  # bytes of text that any file may give, and MAX_UNPACKED times its size besides


def read_columns(path: Path, kind: str, columns: tuple[str, ...] | None, track: TrackRead) -> NumberedRecords:
    """Records of a parquet or arrow file, numbered from 1.

    Args:
        path: the file, which may be compressed as a whole.
        kind: parquet or arrow.
        columns: those that are read; None for all.
        track: takes a function that returns the fraction of the file that has been read, from 0 to 1.

    Raises:
        UserError: the file cannot be read, or unpacks to more than it may.
    """
    with seekable(path) as source, tempfile.TemporaryFile(dir=inputs.SCRATCH_DIRECTORY) as errors:
        allowed = MAX_UNPACKED * os.stat(source).st_size
        bounds = [min(MEMORY_LIMITS[0] + allowed, MEMORY_LIMITS[1]), MIN_UNPACKED_BYTES + allowed]
        # -P: no module of the working directory, which may be untrusted, is imported.
        command = [sys.executable, "-P", "-m", "arriero.data.column_reader", str(path), str(source), kind]
        reader = subprocess.Popen(
            [*command, json.dumps(columns), json.dumps(bounds)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=errors, start_new_session=True,  # Ctrl-C is for this process, which ends the other
            env={**os.environ, "ARROW_DEFAULT_MEMORY_POOL": "system", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert reader.stdout is not None
        share = 0.0
        track(lambda: share)
        number, whole = 1, False
        try:
            with reader.stdout as pipe:
                while (frame := _read_frame(pipe)) is not None:
                    if not frame:
                        whole = True
                        break
                    share, rows = marshal.loads(frame)
                    for number, row in enumerate(rows, number):  # noqa: B020 - it goes on from the last piece
                        yield number, MalformedRecord(row, "") if isinstance(row, str) else row
                    number += 1
            code = reader.wait()
        finally:
            reader.kill()
            reader.wait()
        if code or not whole:
            errors.seek(0)
            raise _reader_error(path, kind, code, errors.read()[-20_000:].decode("utf-8", "replace"))


def _read_frame(pipe: IO[bytes]) -> bytes | None:
    """The next frame; empty at the proper end, None where the pipe is cut."""
    head = pipe.read(FRAME.size)
    if len(head) < FRAME.size:
        return None
    size = FRAME.unpack(head)[0]
    frame = pipe.read(size)
    return frame if len(frame) == size else None


def _reader_error(path: Path, kind: str, code: int, errors: str) -> UserError:
    if code == EXIT_REFUSED:
        problem, fix = json.loads(errors.rpartition("\n")[2])
        return UserError(problem, fix)
    if code < 0:
        how = f"pyarrow ended with {signal.Signals(-code).name}"
    else:
        last = errors.strip().rpartition("\n")[2]
        how = f"pyarrow's reader ended with code {code}: {escape(escape_message(last))}"
    return UserError(f"{path}: not a whole {kind} file ({how})", "do not trust this file, or copy it again")
