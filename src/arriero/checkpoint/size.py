"""How large a checkpoint will be, and how much room its disk has."""

from __future__ import annotations

import shutil
from pathlib import Path

from arriero.model.config import LlamaConfig, count_parameters


def checkpoint_bytes(model: LlamaConfig, dtype: str) -> int:
    """Bytes of one checkpoint: of each parameter the weight and two moments, in float32, or float64 in a proof."""
    return 3 * count_parameters(model) * (8 if dtype == "float64" else 4)


def disk_usage(path: Path) -> tuple[int, int] | None:
    """Bytes in all and free on the disk on which `path` lies or would lie; None where the system does not give it."""
    try:
        here = next((p for p in (path, *path.resolve().parents) if p.exists()), Path("/"))
        usage = shutil.disk_usage(here)
    except (OSError, ValueError):
        return None
    return (usage.total, usage.free) if usage.total else None


def directory_bytes(checkpoint: Path) -> int:
    """Bytes of the files of a checkpoint."""
    return sum(path.lstat().st_size for path in checkpoint.iterdir())


def format_bytes(count: float) -> str:
    """A size as text: 103 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
