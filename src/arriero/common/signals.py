"""Signals: which of them ask a training run to save and stop, and how the processes of one machine share that request.

    SIGTERM, SIGINT, SIGUSR1, SIGHUP   before the first step: end at once, there is nothing to save
                                       later: finish the step, save, exit with 75
    a second SIGINT                    end at once; one that follows within a second is the same Ctrl-C, which is
                                       delivered both directly and to the process group (timeout, torchrun, a terminal)

A signal may be delivered to the launcher, to a worker, or to all of them. Each only records the request in shared
memory. Worker processes handle signals on a thread, because Python runs a handler in the main thread between two
bytecode instructions, and a collective or a kernel is one instruction. SIGHUP stays ignored where it is (nohup).
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import signal
import threading
import time
from collections.abc import Iterator
from enum import IntEnum
from typing import Any

from arriero.common.errors import EXIT_STOPPED
from arriero.common.output import write_stderr

SIGINT_DEBOUNCE = 1.0
"""Seconds within which two SIGINT count as one."""
STARTUP_STOP_DELAY = 1.0
"""Seconds by which a stop request during start-up is delayed: no process may begin to train while another exits."""
FORCED_EXIT_DELAY = 5.0
"""Seconds after which a process in a long native call exits without having cleaned up."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class Interrupted(KeyboardInterrupt):
    """A signal ended the program.

    Args:
        number: of the signal.
        what: what happened to the work, for the user.
        code: the exit code; None for 128 + number.
    """

    def __init__(self, number: int, what: str = "", code: int | None = None) -> None:
        self.number, self.what = signal.Signals(number), what
        self.code = 128 + number if code is None else code
        super().__init__(f"ended by {self.number.name}{': ' if what else ''}{what}")


class Phase(IntEnum):
    """How far a process of a run is."""

    STARTING = 0
    TRAINING = 1
    SAVED = 2
    """The last checkpoint is committed; only the figure and the exit remain."""


class StopState:
    """The request to stop, shared by the processes of one machine in anonymous memory that forked processes inherit."""

    def __init__(self, processes: int) -> None:
        self._memory = memory = mmap.mmap(-1, 8 * (3 + 2 * processes))
        array = ctypes.c_long * processes
        self.pids, self.phases = array.from_buffer(memory, 24), array.from_buffer(memory, 24 + 8 * processes)
        self.kill_signal = ctypes.c_long.from_buffer(memory, 16)
        """The signal for which the launcher kills the workers; 0 for none yet."""
        self._requested_at, self._signal = ctypes.c_double.from_buffer(memory, 0), ctypes.c_long.from_buffer(memory, 8)

    def request(self, number: int) -> bool:
        """Records a request to stop; False if there was one before."""
        if self._requested_at.value:
            return False
        self._signal.value = number
        self._requested_at.value = time.monotonic()
        return True

    @property
    def requested_at(self) -> float:
        """Time of the request on the monotonic clock; 0 for none yet."""
        return self._requested_at.value

    @property
    def request_signal(self) -> signal.Signals:
        """The signal that made the request."""
        return signal.Signals(self._signal.value or signal.SIGTERM)

    @property
    def phase(self) -> Phase:
        """The furthest phase of any process: a checkpoint is committed for all or for none."""
        return Phase(max(self.phases))


class _Process:
    """The stop state that this process uses, and its index in it."""

    state = StopState(1)
    index = 0


def use_stop_state(state: StopState, index: int | None = None) -> None:
    """Makes this process use `state`: as worker `index`, or as the launcher where there is no index."""
    _Process.state = state
    if index is not None:
        _Process.index = index
        state.pids[index], state.phases[index] = os.getpid(), Phase.STARTING


def stop_requested() -> bool:
    """Whether a signal asked this process, or another one of this machine, to save and stop."""
    return _Process.state.requested_at > 0


def set_phase(phase: Phase) -> None:
    """Records the phase of this process."""
    _Process.state.phases[_Process.index] = phase


def stop_message(number: int, stop_seconds: float = 0.0) -> str:
    """What happens after the first request, and what a second Ctrl-C does."""
    at_most = f" ({stop_seconds:g} s at most)" if stop_seconds else ""
    first = f"{signal.Signals(number).name}: saving after the present step, then stopping{at_most}"
    return f"{first}; {'a second ' if number == signal.SIGINT else ''}Ctrl-C ends at once, without saving"


NOTHING_TO_SAVE = "before the first step, so there was nothing to save"
SAVED_BEFORE = "the state was saved before"
NOT_SAVED = "without saving; the newest checkpoint is the last one"


