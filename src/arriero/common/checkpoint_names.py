"""The file names that mark a committed checkpoint, for all that write files: nothing may be written into one."""

from __future__ import annotations

import re
from collections.abc import Container
from pathlib import Path

MARKER = "COMMITTED"
"""Written last: a directory without it is no checkpoint. checkpoint/directory.py has the rest of the names."""
STATE = "state.json"
DAMAGED = "the checkpoint is damaged: use another one"
_NAME = re.compile(r"step-([0-9]{8,})")


def step_of(path: Path) -> int:
    """The step that a checkpoint's directory is named after; -1 for a name that arriero gives to none."""
    found = _NAME.fullmatch(path.name)
    return int(found[1]) if found and path.name == f"step-{int(found[1]):08d}" else -1


def inside_checkpoints_of_run(path: Path) -> Path | None:
    """The `checkpoints` directory of a run in which `path` lies, links followed: only checkpoints belong there."""
    try:
        for p in path.resolve().parents:
            if p.name == "checkpoints" and (p.parent / "recipe.toml").is_file() and (p.parent / "env.json").is_file():
                return p
    except (OSError, ValueError, RuntimeError):  # a name that no file can have, or links in a circle
        pass
    return None


def enclosing_checkpoint(path: Path) -> Path | None:
    """The checkpoint that `path` is or lies in, links followed, or whose place it would take: nothing may be written
    there."""
    try:
        real = path.resolve()
        for p in (real, *real.parents):
            if (p / MARKER).is_file() and (p / STATE).is_file():
                return p
            if p.parent.name == "checkpoints" and step_of(p.with_suffix("") if p.suffix == ".tmp" else p) >= 0:
                return p
    except (OSError, ValueError, RuntimeError):  # a name that no file can have, or links in a circle
        pass
    return None


def is_optimizer_state(key: str, keys: Container[str]) -> bool:
    """Whether a tensor of a checkpoint is an optimizer's state, STATE.PARAMETER; `keys` are all tensors."""
    return key.partition(".")[2] in keys
