"""PREFIX.manifest.json: where a data set came from, how it was made, and the SHA-256 of what was written.

It is renamed into place last, after every .bin and .idx: a set without it is foreign or unfinished.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from pathlib import Path
from typing import Any

from arriero.common.errors import UserError
from arriero.common.untrusted import read_json, require_file_name
from arriero.data.indexed import bin_path, idx_path
from arriero.data.output import create_file

VERSION = 1
_OUTPUT_SCHEMA = {
    "dtype": str, "sequences": int, "documents": int, "tokens": int, "bin_bytes": int, "bin_sha256": str,
    "idx_sha256": str,
}  # fmt: skip
RECORD_COUNTS = ("in", "out", "quarantined", "empty")
MANIFEST_SCHEMA = {
    "version": int, "tokenizer": {"path": str, "vocab_size": int, "fingerprint": str}, "request": dict,
    "sources": [{"sha256": str}], "records": dict.fromkeys(RECORD_COUNTS, int), "text_bytes": int,
    "largest_id": int, "outputs": {str: _OUTPUT_SCHEMA},
}  # fmt: skip
"""What is read from a manifest."""


def manifest_path(out: str) -> Path:
    """PREFIX.manifest.json of `prepare --out PREFIX`."""
    return Path(f"{out}.manifest.json")


def sha256_file(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(out: str, manifest: dict[str, Any]) -> None:
    """Writes and renames the manifest, flushed to disk."""
    path = manifest_path(out)
    scratch = path.with_name(path.name + ".partial")
    with io.TextIOWrapper(create_file(scratch), encoding="utf-8") as file:
        json.dump({"version": VERSION, **manifest}, file, indent=1, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)


def read_manifest(out: str) -> dict[str, Any] | None:
    """The manifest of `prepare --out PREFIX`, or None. Raises UserError for a damaged one."""
    path = manifest_path(out)
    if not os.path.isfile(path):
        return None
    fix = "prepare the data set again with --overwrite"
    found: dict[str, Any] = read_json(path, fix, MANIFEST_SCHEMA)
    if found["version"] != VERSION:
        raise UserError(f"{path}: is of version {found['version']}, known: {VERSION}", fix)
    for name in found["outputs"]:
        require_file_name(name, str(path))
    return found


def find_manifest(prefix: str) -> tuple[str, dict[str, Any]] | None:
    """Finds the manifest of a single data set: that of X_text_document is X.manifest.json.

    Returns:
        the name of the set in the manifest's `outputs` and the manifest, or None for a foreign set.
    """
    path = Path(prefix)
    words = path.name.split("_")
    for n in range(len(words), 0, -1):
        if not any(words[:n]):
            break  # the name begins with an underscore: what is in front of it is no name
        out = str(path.with_name("_".join(words[:n])))
        found = read_manifest(out)
        name = "_".join(words[n:])
        if found is not None and (name in found["outputs"] or n == len(words)):
            return name, found
    return None


def verify_checksums(prefix: str, entry: dict[str, Any]) -> list[str]:
    """Compares both files of a data set with a manifest's entry; returns what differs."""
    wrong = []
    for path, key in ((bin_path(prefix), "bin_sha256"), (idx_path(prefix), "idx_sha256")):
        if not path.is_file():
            wrong.append(f"{path} is missing")
        elif sha256_file(path) != entry[key]:
            wrong.append(f"{path}: SHA-256 differs from the manifest")
    return wrong
