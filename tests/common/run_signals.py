"""Sends signals to training runs: `python run_signals.py RECIPE CASE ...`; a line of JSON for each case.

Runs are forked from this process, which has imported torch, so that one costs a second instead of five.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

import arriero.train.run
from arriero.cli.main import dispatch
from arriero.distributed.launch.store import set_parent_death_signal

assert arriero.train.run
INT, TERM, HUP, USR1 = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1
Send = Callable[[int, list[int]], None]


def to_group(*numbers: int, pause: float = 0.0) -> Send:
    def send(launcher: int, _: list[int]) -> None:
        for number in numbers:
            os.killpg(launcher, number)
            time.sleep(pause)

    return send


def to_launcher(number: int) -> Send:
    return lambda launcher, _: os.kill(launcher, number)


def to_worker(index: int, number: int) -> Send:
    return lambda _, workers: os.kill(workers[index], number)


def both(*sends: Send) -> Send:
    def send(launcher: int, workers: list[int]) -> None:
        for one in sends:
            one(launcher, workers)

    return send


@dataclass(frozen=True)
class Case:
    send: Send
    words: tuple[str, ...] = ("--nproc-per-node", "2")
    until: str = "iteration        3/"
    """What the run has printed when the signal comes; empty for as soon as it has forked a worker."""
    ignored: tuple[int, ...] = ()


LONE: tuple[str, ...] = ()
VERIFY = ("--verify-layout", "--nproc-per-node", "2")
CASES = {
    "group twice": Case(to_group(TERM, TERM)),
    "timeout -s INT": Case(both(to_launcher(INT), to_group(INT))),
    "launcher": Case(to_launcher(USR1)),
    "worker 1": Case(to_worker(1, HUP)),
    "nohup": Case(both(to_group(HUP), lambda *_: time.sleep(1), to_group(TERM)), ignored=(HUP,)),
    "second Ctrl-C": Case(both(to_worker(1, signal.SIGSTOP), to_group(INT, INT, pause=1.3))),
    "starting": Case(to_group(TERM), until=""),
    "lone, timeout -s INT": Case(both(to_launcher(INT), to_group(INT)), LONE),
    "verify, Ctrl-C": Case(to_group(INT), VERIFY, until=""),
}


def start(words: list[str], log: Path, ignored: tuple[int, ...]) -> int:
    """Forks a run as a group of its own; returns its number."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        set_parent_death_signal()
        os.setsid()
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        code = dispatch(words, last=True)
    finally:
        os._exit(code)


def takes_signals(pid: int) -> bool:
    """Whether it is a worker, which blocks signals for the thread that takes them, and not the process of the store."""
    return "SigBlk:\t0000000000000000" not in Path(f"/proc/{pid}/status").read_text()


def is_alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def wait_until(there: Callable[[], bool], seconds: float = 120.0) -> None:
    until = time.monotonic() + seconds
    while not there() and time.monotonic() < until:
        time.sleep(0.01)


def run(name: str, recipe: str, root: Path) -> dict[str, object]:
    case, out, log = CASES[name], root / name, root / f"{name}.log"
    words = ["pretrain", recipe, "--out", str(out), "--train.steps", "100000", "--checkpoint.every", "0"]
    os.environ["TMPDIR"] = str(root / "tmp")
    tempfile.tempdir = None
    shutil.rmtree(root / "tmp", ignore_errors=True)
    (root / "tmp").mkdir()
    log.touch()
    pid = start([*words, *case.words], log, case.ignored)
    process, children = psutil.Process(pid), []

    def ready() -> bool:
        nonlocal children
        children = process.children()
        return case.until in log.read_text() if case.until else len(children) > 1

    wait_until(ready)
    workers = [child.pid for child in children if takes_signals(child.pid)]
    case.send(pid, workers)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    wait_until(lambda: not any(map(is_alive, children)), 5)
    return {
        "case": name, "code": code, "output": log.read_text(),
        "saved": len(list(out.glob("checkpoints/*/COMMITTED"))),
        "orphans": [child.pid for child in children if is_alive(child)],
        "left": [path.name for path in (root / "tmp").iterdir() if "inductor" not in path.name],  # torch's cache
    }  # fmt: skip


if __name__ == "__main__":
    place = Path(tempfile.mkdtemp())
    try:
        for each in sys.argv[2:]:
            print(json.dumps(run(each, sys.argv[1], place)), flush=True)
    finally:
        shutil.rmtree(place)
