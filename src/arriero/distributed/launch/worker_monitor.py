"""Watches the workers of this machine: kills those that are stopped, and has them save and exit on a signal."""

from __future__ import annotations

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
    StopState,
    handled_signals,
    interruption,
    start_signal_thread,
    stop_message,
    use_stop_state,
)

POLL_INTERVAL = 1.0
"""Seconds between two checks for stopped workers."""
STOPPED_TIMEOUT = 10
"""Seconds after which a worker that is stopped (SIGSTOP) counts as failed."""


class WorkerMonitor:
    """A thread and the signal handlers of the launcher; common/signals.py defines what a signal means.

    SIGTERM does not end a stopped process, and the others would wait for it until their collective times out: it is
    killed. When the terminal stops the whole job (Ctrl-Z), this thread is stopped with it and counts nothing.
    """

    def __init__(self, processes: int, stop_seconds: float, *, saves: bool) -> None:
        """`saves`: whether the workers save when they are asked to stop; else a signal kills them at once."""
        self.killed: set[int] = set()
        """Workers that were stopped for too long."""
        self._state, self._saves, self._stop_seconds = StopState(processes), saves, stop_seconds
        use_stop_state(self._state)
        self._launcher_pid = os.getpid()
        self._announced = self._save_timed_out = False
        self._done = threading.Event()
        self._handlers_before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self._handlers_before = {n: signal.signal(n, self._on_signal) for n in handled_signals()}
            self._handlers_before[signal.SIGQUIT] = signal.getsignal(signal.SIGQUIT)  # torch's agent sets one
        threading.Thread(target=self._watch, daemon=True).start()

    def register_worker(self) -> None:
        """Called in each worker before anything else."""
        if self._state.kill_signal.value:
            os._exit(1)
        use_stop_state(self._state, int(os.environ["LOCAL_RANK"]))
        signal.signal(signal.SIGQUIT, signal.SIG_DFL)
        start_signal_thread(saves=self._saves)

    @property
    def kill_signal(self) -> int:
        """The signal for which the workers were killed; 0 for none."""
        return self._state.kill_signal.value

    def raise_if_killed(self) -> None:
        """Called by torch's agent, ten times a second: ends it once a signal has killed the workers.

        Raises:
            SignalException: torch's, which the agent lets through.
        """
        from torch.distributed.elastic.multiprocessing.api import SignalException

        if self.kill_signal:
            raise SignalException("killed by a signal", signal.Signals(self.kill_signal))

    def interruption(self, number: int) -> Interrupted:
        """The exception for a run that signal `number` ended."""
        if not self._saves:
            return Interrupted(number)
        error = interruption(number, self._state.phase)
        if self._save_timed_out:
            late = f"not saved within {self._stop_seconds:g} s; the newest checkpoint is the last one"
            return Interrupted(number, late, error.code)
        return error

    def _on_signal(self, number: int, _: object) -> None:
        if os.getpid() != self._launcher_pid:  # in a forked worker, until `register_worker` is called
            self._state.request(number)
        elif not self._saves:
            self._kill_workers(number)
        elif self._state.request(number):
            if self._state.phase != Phase.STARTING:
                self._announce_stop()
        elif number == signal.SIGINT and time.monotonic() - self._state.requested_at > SIGINT_DEBOUNCE:
            self._kill_workers(number)

    def _kill_workers(self, number: int) -> None:
        if not self.kill_signal:
            self._state.kill_signal.value = number
            for pid in self._workers_in_state("RSDTt"):
                os.kill(pid, signal.SIGKILL)

    def _announce_stop(self) -> None:
        if not self._announced:
            self._announced = True
            write_stderr(stop_message(self._state.request_signal, self._stop_seconds))

    def _watch(self) -> None:
        polls: dict[int, int] = {}
        last_poll = time.monotonic()
        while not self._done.wait(min(0.1, POLL_INTERVAL)):
            if self._handlers_before and self._state.requested_at and not self.kill_signal:
                self._handle_stop_request()
            if time.monotonic() - last_poll < POLL_INTERVAL:
                continue
            last_poll = time.monotonic()
            polls = {pid: polls.get(pid, 0) + 1 for pid in self._workers_in_state("T")}
            for pid, count in polls.items():
                if count >= STOPPED_TIMEOUT:
                    self.killed.add(pid)
                    os.kill(pid, signal.SIGKILL)

    def _handle_stop_request(self) -> None:
        """Announces a request that only a worker received; kills all if nothing can be saved or it takes too long."""
        waited = time.monotonic() - self._state.requested_at
        if not self._announced and self._state.phase != Phase.STARTING:
            self._announce_stop()
        elif not self._announced and waited > STARTUP_STOP_DELAY:
            self._kill_workers(self._state.request_signal)
        elif waited > self._stop_seconds:
            self._save_timed_out = True
            self._kill_workers(self._state.request_signal)

    def _workers_in_state(self, letters: str) -> list[int]:
        """The workers in one of these states of the kernel; a process that reuses the number of a dead one is none."""
        states = [(pid, *process_state(pid)) for pid in self._state.pids if pid]
        return [pid for pid, state, parent in states if parent == os.getpid() and state in letters]

    def close(self) -> None:
        """Ends the thread and restores the signal handlers."""
        self._done.set()
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)


def process_state(pid: int) -> tuple[str, int]:
    """The kernel's letter for a process's state (R, S, D, T for stopped, Z) and its parent; ("", 0) if it is gone."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            state, parent = file.read().rpartition(")")[2].split()[:2]
            return state, int(parent)
    except OSError:
        return "", 0
