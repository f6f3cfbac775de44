"""Liveness: stack dumps of every process when a step takes too long, and detection of the slowest process."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

import torch

from arriero.common.errors import UserError
from arriero.common.files import make_directory, open_regular
from arriero.common.text import escape, format_ranks
from arriero.distributed.parallel.mesh import DIMENSIONS, Ranks
from arriero.train.config import WatchConfig

MIN_RELATIVE_LIMIT = 30.0
"""Seconds below which `watch.times` never calls a step too long: short steps vary by more than a factor."""
FAULTHANDLER_MARGIN = 10.0
"""Seconds after the limit when faulthandler dumps, in case the watchdog's thread could not."""
STACK_FILE_WAIT = 2.0
"""Seconds that rank 0 waits for the other processes' stack files before it reads them."""


class Watchdog:
    """A thread that watches the duration of the main thread's steps.

    Each process has one with the same limits, so that all of them dump, also those that wait for the stuck one in a
    collective, and no process has to reach another.

    Should the main thread hold the interpreter's lock for ever, faulthandler's own thread, which needs no lock, dumps.
    """

    def __init__(self, out: Path, ranks: Ranks, config: WatchConfig, log: Callable[[str], None]) -> None:
        self._folder, self._rank, self._world = out / "stacks", ranks.rank, ranks.world
        self._config, self._log = config, log
        self._recent: deque[float] = deque(maxlen=20)
        self._main = threading.get_ident()
        self._began: float | None = None
        self._step = 0
        self._file: IO[str] | None = None
        self._dumped = False
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        if config.seconds or config.times:
            self._thread.start()

    def start_step(self, step: int) -> None:
        """Called before a step."""
        self._step, self._began = step, time.monotonic()

    def end_step(self) -> None:
        """Called after it; closes the step's stack file."""
        if self._began is None:
            return
        took = time.monotonic() - self._began
        self._began = None
        self._recent.append(took)
        if self._dumped:
            self._log(f" WATCHDOG: step {self._step} ended after {took:.1f} s")
        if self._file is not None:
            faulthandler.cancel_dump_traceback_later()
            self._file.close()
            if not self._dumped:
                Path(self._file.name).unlink(missing_ok=True)
        self._file, self._dumped = None, False

    def limit(self) -> float:
        """Seconds that a step may take now; infinite for any."""
        limits = [self._config.seconds or float("inf")]
        if self._config.times and len(self._recent) >= 5:
            limits.append(max(MIN_RELATIVE_LIMIT, self._config.times * statistics.median(self._recent)))
        return min(limits)

    def close(self) -> None:
        """Ends the thread."""
        self._end.set()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        """Runs on the thread. It looks ten times within the limit; after half of it, it arms faulthandler in case that
        it cannot look again."""
        while not self._end.wait(min(1.0, self.limit() / 10)):
            began, limit = self._began, self.limit()
            if began is None or self._dumped or limit == float("inf"):
                continue
            took = time.monotonic() - began
            if took > limit:
                self._dump(took)
            elif took > limit / 2 and self._file is None:
                self._file = self._open(
                    f"step {self._step} takes longer than {limit:.1f} s: the interpreter is held up"
                )
                if self._file is not None:
                    faulthandler.dump_traceback_later(limit - took + FAULTHANDLER_MARGIN, file=self._file)

    def _dump(self, seconds: float) -> None:
        faulthandler.cancel_dump_traceback_later()
        frame = sys._current_frames().get(self._main)
        self._file = self._open(f"step {self._step} takes {seconds:.1f} s: {describe_frame(frame)}")
        if self._file is None:
            return
        faulthandler.dump_traceback(self._file, all_threads=True)
        self._dumped = True
        if self._rank == 0:
            time.sleep(STACK_FILE_WAIT)
            for line in self._stack_summary():
                self._log(f" WATCHDOG: step {self._step} takes longer than {self.limit():.1f} s: {line}")

    def _open(self, head: str) -> IO[str] | None:
        """This process's file, new, with its first line; None where it cannot be written."""
        try:
            make_directory(self._folder, "", follow=False)
            path = self._folder / f"rank-{self._rank:05d}.txt"
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
            file = path.open("x", encoding="utf-8")  # new, and so neither a link nor a pipe
            file.write(f"{head}\nprocess {os.getpid()}, {time.strftime('%Y-%m-%d %H:%M:%S')}\n\n")
            file.flush()
            return file
        except (OSError, UserError):
            return None

    def _stack_summary(self) -> list[str]:
        """A line for each location with its ranks, from the first lines of this step's files; fewest ranks first."""
        at: dict[str, list[int]] = {}
        for rank in range(self._world):
            head = ""
            with contextlib.suppress(OSError):
                handle = open_regular(self._folder / f"rank-{rank:05d}.txt")
                with open(handle, encoding="utf-8", errors="replace") as file:
                    head = escape(file.readline(1000).strip())
            ours = head.startswith(f"step {self._step} ")
            at.setdefault(head.partition(" s: ")[2] if ours else "wrote nothing", []).append(rank)
        places = sorted(at.items(), key=lambda item: len(item[1]))
        return [f"{format_ranks(ranks)} {'' if where == 'wrote nothing' else 'in '}{where}" for where, ranks in places]


