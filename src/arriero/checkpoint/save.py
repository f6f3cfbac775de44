"""Saving the training state: each process writes its shards; of replicated ones, the first process that has them.

The step waits only while the shards are copied; a thread writes the copy. The processes agree on a save's success
through a process group of its own, apart from the collectives of the steps that run meanwhile.
"""

from __future__ import annotations

import math
import shutil
import threading
import time
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arriero.checkpoint import disk
from arriero.checkpoint.config import CheckpointConfig
from arriero.checkpoint.directory import TEMPORARY, commit, step_directory, write_json
from arriero.checkpoint.find import committed, save_number
from arriero.checkpoint.retention import delete_checkpoint, expired, is_uncommitted, remove_uncommitted
from arriero.checkpoint.shards import TensorShard, data_file, write_shards
from arriero.checkpoint.verify import verify_checkpoint
from arriero.common.checkpoint_names import STATE
from arriero.common.device import empty_host_tensor, synchronize
from arriero.common.errors import UserError
from arriero.common.files import DISK_FULL
from arriero.distributed.parallel.mesh import Ranks

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup

RETRY_DELAY = 1.0
"""Seconds before a failed save is tried again."""


@dataclass(frozen=True)
class SaveResult:
    """The outcome of one save."""

    step: int
    path: Path
    blocked: float
    """Seconds for which the step waited."""
    seconds: float = 0.0
    """Seconds until it was committed."""
    problem: str = ""
    """Why it could not be written; empty if it was."""
    notice: str = ""
    """What else the user should know."""


