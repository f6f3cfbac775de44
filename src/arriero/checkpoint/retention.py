"""Which checkpoints may go, and how one goes. What arriero did not write itself is never touched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from arriero.checkpoint import disk
from arriero.checkpoint.config import CheckpointConfig
from arriero.checkpoint.directory import TEMPORARY, only_checkpoint_files
from arriero.checkpoint.find import committed
from arriero.common.checkpoint_names import MARKER, step_of


def expired(root: Path, config: CheckpointConfig, *, whole: Callable[[Path], bool]) -> tuple[list[Path], list[Path]]:
    """The committed checkpoints that the policy does not keep, oldest first, and the damaged ones that stay.

    Only those that are `whole` count towards `config.keep`; a damaged one is removed only once so many whole ones
    have been saved after it.

    Args:
        root: the run's `checkpoints`.
        config: the policy.
        whole: whether every byte of a checkpoint is what was written; asked from the newest on, and of no more than
            have to be known.
    """
    if not config.keep:
        return [], []
    old: list[Path] = []
    damaged: list[Path] = []
    kept, found = 0, committed(root)
    for number, path in enumerate(reversed(found)):
        ours = only_checkpoint_files(path)
        if config.keep_every and step_of(path) % config.keep_every == 0:
            kept += kept < config.keep and ours and whole(path)
        elif kept == config.keep:
            old += [path] if ours else []
        elif len(found) - number <= config.keep - kept:  # all that are left are needed, whatever they are worth
            break
        elif ours and whole(path):
            kept += 1
        else:
            damaged.append(path)
    return old[::-1], damaged


def delete_checkpoint(path: Path) -> None:
    """Deletes a checkpoint, its marker first of all, so that a half-deleted one never counts as whole."""
    disk.remove(path / MARKER)
    disk.sync_directory(path)
    disk.remove_tree(path)


def is_uncommitted(path: Path) -> bool:
    """Whether `path` is a checkpoint whose writing was cut off, and nothing else."""
    return (path.suffix == TEMPORARY or not (path / MARKER).is_file()) and only_checkpoint_files(path)


def remove_uncommitted(root: Path) -> None:
    """Removes what a run that was killed left behind: checkpoints that were never committed."""
    for path in sorted(root.glob("step-*")) if root.is_dir() else []:
        if is_uncommitted(path):
            disk.remove_tree(path)
