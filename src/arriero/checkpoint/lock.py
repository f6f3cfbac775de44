"""One job a run directory: a lock that the kernel lets go when its holder dies, with the holder's name in it."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from pathlib import Path

from arriero.common.errors import UserError

LOCK = "lock.json"


class RunLock:
    """Held by the first process of a job from its start to its end."""

    def __init__(self, out: Path, *, seconds: float = 10.0) -> None:
        """Takes the lock, waiting some seconds for a holder that is just ending.

        Raises:
            UserError: another job has it; the error names host, process and start.
        """
        self.path = out / LOCK
        try:
            out.mkdir(parents=True, exist_ok=True)
            self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise UserError(f"{out}: {error.strerror}", "name a directory that can be written with --out") from None
        until = time.monotonic() + seconds
        while not self._try():
            if time.monotonic() > until:
                owner = self.owner()
                os.close(self._handle)
                fix = "wait for it, end it, or write elsewhere with --out"
                raise UserError(f"{out}: another job is writing this run ({owner})", fix)
            time.sleep(0.2)
        self.stale = self.owner()
        """Who held it and died; empty if the last job ended in order."""
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        text = json.dumps({"host": socket.gethostname(), "process": os.getpid(), "since": now})
        os.ftruncate(self._handle, 0)
        os.pwrite(self._handle, text.encode() + b"\n", 0)

    def _try(self) -> bool:
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def owner(self) -> str:
        """Who is named in the file, in words."""
        try:
            found = json.loads(os.pread(self._handle, 4096, 0))
            return f"process {found['process']} on {found['host']}, since {found['since']}"
        except (ValueError, KeyError, TypeError):
            return ""

    def release(self) -> None:
        """Lets go in order: the file stays, empty."""
        os.ftruncate(self._handle, 0)
        os.close(self._handle)
