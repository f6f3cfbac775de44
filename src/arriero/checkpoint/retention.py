"""Which checkpoints have expired, and deleting one. What arriero did not write itself is never deleted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from arriero.checkpoint import disk
from arriero.checkpoint.config import CheckpointConfig
from arriero.checkpoint.directory import TEMPORARY, only_checkpoint_files
from arriero.checkpoint.find import committed
from arriero.common.checkpoint_names import MARKER, step_of


def expired(
    root: Path, config: CheckpointConfig, *, is_intact: Callable[[Path], bool]
) -> tuple[list[Path], list[Path]]:
    """The committed checkpoints that the policy does not keep, oldest first, and the damaged ones that stay.

    Only intact ones count towards `config.keep`; a damaged one expires only once so many intact ones have been saved
    after it. A checkpoint with other files in it counts, and never expires.

    Args:
        root: the run's `checkpoints`.
        config: the policy.
        is_intact: whether every byte of a checkpoint is what was written; called from the newest on, and for no more
            than is needed.
    """
    if not config.keep:
        return [], []
    old: list[Path] = []
    damaged: list[Path] = []
    kept, found = 0, committed(root)
    for number, path in enumerate(reversed(found)):
        if config.keep_every and step_of(path) % config.keep_every == 0:
            kept += kept < config.keep and is_intact(path)
        elif kept == config.keep:
            old += [path] if only_checkpoint_files(path) else []
        elif len(found) - number <= config.keep - kept:  # all that are left are needed, intact or not
            break
        elif is_intact(path):
            kept += 1
        else:
            damaged.append(path)
    return old[::-1], damaged


def delete_checkpoint(path: Path) -> None:
    """Deletes a checkpoint, its marker first, so that a half-deleted one never counts as committed."""
    disk.remove(path / MARKER)
    disk.sync_directory(path)
    disk.remove_tree(path)


def is_uncommitted(path: Path) -> bool:
    """Whether `path` is a checkpoint whose writing was cut off, without other files in it."""
    return (path.suffix == TEMPORARY or not (path / MARKER).is_file()) and only_checkpoint_files(path)


def remove_uncommitted(root: Path) -> None:
    """Removes the checkpoints that were never committed, of a run that was killed."""
    for path in sorted(root.glob("step-*")) if root.is_dir() else []:
        if is_uncommitted(path):
            disk.remove_tree(path)
