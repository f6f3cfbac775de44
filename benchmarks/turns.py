"""Programs that take turns on one machine, each in a process that lives for the whole benchmark.

The parent starts them one after another, each warms up and waits; then it hands out turns of some steps. A program that
waits reads from a pipe and takes no CPU time, so that all are measured on the same machine within the same minutes.
What a process writes to its standard output is for the parent; its libraries' prints go to its log.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from arriero.common.device import peak_memory


class Turns:
    """In a process of its own: counts the steps, and holds the program until the parent gives it another turn."""

    def __init__(self, warmup: int) -> None:
        self.warmup = self.left = warmup
        self.losses: list[float] = []
        self.seconds: list[float] = []
        """Of each step of the warm-up."""
        self._parent = replies()
        self.begin()

    def begin(self) -> None:
        """Takes the time: what was done before is not the first step's."""
        self._last = self._turn = time.perf_counter()
        self._cpu = time.process_time()

    def after_step(self, loss: float) -> None:
        """Returns when the next step may begin; ends the process when the parent has no turns left."""
        now = time.perf_counter()
        self.losses.append(loss)
        if len(self.losses) <= self.warmup:
            self.seconds.append(now - self._last)
        self._last = now
        self.left -= 1
        if self.left:
            return
        # From the end of the last turn, so that what a program does ahead of time, on other threads, counts too.
        cpu = time.process_time() - self._cpu
        answer: dict[str, Any] = {"cpu_seconds": cpu, "wall_seconds": now - self._turn}
        if len(self.losses) == self.warmup:
            answer = {"warmup_seconds": self.seconds, "first_loss": self.losses[0]}
        answer |= {"last_loss": loss, "peak_memory_gb": peak_memory("cpu") / 1e9}
        print(json.dumps(answer), file=self._parent, flush=True)
        self._cpu = time.process_time()
        words = sys.stdin.readline()
        if not words:
            raise SystemExit(0)
        self.left = int(words)
        self._turn = self._last = time.perf_counter()


def replies() -> TextIO:
    """Where the parent listens; from now on, standard output is the log."""
    parent = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return parent


class PlayerError(Exception):
    """A process ended before its time; the message is the end of its log."""


class Player:
    """In the parent: one program and its process."""

    def __init__(self, name: str, command: list[str], log: Path, environment: dict[str, str]) -> None:
        self.name, self.log = name, log
        self.turns: list[dict[str, float]] = []
        with log.open("w") as stderr:
            self.process = subprocess.Popen(
                command, env={**os.environ, **environment}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=stderr, text=True,
            )  # fmt: skip
        self.start: dict[str, Any] = {}

    def warm_up(self) -> dict[str, Any]:
        """Waits for the warm-up, which the process does by itself."""
        self.start = self._hear()
        return self.start

    def turn(self, steps: int) -> dict[str, float]:
        """Lets it do so many steps and returns what they took."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        self.turns.append(self._hear())
        return self.turns[-1]

    def _hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            raise PlayerError(f"{self.name} failed:\n{self.log.read_text()[-3000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """Ends the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
