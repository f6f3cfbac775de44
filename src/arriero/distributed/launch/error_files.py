"""The files in which failing workers write their error for torch's elastic agent; a file exists only after a failure.

torch's DefaultLogsSpecs creates a folder in the temporary directory at every start, and never removes it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile

from torch.distributed.elastic.multiprocessing.api import LogsDest, LogsSpecs


class ErrorFiles(LogsSpecs):
    """An error file for each worker and no logs: standard output and standard error go to the terminal."""

    def __init__(self) -> None:
        super().__init__()
        name = f"arriero-{os.getpid()}-{secrets.token_hex(8)}"
        self._prefix, self._count = os.path.join(tempfile.gettempdir(), name), 0

    @property
    def root_log_dir(self) -> str:
        """No logs are written."""
        return os.devnull

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """Called by the agent before each start, with the environment of each worker by local rank."""
        self.remove()
        self._count = len(envs)
        files = {rank: self._path(rank) for rank in range(self._count)}
        for rank, path in files.items():
            envs[rank]["TORCHELASTIC_ERROR_FILE"] = path
        terminal = dict.fromkeys(files, "")
        return LogsDest(stdouts=terminal, stderrs=dict(terminal), error_files=files)

    def remove(self) -> None:
        """Removes the files of workers that failed."""
        for rank in range(self._count):
            with contextlib.suppress(OSError):
                os.unlink(self._path(rank))

    def _path(self, rank: int) -> str:
        return f"{self._prefix}-{rank}.json"
