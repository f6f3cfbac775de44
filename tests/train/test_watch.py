"""The watchdog on one process: limits, and a main thread that never lets go of the interpreter."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from arriero.distributed.parallel.mesh import Ranks
from arriero.train.config import WatchConfig
from arriero.train.watch import HostBusyTime, Watchdog

pytestmark = pytest.mark.slow


def test_the_limit_follows_the_median_but_never_below_its_floor(tmp_path: Path) -> None:
    dog = Watchdog(tmp_path, Ranks(), WatchConfig(seconds=500.0, times=20.0), print)
    assert dog.limit() == 500
    dog._recent.extend([1.0, 1.0, 1.0, 1.0, 9.0])
    assert dog.limit() == 30
    dog._recent.extend([5.0] * 10)
    assert dog.limit() == 100
    dog.close()
    dog = Watchdog(tmp_path, Ranks(), WatchConfig(seconds=0.0, times=0.0), print)
    assert dog.limit() == float("inf")
    assert not dog._thread.is_alive()


def test_a_slow_step_within_its_limit_leaves_nothing(tmp_path: Path) -> None:
    said: list[str] = []
    dog = Watchdog(tmp_path, Ranks(), WatchConfig(seconds=6000.0), said.append)
    dog.start_step(1)
    assert dog._began is not None
    dog._began -= 4000.0  # as if the step had taken so long
    while not (tmp_path / "stacks/rank-00000.txt").exists():  # armed at half of the limit
        time.sleep(0.05)
    dog.end_step()
    dog.close()
    assert list((tmp_path / "stacks").iterdir()) == []
    assert said == []


def test_a_process_that_holds_the_interpreters_lock_is_seen_too(tmp_path: Path) -> None:
    code = (
        "import ctypes, sys, time; from pathlib import Path; from arriero.train import watch; "
        "from arriero.distributed.parallel.mesh import Ranks\n"
        "def held(): ctypes.PyDLL(None).sleep(200)\n"
        "later = watch.faulthandler.dump_traceback_later\n"
        "watch.faulthandler.dump_traceback_later = lambda seconds, file: later(0.5, file=file)\n"
        "dog = watch.Watchdog(Path(sys.argv[1]), Ranks(), watch.WatchConfig(seconds=6000.0), print)\n"
        "dog.start_step(1); dog._began -= 4000.0\n"  # as if the step had taken so long
        "while dog._file is None: time.sleep(0.05)\n"
        "held()"
    )
    file = tmp_path / "stacks/rank-00000.txt"
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) as child:
        try:
            while "in held" not in (file.read_text() if file.exists() else ""):
                assert child.poll() is None
                time.sleep(0.1)
        finally:
            child.kill()
    assert file.read_text().startswith("step 1 takes longer than 6000.0 s: the interpreter is held up")


def test_own_time_counts_this_threads_work() -> None:
    own, busy = HostBusyTime(), time.thread_time()
    while time.thread_time() - busy < 0.2:
        pass
    assert own.read() >= 0.15  # the kernel counts in ticks of up to 10 ms
