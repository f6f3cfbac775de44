"""Which checkpoints may go, and how one goes."""

from __future__ import annotations

from pathlib import Path

from arriero.checkpoint import disk
from arriero.checkpoint.config import CheckpointConfig
from arriero.checkpoint.layout import MARKER, TEMPORARY, committed, step_of


def superfluous(root: Path, config: CheckpointConfig) -> list[Path]:
    """The committed checkpoints that the policy does not keep, oldest first."""
    found = committed(root)
    newest = set(found[-config.keep :]) if config.keep else set(found)
    kept_for_good = {p for p in found if config.keep_every and step_of(p) % config.keep_every == 0}
    return [path for path in found if path not in newest | kept_for_good]


def forget(path: Path) -> None:
    """Deletes a checkpoint, its marker first of all, so that a half-deleted one never counts as whole."""
    disk.remove(path / MARKER)
    disk.sync_directory(path)
    disk.remove_tree(path)


def sweep(root: Path) -> None:
    """Removes what a run that was killed left behind: directories that were never committed."""
    for path in root.glob("step-*"):
        if path.suffix == TEMPORARY or not (path / MARKER).is_file():
            disk.remove_tree(path)
