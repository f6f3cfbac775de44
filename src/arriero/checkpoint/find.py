"""Which checkpoint a path means: of a run the newest, or one by its name."""

from __future__ import annotations

import math
import os
from pathlib import Path

from arriero.common.checkpoint_names import DAMAGED, MARKER, STATE, step_of
from arriero.common.errors import UserError
from arriero.common.text import escape
from arriero.common.untrusted import parse_json, read_text

_MAX_STATE_BYTES = 10_000_000


def save_number(path: Path) -> float:
    """Of all saves of its run, which one wrote this checkpoint; 0 for one of before they were counted.

    A run that goes on from an older checkpoint leaves later steps behind, which are not its newest then. One whose
    state cannot be read counts as the newest, so that its damage is found and named.
    """
    try:
        text = read_text(path / STATE, DAMAGED, _MAX_STATE_BYTES)
        found = parse_json(text, str(path / STATE), DAMAGED, dict).get("save", 0)
    except UserError:
        return math.inf
    return found if type(found) is int and 0 <= found < 1 << 53 else math.inf


def committed(root: Path) -> list[Path]:
    """All checkpoints below `root` that were written to the end, in the order in which they were saved."""
    try:
        named = [p for p in root.iterdir() if step_of(p) >= 0 and (p / MARKER).is_file()]
    except OSError:
        return []
    return sorted(named, key=lambda p: (save_number(p), step_of(p)))


def run_of(path: Path) -> Path | None:
    """The run directory that a path means: itself, or for `RUN/checkpoints/step-N`, RUN; None for a checkpoint that
    lies in no run."""
    if not os.path.isfile(path / STATE):
        return path
    for one in (path, path.resolve()):
        if one.parent.name == "checkpoints" and one.name not in ("", "..") and ".." not in one.parts[-2:]:
            return one.parent.parent
    return None


def is_checkpoint(path: Path) -> bool:
    """Whether `path` is one checkpoint of a run."""
    return (path / STATE).is_file() and any(path.glob("rank-*.json"))


def is_run(path: Path) -> bool:
    """Whether `path` is a run directory, one without a checkpoint included."""
    return (path / "checkpoints").is_dir() or all((path / name).is_file() for name in ("recipe.toml", "lock.json"))


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that `path` means: itself, or the newest of the run. Raises UserError as `candidates` does."""
    return candidates(path)[0]


def candidates(path: Path) -> list[Path]:
    """The checkpoints that `path` means, the newest first: itself, or all committed ones of a run.

    Raises:
        UserError: there is none, or `path` is one that was not committed.
    """
    if not os.path.isdir(path):  # which, unlike Path.is_dir, takes any text
        raise UserError(f"{escape(path)}: no such directory", "name a run directory, or one of its checkpoints/step-*")
    if (path / STATE).is_file():
        if not (path / MARKER).is_file():
            raise UserError(f"{escape(path)}: not committed, its writing was cut off", "name an earlier checkpoint")
        return [path]
    found = committed(path / "checkpoints")
    if not found:
        fix = "train until the first checkpoint is saved (without --resume), or name another directory"
        if committed(path):
            fix = f"name the run's directory: --resume {escape(os.path.normpath(path / os.pardir))}"
        raise UserError(f"{escape(path)}: holds no checkpoint", fix)
    return found[::-1]
