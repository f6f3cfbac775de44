"""Signals: which of them ask a training run to save and stop, and how the processes of one machine share that request.

    SIGTERM, SIGINT, SIGUSR1, SIGHUP   before the first step: end at once, there is nothing to save
                                       later: finish the step, save, exit with 75
    a second SIGINT                    end at once; one that follows within a second is the same Ctrl-C, which reaches
                                       a process both directly and through its group (timeout, torchrun, a terminal)

A signal may reach the launcher, a worker, or all of them. Each only writes the request down, in memory that they share.
Threads take the signals, because Python runs a signal's handler in the main thread between two of its instructions, and
a collective or a kernel is one instruction. SIGHUP stays ignored where it is (nohup).
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
"""Seconds within which two SIGINT are one."""
STARTUP_STOP_DELAY = 1.0
"""Seconds that a request to stop during the start waits, so that no process begins to train while another ends."""
FORCED_EXIT_DELAY = 5.0
"""Seconds after which a process that is in a long call is ended although it has not cleaned up."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class Interrupted(KeyboardInterrupt):
    """A signal ended the program.

    Args:
        number: of the signal.
        what: that has become of the work, for the user.
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
    """The last checkpoint is committed; what remains is to draw the figure and leave."""


class Shared:
    """What the processes of one machine share about stopping, in anonymous memory that forked processes inherit."""

    def __init__(self, processes: int) -> None:
        self._memory = memory = mmap.mmap(-1, 8 * (3 + 2 * processes))
        array = ctypes.c_long * processes
        self.pids, self.phases = array.from_buffer(memory, 24), array.from_buffer(memory, 24 + 8 * processes)
        self.ending = ctypes.c_long.from_buffer(memory, 16)
        """The signal by which the launcher ends all; 0 for not yet."""
        self._asked, self._reason = ctypes.c_double.from_buffer(memory, 0), ctypes.c_long.from_buffer(memory, 8)

    def ask(self, number: int) -> bool:
        """Writes down that the run shall stop; False if it was asked before."""
        if self._asked.value:
            return False
        self._reason.value = number
        self._asked.value = time.monotonic()
        return True

    @property
    def asked(self) -> float:
        """When the run was asked to stop, by the monotonic clock; 0 for not yet."""
        return self._asked.value

    @property
    def reason(self) -> signal.Signals:
        """The signal that asked."""
        return signal.Signals(self._reason.value or signal.SIGTERM)

    @property
    def phase(self) -> Phase:
        """That of the process which is furthest: a checkpoint is committed for all or for none."""
        return Phase(max(self.phases))


class _Mine:
    """This process's part in it."""

    shared = Shared(1)
    index = 0


def use_shared(shared: Shared, index: int | None = None) -> None:
    """Makes this process one that shares requests: number `index` of those that train, or the one that starts them."""
    _Mine.shared = shared
    if index is not None:
        _Mine.index = index
        shared.pids[index], shared.phases[index] = os.getpid(), Phase.STARTING


def stop_requested() -> bool:
    """Whether a signal asked this process, or another one of this machine, to save and stop."""
    return _Mine.shared.asked > 0


def set_phase(phase: Phase) -> None:
    """Notes how far this process is."""
    _Mine.shared.phases[_Mine.index] = phase


def stop_message(number: int, stop_seconds: float = 0.0) -> str:
    """What happens after the first request, and what a second Ctrl-C does."""
    at_most = f" ({stop_seconds:g} s at most)" if stop_seconds else ""
    first = f"{signal.Signals(number).name}: saving after the present step, then stopping{at_most}"
    return f"{first}; {'a second ' if number == signal.SIGINT else ''}Ctrl-C ends at once, without saving"


NOTHING_TO_SAVE = "before the first step, so there was nothing to save"
SAVED_BEFORE = "the state was saved before"
NOT_SAVED = "without saving; the newest checkpoint is the last one"


def outcome(number: int, phase: Phase) -> Interrupted:
    """The end of a run by a signal in this phase, as an exception."""
    what = (NOTHING_TO_SAVE, NOT_SAVED, SAVED_BEFORE)[phase]
    return Interrupted(number, what, EXIT_STOPPED if phase == Phase.SAVED else None)


