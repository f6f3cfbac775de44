"""One SHA-256 of a whole training state, the same whatever layout wrote it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from arriero.checkpoint.directory import read_json
from arriero.checkpoint.load import CheckpointReader
from arriero.common.checkpoint_names import STATE


def state_sha256(checkpoint: Path) -> str:
    """Over step, and name, shape, dtype and bytes of every weight and moment, by name."""
    reader, total = CheckpointReader(checkpoint), hashlib.sha256()
    total.update(f"step {read_json(checkpoint / STATE)['step']}\n".encode())
    for key in reader.keys():  # noqa: SIM118 - a reader is no dict
        value = reader.read(key).contiguous()
        total.update(f"{key} {tuple(value.shape)} {value.dtype}\n".encode())
        total.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()
