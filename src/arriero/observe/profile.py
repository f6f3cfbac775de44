"""A profiler trace of some steps on request: one Chrome JSON a process, for chrome://tracing or ui.perfetto.dev."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from arriero.common.errors import UserError
from arriero.common.files import make_directory
from arriero.common.text import escape


def profile_steps(text: str) -> tuple[int, int] | None:
    """First and last step of "10:13" or "steps=10:13"; None for an empty text.

    Raises:
        UserError: anything else, or a last step before the first.
    """
    if not text:
        return None
    found = re.fullmatch(r"(?:steps=)?([0-9]{1,10}):([0-9]{1,10})", text.strip())
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        fix = 'give the first and the last step, from 1, such as "10:13"'
        raise UserError(f"log.profile is '{escape(text)}'", fix)
    return int(found[1]), int(found[2])


def profile_problems(text: str, steps: int) -> list[UserError]:
    """What is wrong with the key in a run of `steps`."""
    try:
        span = profile_steps(text)
    except UserError as error:
        return [error]
    if span and span[0] > steps:
        return [UserError(f"log.profile {text!r} begins after the last step, {steps}", "choose an earlier step")]
    return []


class Profile:
    """Turns torch's profiler on before the first step and off after the last, or after the run's last."""

    def __init__(self, text: str, directory: Path, rank: int) -> None:
        self.span, self.directory = profile_steps(text), directory
        self.path = directory / f"rank-{rank}.json"
        self._profiler: Any = None
        self._written = False
        self._problem = ""

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around step `number`."""
        if self.span is None:
            yield
            return
        if self._profiler is None and not self._written and self.span[0] <= number <= self.span[1]:
            from torch import profiler

            # what this build knows: the CPU, and the accelerator's kernels beside it
            self._profiler = profiler.profile(activities=profiler.supported_activities())
            self._profiler.start()
        yield
        if number >= self.span[1]:
            self._write()

    def _write(self) -> None:
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        try:
            make_directory(self.directory, "", follow=False)
            with tempfile.TemporaryDirectory(prefix=".profile-", dir=self.directory) as made:
                beside = Path(made) / self.path.name  # the profiler opens by name, and would follow a link
                profiler.export_chrome_trace(str(beside))
                os.replace(beside, self.path)
            self._written = True
        except (OSError, RuntimeError, UserError) as error:
            self._problem = str(error)

    def finish(self) -> str:
        """Ends a trace that still runs; returns a log line about it, empty if no trace was requested."""
        self._write()
        if self.span is None:
            return ""
        first, last = self.span
        if self._problem:
            return f" NO profile: {escape(self._problem)}"
        return f" profile: {self.path}" if self._written else f" NO profile: steps {first} to {last} were not run"
