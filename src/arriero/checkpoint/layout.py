"""Names inside a run's `checkpoints/`, the manifest, and how a directory becomes whole all at once.

checkpoints/step-00000100/
    config.json            the model's shape, Hugging Face's form
    recipe.toml            the recipe of the run that wrote it
    state.json             step, consumed samples, loss scale, ...
    rank-00000.safetensors what one process wrote: weights and moments, under global names
    rank-00000.json        where each of those parts lies in its whole tensor
    manifest.json          size and SHA-256 of every file above
    COMMITTED              written last: a directory without it does not count
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from arriero.errors import UserError

MARKER = "COMMITTED"
MANIFEST = "manifest.json"
STATE = "state.json"
TEMPORARY = ".tmp"


def step_directory(root: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies below `checkpoints/`."""
    return root / f"step-{step:08d}"


def committed(root: Path) -> list[Path]:
    """All whole checkpoints below `root`, oldest first."""
    return sorted(path for path in root.glob("step-*") if path.suffix != TEMPORARY and (path / MARKER).is_file())


def file_digest(path: Path) -> dict[str, Any]:
    """Size in bytes and SHA-256 of a file."""
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def write_json(path: Path, value: object) -> None:
    """Writes JSON and waits until the disk has it."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def read_json(path: Path) -> Any:
    """Reads JSON.

    Raises:
        UserError: the file is missing or broken.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file", "the checkpoint is not whole: use another one") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})", "the checkpoint is damaged: use another one") from None


def sync_directory(path: Path) -> None:
    """Waits until the disk has the directory's entries."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def commit(temporary: Path, final: Path) -> None:
    """Writes the manifest of what is in `temporary`, renames it to `final` and marks it whole."""
    files = sorted(path for path in temporary.iterdir() if path.is_file())
    write_json(temporary / MANIFEST, {"files": {path.name: file_digest(path) for path in files}})
    sync_directory(temporary)
    os.rename(temporary, final)
    sync_directory(final.parent)
    write_json(final / MARKER, {"manifest": file_digest(final / MANIFEST)})
    sync_directory(final)


def verify(path: Path) -> list[str]:
    """Checks every file against the manifest; returns what is wrong, one sentence each."""
    if not (path / MARKER).is_file():
        return [f"{path}: not committed, its writing was cut off"]
    marker = read_json(path / MARKER)
    if marker.get("manifest") != file_digest(path / MANIFEST):
        return [f"{path / MANIFEST}: not the manifest that was committed"]
    wrong, listed = [], read_json(path / MANIFEST)["files"]
    for name, expected in listed.items():
        if not (path / name).is_file():
            wrong.append(f"{path / name}: missing")
        elif file_digest(path / name) != expected:
            wrong.append(f"{path / name}: size or SHA-256 differs from the manifest")
    extra = {p.name for p in path.iterdir()} - set(listed) - {MANIFEST, MARKER}
    return wrong + [f"{path / name}: not in the manifest" for name in sorted(extra)]