def interruption(number: int, phase: Phase) -> Interrupted:
    """The exception for a run that a signal ended in this phase."""
    what = (NOTHING_TO_SAVE, NOT_SAVED, SAVED_BEFORE)[phase]
    return Interrupted(number, what, EXIT_STOPPED if phase == Phase.SAVED else None)


@contextlib.contextmanager
def interrupt_on_signals(*, last: bool = False) -> Iterator[None]:
    """While a command runs, the signals that ask it to end raise Interrupted, so that it cleans up.

    Args:
        last: whether the process exits next; these signals are then ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    own_pid = os.getpid()

    def end(number: int, _: object) -> None:
        if os.getpid() != own_pid:  # in a forked child
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if _Process.state.phase != Phase.SAVED:
            raise Interrupted(number)

    use_stop_state(StopState(1), 0)
    usual = (signal.SIG_DFL, signal.default_int_handler)
    before = {number: signal.signal(number, end) for number in STOP_SIGNALS if signal.getsignal(number) in usual}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if last else handler)


def handled_signals() -> list[signal.Signals]:
    """The signals that a training run handles."""
    return [n for n in STOP_SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]


class SignalListener:
    """Handles the signals of a process that arriero's launcher has not started: the only one, or one under torchrun."""

    def __init__(self, *, verbose: bool) -> None:
        """`verbose`: whether it logs what a signal does; of several processes, rank 0 does."""
        use_stop_state(StopState(1), 0)
        self.verbose = verbose
        self._pending: Interrupted | None = None  # raised by the handler in the main thread
        self._reader, self._writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        os.set_blocking(self._reader, True)
        self._handlers_before: dict[int, Any] = {n: signal.signal(n, self._raise_pending) for n in handled_signals()}
        self._wakeup_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        threading.Thread(target=self._read_signals, daemon=True, name="signals").start()

    def _raise_pending(self, *_: object) -> None:
        if self._pending is not None:
            error, self._pending = self._pending, None
            raise error

    def _read_signals(self) -> None:
        """Runs on the thread; the C part of Python's handler writes each signal's number into the pipe at once."""
        state = _Process.state
        while received := os.read(self._reader, 1):
            number = received[0]
            if number not in self._handlers_before or self._pending is not None:
                continue
            if state.request(number):
                if self._is_starting():
                    self._interrupt_main_thread(interruption(number, Phase.STARTING))
                elif self.verbose:
                    write_stderr(stop_message(number))
            elif number == signal.SIGINT and time.monotonic() - state.requested_at > SIGINT_DEBOUNCE:
                error = interruption(number, state.phase)
                if self.verbose:
                    write_stderr(str(error))
                os._exit(error.code)

    def _is_starting(self) -> bool:
        """Whether training has not begun; waits a moment for it."""
        until = time.monotonic() + STARTUP_STOP_DELAY
        while _Process.state.phase == Phase.STARTING and time.monotonic() < until:
            time.sleep(0.05)
        return _Process.state.phase == Phase.STARTING

    def _interrupt_main_thread(self, error: Interrupted) -> None:
        """Raises in the main thread; exits if that is in one long call and does not return in time."""
        self._pending = error
        signal.pthread_kill(threading.main_thread().ident or 0, error.number)
        threading.Thread(target=_exit_later, args=(error,), daemon=True).start()

    def __enter__(self) -> SignalListener:
        return self

    def __exit__(self, *_: object) -> None:
        """Restores the handlers; closing the pipe ends the thread."""
        signal.set_wakeup_fd(self._wakeup_before)
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)
        os.close(self._writer)


def _exit_later(error: Interrupted) -> None:
    time.sleep(FORCED_EXIT_DELAY)
    write_stderr(str(error))
    os._exit(error.code)


def start_signal_thread(*, saves: bool) -> None:
    """Handles the signals of a worker that arriero's launcher has just forked, on a thread. Called before any other.

    A signal from the launcher kills the worker at once: the launcher sends one when another worker has failed, or the
    time to stop is over. One from any other process is a request to stop; where nothing is saved it ends the worker,
    except Ctrl-C, which the launcher receives as well.
    """
    numbers = handled_signals()
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)  # inherited by later threads
    for number in numbers:
        signal.signal(number, signal.SIG_DFL)
    launcher = os.getppid()

    def wait_for_signals() -> None:
        while True:
            info = signal.sigwaitinfo(numbers)
            if info.si_pid == launcher:
                os.kill(os.getpid(), signal.SIGKILL)
            elif saves:
                _Process.state.request(info.si_signo)
            elif info.si_signo != signal.SIGINT:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, {info.si_signo})
                os.kill(os.getpid(), info.si_signo)

    threading.Thread(target=wait_for_signals, daemon=True, name="signals").start()