def describe_frame(frame: FrameType | None) -> str:
    """A thread's location: its innermost line, and the innermost one of arriero where that is another."""
    lines: list[str] = []
    while frame is not None:
        file, name = frame.f_code.co_filename, frame.f_code.co_name
        if not lines or f"{os.sep}arriero{os.sep}" in file:
            lines.append(f"{Path(file).name}:{frame.f_lineno} {name}")
            if f"{os.sep}arriero{os.sep}" in file:
                break
        frame = frame.f_back
    return ", called from ".join(lines)


class HostBusyTime:
    """Time this process spent on its own work, not waiting for others: on a processor or in the queue for one.

    Linux counts both for each thread, and neither while a thread sleeps in a collective.

    On an accelerator it is the host's part alone: a slow host, not a slow device.
    """

    def __init__(self) -> None:
        self._file = -1
        with contextlib.suppress(OSError):
            self._file = os.open(f"/proc/self/task/{threading.get_native_id()}/schedstat", os.O_RDONLY | os.O_CLOEXEC)
        self._last = self._now()

    def _now(self) -> float:
        if self._file < 0:
            return time.thread_time()
        busy, queued, _ = os.pread(self._file, 100, 0).split()
        return (int(busy) + int(queued)) / 1e9

    def read(self) -> float:
        """Seconds since the last reading."""
        last, self._last = self._last, self._now()
        return self._last - last


@dataclass(frozen=True)
class SlowestRank:
    """The process that needs most time of its own for a step."""

    rank: int
    seconds: float
    median: float

    @property
    def ratio(self) -> float:
        """Its time over the median's."""
        return self.seconds / max(self.median, 1e-9)


class StragglerDetector:
    """Compares the processes' own time every few steps: one sum of a vector with an element for each process."""

    def __init__(self, ranks: Ranks, config: WatchConfig, device: torch.device) -> None:
        self._ranks, self._every, self._device = ranks, config.every, device
        self._sum, self._steps, self._own = 0.0, 0, HostBusyTime()

    def step(self, data_seconds: float) -> SlowestRank | None:
        """After each step, on every process; what was found, when it is due. Waiting for one's own data counts."""
        if not self._every or self._ranks.world == 1:
            return None
        self._sum += data_seconds + self._own.read()
        self._steps += 1
        if self._steps < self._every:
            return None
        each = torch.zeros(self._ranks.world, dtype=torch.float64, device=self._device)
        each[self._ranks.rank] = self._sum / self._steps
        seconds = self._ranks.sum(each, *DIMENSIONS).tolist()
        self._sum, self._steps = 0.0, 0
        self._own.read()
        slowest = max(range(len(seconds)), key=seconds.__getitem__)
        others = seconds[:slowest] + seconds[slowest + 1 :]
        return SlowestRank(slowest, seconds[slowest], statistics.median(others))
