from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from arriero.checkpoint.lock import RunLock
from arriero.common.errors import UserError

HOLD = """
import sys, time
from pathlib import Path
from arriero.checkpoint.lock import RunLock
lock = RunLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_the_second_job_is_refused_and_a_dead_one_is_not_feared(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"another job is writing this run \\(process {holder.pid} on "):
        RunLock(tmp_path, seconds=0.3)
    os.kill(holder.pid, signal.SIGKILL)
    holder.communicate()
    lock = RunLock(tmp_path)
    assert f"process {holder.pid}" in lock.stale
    lock.release()
    again = RunLock(tmp_path)
    assert again.stale == ""
    again.release()


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/run: Not a directory"):
        RunLock(tmp_path / "file/run")
