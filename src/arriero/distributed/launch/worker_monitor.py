"""The processes that a starting process has made: which of them stand still, and how they are asked to stop."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from typing import Any

from arriero.common.output import write_stderr
from arriero.common.signals import (
    SIGINT_DEBOUNCE,
    STARTUP_STOP_DELAY,
    Interrupted,
    Phase,
    Shared,
    listen_in_worker,
    outcome,
    stop_message,
    use_shared,
    wanted,
)

WATCH_EVERY = 1.0
"""Seconds between two looks at the children."""
RAISE_AGAIN = 2.0
"""Seconds in which the exception that ends torch's agent must have arrived."""
STOPPED_AFTER = 10
"""Seconds that a stopped process (SIGSTOP) is waited for before it counts as failed."""


class WorkerMonitor:
    """A thread and the signal handlers of the starting process: ends children that stand still, has them save and stop.

    common/signals.py tells what a signal means. SIGTERM does not end a stopped process: the others would wait for it
    until their collective times out. When the terminal stops the whole job (Ctrl-Z), this thread is stopped with it and
    counts nothing.
    """

    def __init__(self, processes: int, stop_seconds: float, *, saves: bool) -> None:
        """`saves`: whether the children save when they are asked to stop; else a signal ends them at once."""
        self.ended: set[int] = set()
        self._shared, self._saves, self._stop_seconds = Shared(processes), saves, stop_seconds
        use_shared(self._shared)
        self._launcher = os.getpid()
        self._announced = False
        self._late = ""  # that they have not saved in time
        self._raised, self._caught = -math.inf, False
        self._done = threading.Event()
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._take) for number in wanted()}
            self._before[signal.SIGALRM] = signal.signal(
                signal.SIGALRM, lambda *_: self._end(self._shared.ending.value or self._shared.reason)
            )
            self._before[signal.SIGQUIT] = signal.getsignal(signal.SIGQUIT)  # torch's agent sets one
        threading.Thread(target=self._watch, daemon=True).start()

    def here(self) -> None:
        """Called in each child, first of all."""
        if self._shared.ending.value:
            os._exit(1)
        use_shared(self._shared, int(os.environ["LOCAL_RANK"]))
        for number in (signal.SIGALRM, signal.SIGQUIT):
            signal.signal(number, signal.SIG_DFL)
        listen_in_worker(saves=self._saves)

    def outcome(self, number: int) -> Interrupted:
        """How a signal has ended the run; called once the exception has arrived."""
        self._caught = True
        if not self._saves:
            return Interrupted(number)
        end = outcome(number, self._shared.phase)
        return Interrupted(number, self._late or end.what, end.code)

    @property
    def ended_by(self) -> int:
        """The signal for which the children were ended; 0 if none was."""
        return self._shared.ending.value

    def _take(self, number: int, _: object) -> None:
        """The handler, in the main thread, where torch's agent only sleeps and looks."""
        if os.getpid() != self._launcher:  # in a child, until `here` is called
            self._shared.ask(number)
        elif not self._saves:
            self._end(number)
        elif self._shared.ask(number):
            if self._shared.phase != Phase.STARTING:
                self._announce()
        elif number == signal.SIGINT and time.monotonic() - self._shared.asked > SIGINT_DEBOUNCE:
            self._end(number)

    def _end(self, number: int) -> None:
        """Ends the children and torch's agent.

        An exception of a handler can be lost, in a callback of `fork` or where an object is deleted: then it is raised
        again, but not while the agent cleans up.
        """
        from torch.distributed.elastic.multiprocessing.api import SignalException

        if not self._caught and time.monotonic() - self._raised > RAISE_AGAIN:
            self._raised, self._shared.ending.value = time.monotonic(), number
            for pid in self._in_state("RSDTt"):
                os.kill(pid, signal.SIGKILL)
            raise SignalException("asked to end", signal.Signals(number))

    def _announce(self) -> None:
        if not self._announced:
            self._announced = True
            write_stderr(stop_message(self._shared.reason, self._stop_seconds))

    def _watch(self) -> None:
        still: dict[int, int] = {}
        looked = time.monotonic()
        while not self._done.wait(min(0.1, WATCH_EVERY)):
            self._see_to_request()
            if time.monotonic() - looked < WATCH_EVERY:
                continue
            looked = time.monotonic()
            still = {pid: still.get(pid, 0) + 1 for pid in self._in_state("T")}
            for pid, seconds in still.items():
                if seconds >= STOPPED_AFTER:
                    self.ended.add(pid)
                    os.kill(pid, signal.SIGKILL)

    def _see_to_request(self) -> None:
        """Shows a request that reached a child alone; ends all if there is nothing to save, or it takes too long."""
        if not self._before or self._caught:
            return
        if self._shared.ending.value:
            if time.monotonic() - self._raised > RAISE_AGAIN:
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGALRM)
            return
        if not self._shared.asked:
            return
        waited = time.monotonic() - self._shared.asked
        if not self._announced and self._shared.phase != Phase.STARTING:
            self._announce()
        elif not self._announced and waited > STARTUP_STOP_DELAY:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGALRM)
        elif waited > self._stop_seconds:
            self._late = f"not saved within {self._stop_seconds:g} s; the newest checkpoint is the last one"
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGALRM)

    def _in_state(self, letters: str) -> list[int]:
        """The children in one of these states of the kernel; a process that took a dead child's number is none."""
        seen = [(pid, *process_state(pid)) for pid in self._shared.pids if pid]
        return [pid for pid, state, parent in seen if parent == os.getpid() and state in letters]

    def stop(self) -> None:
        """Ends the thread and gives the signals back."""
        self._caught = True
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
