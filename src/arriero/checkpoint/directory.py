"""A checkpoint's directory: its files' names, the chain of digests over them, and the atomic commit.

checkpoints/step-00000100/
    config.json            the model's shape, Hugging Face's form
    recipe.toml            the recipe of the run that wrote it
    state.json             step, number of the save, consumed samples, loss scale, versions, ...
    rank-00000.safetensors the shards of one process: weights and moments, under global names
    rank-00000.json        of each shard: its place in the whole tensor, and the SHA-256 of its bytes
    manifest.json          size and SHA-256 of every small file above
    COMMITTED              SHA-256 of the manifest, written last: a directory without it is not used
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from arriero.checkpoint import disk
from arriero.common import untrusted
from arriero.common.checkpoint_names import DAMAGED, MARKER, step_of
from arriero.common.files import open_regular

FORMAT = 1
MANIFEST = "manifest.json"
TEMPORARY = ".tmp"


_WRITTEN = re.compile(
    r"rank-[0-9]{5,}\.(safetensors|json)|(config|state|manifest)\.json|recipe\.toml|COMMITTED(\.tmp)?"
)


def is_checkpoint_file(name: str) -> bool:
    """Whether arriero itself gives this name to a file of a checkpoint."""
    return _WRITTEN.fullmatch(name) is not None


def step_directory(root: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies below `checkpoints/`."""
    return root / f"step-{step:08d}"


def file_digest(path: Path) -> dict[str, Any]:
    """Size in bytes and SHA-256 of a file."""
    with open(open_regular(path), "rb") as file:
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def write_json(path: Path, value: object) -> None:
    """Writes JSON and waits until the disk has it."""
    disk.write_file(path, json.dumps(value, indent=1).encode() + b"\n")


def read_json(path: Path, form: Any = dict) -> Any:
    """Reads a file of the checkpoint that holds JSON of this form.

    Raises:
        UserError: the file is missing, broken or of another form.
    """
    return untrusted.read_json(untrusted.require_inside(path.parent, path), DAMAGED, form)


def only_checkpoint_files(path: Path) -> bool:
    """Whether `path` is a checkpoint, committed or not, without other files in it: nothing else is ever removed."""
    bare = path.with_suffix("") if path.suffix == TEMPORARY else path
    if step_of(bare) < 0 or path.is_symlink() or not path.is_dir():
        return False
    return all(is_checkpoint_file(one.name) and not one.is_dir() for one in path.iterdir())


def remove_previous(final: Path) -> None:
    """Removes a checkpoint of the same step, of a start that this one does not continue.

    Raises:
        OSError: something else is there.
    """
    if not os.path.lexists(final):
        return
    if not only_checkpoint_files(final):
        raise OSError(errno.EEXIST, "is in the way of the checkpoint, and holds what arriero did not write", str(final))
    disk.remove_tree(final)


def commit(temporary: Path, final: Path) -> None:
    """Writes the manifest of what is in `temporary`, renames it to `final` and writes the marker.

    The data files are covered by the digests in their `rank-*.json`, so that they are not read again here.
    """
    small = sorted(path for path in temporary.iterdir() if path.suffix != ".safetensors")
    large = sorted(path.name for path in temporary.iterdir() if path.suffix == ".safetensors")
    files = {path.name: file_digest(path) for path in small}
    write_json(temporary / MANIFEST, {"format": FORMAT, "files": files, "data": large})
    disk.sync_directory(temporary)
    remove_previous(final)
    disk.rename(temporary, final)
    disk.sync_directory(final.parent)
    pending = final / (MARKER + TEMPORARY)
    write_json(pending, {"manifest": file_digest(final / MANIFEST)})
    disk.rename(pending, final / MARKER)  # half a marker would be one
    disk.sync_directory(final)
