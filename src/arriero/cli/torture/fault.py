"""Fault injection: makes one disk operation of a save (`checkpoint/disk.py`) raise an error or kill the process."""

from __future__ import annotations

import errno
import itertools
import os
import re
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from arriero.checkpoint import disk
from arriero.distributed.launch.rank_info import ROUND_VARIABLE


@dataclass
class Fault:
    """A fault at operation `number` (from 1) of rank `rank`; a `persistent` one also at every later operation."""

    what: str
    """kill: SIGKILL before it; torn: SIGKILL after half of a write; the name of an errno such as ENOSPC: OSError."""
    number: int
    persistent: bool = False
    rank: int = 0
    _count: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    @classmethod
    def parse(cls, text: str) -> Fault:
        """Reads WHAT@N, WHAT@N+ or WHAT@N:RANK.

        Raises:
            ValueError: it is none of them.
        """
        found = re.fullmatch(r"(\w+)@([0-9]+)(\+?)(?::([0-9]+))?", text)
        if found is None or not (found[1] in ("kill", "torn") or hasattr(errno, found[1])):
            raise ValueError(f"{text!r} is not kill@N, torn@N or ENOSPC@N, with :RANK or without")
        return cls(found[1], int(found[2]), bool(found[3]), int(found[4] or 0))

    def __call__(self, path: Path, write_half: Callable[[], object] | None) -> None:
        """Called before each operation. After a restart no fault is injected, so that the restart succeeds."""
        if os.environ.get(ROUND_VARIABLE, "0") != "0":
            return
        now = next(self._count)
        if int(os.environ.get("RANK", "0")) != self.rank or not (
            now == self.number or (self.persistent and now > self.number)
        ):
            return
        if self.what == "torn" and write_half is not None:
            write_half()
        if self.what in ("kill", "torn"):
            os.kill(os.getpid(), signal.SIGKILL)
        code = getattr(errno, self.what)
        raise OSError(code, os.strerror(code), str(path))


def install(text: str) -> None:
    """Injects the fault described by `text` into this process and its forks; an empty text removes it."""
    disk.before_operation = Fault.parse(text) if text else disk.no_fault
