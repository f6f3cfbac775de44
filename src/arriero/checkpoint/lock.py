"""One job a run directory: a file lock, released when its process ends, with the owner's name in it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from pathlib import Path

from arriero.common.errors import UserError
from arriero.common.files import make_directory, open_regular, os_error_text, try_lock, write_atomic
from arriero.common.text import escape

LOCK = "lock.json"


class RunLock:
    """Held by the first process of a job from its start to its end."""

    def __init__(self, out: Path, *, seconds: float = 10.0) -> None:
        """Takes the lock, waiting up to `seconds` for a job that is just ending.

        Raises:
            UserError: another job has it; the error names host, process and start.
        """
        self.path, fix = out / LOCK, "name a directory that can be written with --out"
        make_directory(out, fix)
        try:
            self._handle = open_regular(self.path, os.O_RDWR | os.O_CREAT)
        except OSError as error:
            if os.path.lexists(self.path):
                fix = "remove it if no job writes this run, or write elsewhere with --out"
            raise UserError(f"{escape(self.path)}: {os_error_text(error)}", fix) from None
        until = time.monotonic() + seconds
        while not self._try():
            if time.monotonic() > until:
                owner = self.owner()
                os.close(self._handle)
                fix = "wait for it, end it, or write elsewhere with --out"
                raise UserError(f"{escape(out)}: another job is writing this run ({owner})", fix)
            time.sleep(0.2)
        if os.fstat(self._handle).st_nlink > 1:  # a hard link, maybe to a file outside the run: not overwritten
            self._replace(fix)
        self.stale = self.owner()
        """Who held it and was killed; empty if the last job released it."""
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        text = json.dumps({"host": socket.gethostname(), "process": os.getpid(), "since": now})
        with contextlib.suppress(OSError):  # a full disk: the lock holds, without an owner's name
            os.ftruncate(self._handle, 0)
            os.pwrite(self._handle, text.encode() + b"\n", 0)

    def _replace(self, fix: str) -> None:
        """Replaces the file by a new one, locked."""
        os.close(self._handle)
        try:
            write_atomic(self.path, b"")
            self._handle = open_regular(self.path, os.O_RDWR)
        except OSError as error:
            raise UserError(f"{escape(self.path)}: {os_error_text(error)}", fix) from None
        self._try()

    def _try(self) -> bool:
        try:
            return try_lock(self._handle)
        except OSError as error:
            os.close(self._handle)
            fix = "use a file system that has locks (flock) with --out"
            raise UserError(f"{escape(self.path)}: cannot be locked ({os_error_text(error)})", fix) from None

    def owner(self) -> str:
        """The owner that the file names; empty if none."""
        try:
            found = json.loads(os.pread(self._handle, 4096, 0))
            return escape(f"process {found['process']} on {found['host']}, since {found['since']}")
        except (ValueError, KeyError, TypeError, OSError, RecursionError):
            return ""

    def release(self) -> None:
        """Releases the lock: the file stays, empty."""
        with contextlib.suppress(OSError):
            os.ftruncate(self._handle, 0)
        os.close(self._handle)