@contextlib.contextmanager
def interrupt_on_signals(*, last: bool = False) -> Iterator[None]:
    """While a command runs, has the signals that ask it to end raise Interrupted, so that it cleans up.

    Args:
        last: whether nothing but the end of this process follows, which these signals then no longer change.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    mine = os.getpid()

    def end(number: int, _: object) -> None:
        if os.getpid() != mine:  # a process that this one has forked
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if _Mine.shared.phase != Phase.SAVED:
            raise Interrupted(number)

    use_shared(Shared(1), 0)
    usual = (signal.SIG_DFL, signal.default_int_handler)
    before = {number: signal.signal(number, end) for number in STOP_SIGNALS if signal.getsignal(number) in usual}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if last else handler)


def wanted() -> list[signal.Signals]:
    """The signals that a training run takes."""
    return [n for n in STOP_SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]


class SignalListener:
    """Takes the signals of a process that arriero's launcher has not started: the only one, or one under torchrun."""

    def __init__(self, *, speaks: bool) -> None:
        """`speaks`: whether it shows what a signal does; of several processes, the first does."""
        use_shared(Shared(1), 0)
        self.speaks = speaks
        self._raise: Interrupted | None = None
        self._before: dict[int, Any] = {}
        self._reader, self._writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        os.set_blocking(self._reader, True)
        for number in wanted():
            self._before[number] = signal.signal(number, self._in_main)
        self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, daemon=True, name="signals").start()

    def _in_main(self, *_: object) -> None:
        if self._raise is not None:
            error, self._raise = self._raise, None
            raise error

    def _listen(self) -> None:
        """Runs on the thread; the C part of Python's handler writes each signal's number into the pipe at once."""
        shared = _Mine.shared
        while received := os.read(self._reader, 1):
            number = received[0]
            if number not in self._before or self._raise is not None:
                continue
            if shared.ask(number):
                if not self._still_starting():
                    self._say(stop_message(number))
                    continue
                self._end_in_order(outcome(number, Phase.STARTING))
            elif number == signal.SIGINT and time.monotonic() - shared.asked > SIGINT_DEBOUNCE:
                end = outcome(number, shared.phase)
                self._say(str(end))
                os._exit(end.code)

    def _still_starting(self) -> bool:
        until = time.monotonic() + STARTUP_STOP_DELAY
        while _Mine.shared.phase == Phase.STARTING and time.monotonic() < until:
            time.sleep(0.05)
        return _Mine.shared.phase == Phase.STARTING

    def _end_in_order(self, end: Interrupted) -> None:
        """Raises in the main thread; ends the process if that is in one long call."""
        self._raise = end
        signal.pthread_kill(threading.main_thread().ident or 0, end.number)
        threading.Thread(target=_end_later, args=(end,), daemon=True).start()

    def _say(self, text: str) -> None:
        if self.speaks:
            write_stderr(text)

    def __enter__(self) -> SignalListener:
        return self

    def __exit__(self, *_: object) -> None:
        """Gives the signals back; the thread ends with its pipe."""
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._writer)


def _end_later(end: Interrupted) -> None:
    time.sleep(FORCED_EXIT_DELAY)
    write_stderr(str(end))
    os._exit(end.code)


def listen_in_worker(*, saves: bool) -> None:
    """Takes the signals of a process that arriero's launcher has just forked, on a thread. Called before any other.

    A signal from the launcher ends the process at once: the launcher sends one when another process has failed, or its
    time is over. One from anybody else is a request to stop, or, where nothing is saved, ends it too, but for Ctrl-C,
    which reaches the launcher as well.
    """
    numbers = wanted()
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)  # in the threads to come, too
    for number in numbers:
        signal.signal(number, signal.SIG_DFL)
    launcher = os.getppid()

    def listen() -> None:
        while True:
            info = signal.sigwaitinfo(numbers)
            if info.si_pid == launcher:
                os.kill(os.getpid(), signal.SIGKILL)
            elif saves:
                _Mine.shared.ask(info.si_signo)
            elif info.si_signo != signal.SIGINT:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, {info.si_signo})
                os.kill(os.getpid(), info.si_signo)

    threading.Thread(target=listen, daemon=True, name="signals").start()
