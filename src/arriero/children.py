"""The processes that a starting process has made: which of them stand still, and how they are asked to stop."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from typing import Any

from arriero.process import also_stop_when

WATCH_EVERY = 1.0
"""Seconds between two looks at the children."""
STOPPED_AFTER = 10
"""Seconds that a stopped process (SIGSTOP) is waited for before it counts as failed."""


class Children:
    """A thread in the starting process that ends children which stand still, and hands on the wish to stop.

    SIGTERM, SIGUSR1 and the first Ctrl-C ask them to save and leave; another Ctrl-C, or `stop_timeout`, ends them.
    SIGTERM does not end a stopped process, and the others would wait for it until their collective times out. When the
    terminal stops the whole job (Ctrl-Z), this thread is stopped with it and counts nothing.
    """

    def __init__(self, processes: int, stop_seconds: float) -> None:
        from multiprocessing.sharedctypes import RawArray

        self.ended: set[int] = set()
        self._pids = RawArray("l", processes)  # each child writes its own: multiprocessing's list of them may be read
        # by the agent's thread alone, since whoever reads it collects exit codes, and one is handed out only once
        self._stop = RawArray("d", 1)  # when the children were asked to stop, by the monotonic clock; 0 for not yet
        self._stop_seconds, self._reason = stop_seconds, signal.SIGTERM
        self._done = threading.Event()
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for one in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
                self._before[one] = signal.signal(one, self._hear)
            self._before[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._give_up)
        threading.Thread(target=self._watch, daemon=True).start()

    def here(self) -> None:
        """Called in each child, first of all."""
        self._pids[int(os.environ["LOCAL_RANK"])] = os.getpid()
        also_stop_when(lambda: bool(self._stop[0]))
        for one, handler in ((signal.SIGTERM, signal.SIG_DFL), (signal.SIGINT, signal.SIG_IGN)):
            signal.signal(one, handler)  # a Python handler would wait for the collective that it interrupts, and a
            # terminal's Ctrl-C comes to the starting process too, which hands it on

    def _hear(self, number: int, _: object) -> None:
        from torch.distributed.elastic.multiprocessing.api import SignalException

        if (number == signal.SIGINT and self._stop[0]) or not self._in_state("RSDTt"):
            raise SignalException("nothing to wait for", signal.Signals(number))
        if not self._stop[0]:
            self._stop[0], self._reason = time.monotonic(), signal.Signals(number)
            said = f"{self._reason.name}: saving after this step, then stopping; {self._stop_seconds:g} s at most"
            print(f"arriero: {said}", file=sys.stderr, flush=True)

    def _give_up(self, *_: object) -> None:
        from torch.distributed.elastic.multiprocessing.api import SignalException

        raise SignalException("not saved in time", self._reason)

    def _in_state(self, letters: str) -> list[int]:
        """The children in one of these states of the kernel; a process that took a dead child's number is none."""
        seen = [(pid, *process_state(pid)) for pid in self._pids if pid]
        return [pid for pid, state, parent in seen if parent == os.getpid() and state in letters]

    def _watch(self) -> None:
        still: dict[int, int] = {}
        while not self._done.wait(WATCH_EVERY):
            still = {pid: still.get(pid, 0) + 1 for pid in self._in_state("T")}
            for pid, seconds in still.items():
                if seconds >= STOPPED_AFTER:
                    self.ended.add(pid)
                    os.kill(pid, signal.SIGKILL)
            if self._stop[0] and time.monotonic() - self._stop[0] > self._stop_seconds and self._before:
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGALRM)
                return

    def stop(self) -> None:
        """Ends the thread."""
        self._done.set()
        for one, handler in self._before.items():
            signal.signal(one, handler)


def process_state(pid: int) -> tuple[str, int]:
    """The kernel's letter for what a process does (R, S, D, T for stopped, Z) and its parent; ("", 0) if none is."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            state, parent = file.read().rpartition(")")[2].split()[:2]
            return state, int(parent)
    except OSError:
        return "", 0
