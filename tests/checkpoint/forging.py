"""Making a changed checkpoint whole again, as whoever can write its files can do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from arriero.checkpoint.directory import MANIFEST, file_digest
from arriero.common.checkpoint_names import MARKER


def seal(checkpoint: Path, **manifest: Any) -> None:
    """Writes manifest (with keys replaced) and marker anew, as the files are now."""
    known = json.loads((checkpoint / MANIFEST).read_text())
    files = {p.name: file_digest(p) for p in sorted(checkpoint.iterdir())
             if p.is_file() and p.suffix != ".safetensors" and p.name not in (MANIFEST, MARKER)}  # fmt: skip
    (checkpoint / MANIFEST).write_text(json.dumps({**known, "files": files, **manifest}))
    (checkpoint / MARKER).write_text(json.dumps({"manifest": file_digest(checkpoint / MANIFEST)}))


def change_json(path: Path, **values: Any) -> None:
    """Replaces keys of a JSON file; a__b is b within a, and a value of ... removes the key."""
    tree = json.loads(path.read_text())
    for key, value in values.items():
        *outer, last = key.split("__")
        inner = tree
        for name in outer:
            inner = inner[name]
        if value is ...:
            del inner[last]
        else:
            inner[last] = value
    path.write_text(json.dumps(tree))
