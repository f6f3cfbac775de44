"""Making one operation of a save fail, as `checkpoint/disk.py` lets it: by an error, or by the death of the process."""

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
from arriero.distributed.launch.worker import ROUND_VARIABLE


@dataclass
class Fault:
    """What happens at the operation `number` (from 1) of the process `rank`, and at all that follow if it `stays`."""

    what: str
    """kill ends the process, torn ends it in the middle of what it writes, the name of an error such as ENOSPC raises
    it."""
    number: int
    stays: bool = False
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
        """Ahead of each operation; only the first start of a job is hurt, so that a restart can be watched."""
        if os.environ.get(ROUND_VARIABLE, "0") != "0":
            return
        now = next(self._count)
        if int(os.environ.get("RANK", "0")) != self.rank or not (
            now == self.number or (self.stays and now > self.number)
        ):
            return
        if self.what == "torn" and write_half is not None:
            write_half()
        if self.what in ("kill", "torn"):
            os.kill(os.getpid(), signal.SIGKILL)
        code = getattr(errno, self.what)
        raise OSError(code, os.strerror(code), str(path))


def install(text: str) -> None:
    """Makes an operation of this process, or of those that are forked from it, fail as `text` says; empty: none."""
    disk.before_operation = Fault.parse(text) if text else disk.no_fault