class Saver:
    """Writes checkpoints of one run, one at a time. All its methods are called by every process at the same steps."""

    def __init__(self, root: Path, config: CheckpointConfig, ranks: Ranks) -> None:
        """`root` is the run's `checkpoints` directory, seen by all processes."""
        self.root, self.config, self.ranks = root, config, ranks
        self._group: ProcessGroup | None = None
        if ranks.mesh is not None:
            import torch.distributed as dist

            self._group = dist.new_group(backend="gloo", timeout=timedelta(days=1))  # a slow disk is not a lost rank
        self._copies: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._done: list[SaveResult] = []
        self._intact: dict[Path, list[tuple[str, int, int, int]]] = {}
        """Checkpoints that were read back and found intact, with their files' names, sizes, times and inodes then."""
        self._damaged: set[Path] = set()

    def save(self, step: int, shards: dict[str, TensorShard], *, state: dict[str, Any], texts: dict[str, str]) -> None:
        """Starts writing `checkpoints/step-N`, which appears complete or not at all; waits for the one before it.

        Args:
            step: steps completed.
            shards: what this process writes, by global name; may be changed once this returns.
            state: everything else that a resumed run needs, as JSON.
            texts: further small files by name.
        """
        began = time.perf_counter()
        self.wait()
        if self.config.asynchronous:
            copies = {key: replace(shard, value=self._copy(key, shard.value)) for key, shard in shards.items()}
            for kind in {shard.value.device.type for shard in shards.values()}:
                synchronize(kind)
        else:
            copies = {key: replace(shard, value=shard.value.cpu().contiguous()) for key, shard in shards.items()}
        saved = SaveResult(step, step_directory(self.root, step), time.perf_counter() - began)
        small = {"step": step, **state}
        self._thread = threading.Thread(target=self._write, args=(saved, copies, small, texts), name="checkpoint")
        self._thread.start()
        if not self.config.asynchronous:
            self.wait()

    def allocate_buffers(self, shards: dict[str, TensorShard]) -> None:
        """Allocates the copies on a thread: the first touch of memory costs more than the copy."""
        if self.config.asynchronous:
            self._thread = threading.Thread(
                target=lambda: [self._host_buffer(k, p.value).zero_() for k, p in shards.items()],
                name="checkpoint-buffers",
            )
            self._thread.start()

    def wait(self) -> None:
        """Waits until nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def results(self) -> list[SaveResult]:
        """What was finished since the last call."""
        done, self._done = self._done, []
        return done

    def _host_buffer(self, key: str, value: Tensor) -> Tensor:
        buffer = self._copies.get(key)
        if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
            buffer = self._copies[key] = empty_host_tensor(value)
        return buffer

    def _copy(self, key: str, value: Tensor) -> Tensor:
        return self._host_buffer(key, value).copy_(value.detach(), non_blocking=True)

    def _write(
        self, saved: SaveResult, shards: dict[str, TensorShard], state: dict[str, Any], texts: dict[str, str]
    ) -> None:
        """Runs on the thread: tries until all processes have succeeded, and records the outcome."""
        began, problem, notice = time.perf_counter(), "", ""
        for attempt in range(1 + self.config.retries):
            problem = self._attempt(saved.path, shards, state, texts)  # one text for all processes
            if not problem:
                break
            if attempt < self.config.retries:
                time.sleep(RETRY_DELAY)
        seconds = saved.blocked + time.perf_counter() - began
        if problem and self.config.retries:
            problem += f" (tried {1 + self.config.retries} times)"
        if not problem:
            notice = self._delete_expired(saved.path)
        self._done.append(replace(saved, seconds=seconds, problem=problem, notice=notice))

    def _attempt(
        self, final: Path, shards: dict[str, TensorShard], state: dict[str, Any], texts: dict[str, str]
    ) -> str:
        """Why this attempt failed, the same on every process; empty if the checkpoint is committed."""
        temporary = final.with_name(final.name + TEMPORARY)

        def prepare() -> None:
            remove_uncommitted(self.root)
            disk.make_directory(temporary)

        def finish() -> None:
            numbers = [number for p in committed(self.root) if (number := save_number(p)) < math.inf]
            write_json(temporary / STATE, {**state, "save": int(max(numbers, default=0)) + 1})
            for name, text in texts.items():
                disk.write_file(temporary / name, text.encode())
            commit(temporary, final)

        problem = (
            self._on_all_ranks(prepare if self.ranks.first else None, temporary)
            or self._on_all_ranks(lambda: write_shards(data_file(temporary, self.ranks.rank), shards), temporary)
            or self._on_all_ranks(finish if self.ranks.first else None, temporary)
        )
        if problem and self.ranks.first:
            for path in (temporary, final):  # frees the disk for the next attempt
                if is_uncommitted(path):
                    shutil.rmtree(path, ignore_errors=True)
        return problem

    def _on_all_ranks(self, work: Any, directory: Path) -> str:
        """Runs this process's part of a phase; returns the first problem that any process had."""
        problem = ""
        try:
            if work is not None:
                work()
        except OSError as error:
            problem = f"{error.filename or directory}: {error.strerror}"
            problem += free_space(directory) if error.errno in DISK_FULL else ""
        except Exception as error:
            problem = f"{directory}: {type(error).__name__}: {error}"
        return next((p for p in self.ranks.gather_texts(problem, self._group) if p), "")

    def _delete_expired(self, newest: Path) -> str:
        """Deletes what the policy does not keep; what counts as kept is read back from the disk first, by all processes
        together. Returns what the user should know of it."""
        messages: list[str] = []
        if self.ranks.first:
            try:
                messages = self._delete(newest)
            except OSError as error:
                messages = [f"{error.filename}: cannot be deleted: {error.strerror}"]
            self.ranks.gather_texts("", self._group)  # nothing more to be read
        else:
            while name := self.ranks.gather_texts("", self._group)[0]:
                self._read_back(self.root / name, newest)
        return "; ".join(messages)

    def _delete(self, newest: Path) -> list[str]:
        """The first process's part of `_delete_expired`."""
        wrong: dict[Path, str] = {}

        def is_intact(path: Path) -> bool:
            if self._intact.get(path) == (here := file_stats(path)):
                return True
            self.ranks.gather_texts(path.name, self._group)
            wrong[path] = self._read_back(path, newest)
            if not wrong[path]:
                self._intact[path] = here
            return not wrong[path]

        old, damaged = expired(self.root, self.config, is_intact=is_intact)
        for path in old:
            delete_checkpoint(path)
            self._intact.pop(path, None)
        messages = [
            f"{path} is damaged, and does not count as kept: {wrong.get(path) or 'it holds files of others'}"
            for path in damaged if path != newest and path not in self._damaged
        ]  # fmt: skip
        self._damaged.update(damaged)
        if wrong.get(newest):
            messages.insert(0, f"{wrong[newest]}: it was written, but does not read back; older checkpoints are kept")
        return messages

    def _read_back(self, path: Path, newest: Path) -> str:
        """What is wrong with a checkpoint, the same on every process: each reads a share, of the newest its own."""
        mine = data_file(path, self.ranks.rank) if path == newest else None
        found = verify_checkpoint(path, share=self.ranks.rank, of=self.ranks.world, only=mine)
        return next((line for text in self.ranks.gather_texts("\n".join(found), self._group) if (line := text)), "")


def file_stats(path: Path) -> list[tuple[str, int, int, int]]:
    """Name, size, time of the last change and inode of every file of a checkpoint: while these stay the same, its
    bytes are taken to be the same."""
    found = []
    for one in sorted(path.iterdir()):
        at = one.stat(follow_symlinks=False)
        found.append((one.name, at.st_size, at.st_mtime_ns, at.st_ino))
    return found


def free_space(path: Path) -> str:
    """How much room is left where `path` lies, for an error message."""
    here = next((p for p in (path, *path.parents) if p.exists()), Path("/"))
    try:
        free = shutil.disk_usage(here).free
    except OSError:
        return ""
    return f" ({free / 1e9:.2f} GB free there)" if free >= 1e9 else f" ({free / 1e6:.2f} MB free there)"


def raise_if_last_save_failed(saved: list[SaveResult]) -> None:
    """Raises UserError if the last of these saves failed: the end of a run must not be lost without an error."""
    if saved and saved[-1].problem:
        step, problem = saved[-1].step, saved[-1].problem
        fix = "make room or repair the directory, then go on with --resume from the checkpoint before it"
        raise UserError(f"the last checkpoint, of step {step}, could not be written: {problem}", fix)
