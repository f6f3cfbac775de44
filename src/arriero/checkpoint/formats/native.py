"""A run's checkpoint as a `PieceReader`: the parts that each process wrote, put together under global names."""

from __future__ import annotations

import math
import os
from pathlib import Path

from arriero.checkpoint.formats.huggingface import checked
from arriero.checkpoint.tensors.safetensors_file import SafetensorsFile
from arriero.checkpoint.tensors.stream import Assembly, Piece, PieceReader, matrix_shape
from arriero.common.checkpoint_names import MARKER, STATE, step_of
from arriero.common.errors import UserError
from arriero.common.untrusted import inside, parse_json, read_json, read_text
from arriero.model.config import LlamaConfig

FIX = "the checkpoint is damaged: use another one"
_INDEX = {"tensors": {str: {"shape": [int], "offset": [int]}}}
_MAX_STATE_BYTES = 10_000_000


def save_number(path: Path) -> float:
    """Of all saves of its run, which one wrote this checkpoint; 0 for one of before they were counted.

    A run that goes on from an older checkpoint leaves later steps behind, which are not its newest then. One whose
    state cannot be read counts as the newest, so that its damage is found and named.
    """
    try:
        text = read_text(path / STATE, FIX, _MAX_STATE_BYTES)
        found = parse_json(text, str(path / STATE), FIX, dict).get("save", 0)
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


def places(index: Path) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Of each tensor in a process's file: the whole's shape, and where the part begins in it.

    Raises:
        UserError: the index is not one.
    """
    tensors = read_json(inside(index.parent, index), FIX, _INDEX)["tensors"]
    return {key: (tuple(t["shape"]), tuple(t["offset"])) for key, t in tensors.items()}


def is_checkpoint(path: Path) -> bool:
    """Whether `path` is one checkpoint of a run."""
    return (path / STATE).is_file() and any(path.glob("rank-*.json"))


def is_run(path: Path) -> bool:
    """Whether `path` is a run directory, one without a checkpoint included."""
    return (path / "checkpoints").is_dir() or all((path / name).is_file() for name in ("recipe.toml", "lock.json"))


def newest_checkpoint(path: Path) -> Path:
    """The checkpoint that `path` means: itself, or the newest whole one of the run.

    Raises:
        UserError: it was not committed, or there is none.
    """
    if is_checkpoint(path):
        if not (path / MARKER).is_file():
            raise UserError(f"{path}: was not committed, its writing was cut off", "name an earlier checkpoint")
        return path
    found = committed(path / "checkpoints")
    if not found:
        raise UserError(f"{path}: holds no checkpoint", "train until the first one is saved, or name another run")
    return found[-1]


def open_run(path: Path) -> tuple[PieceReader, LlamaConfig, Path]:
    """The weights of a checkpoint, or of a run's newest, with the model's shape and the checkpoint's directory.

    Raises:
        UserError: there is no whole checkpoint, or a part of a tensor is missing.
    """
    directory = newest_checkpoint(path)
    config = LlamaConfig.from_json(directory)
    shapes: dict[str, tuple[int, ...]] = {}
    pieces: dict[str, list[Piece]] = {}
    dtypes: dict[str, str] = {}
    for index in sorted(directory.glob("rank-*.json")):
        file = SafetensorsFile(inside(directory, index.with_suffix(".safetensors")))
        for name, (shape, offset) in places(index).items():
            if name.startswith(("exp_avg.", "exp_avg_sq.")):
                continue
            part = file.assembly(name)
            at_row, at_column = (*offset, 0)[:2] if offset else (0, 0)
            rows, columns = matrix_shape(part.shape)
            pieces.setdefault(name, []).append(Piece(part.pieces[0].source, 0, 0, rows, columns, at_row, at_column))
            shapes[name], dtypes[name] = shape, part.dtype
    tensors = {name: Assembly(dtypes[name], shapes[name], tuple(pieces[name])) for name in shapes}
    for name, tensor in tensors.items():
        check_cover(name, tensor, where=str(directory))
    return checked(PieceReader(tensors, where=str(directory)), config, where=str(directory)), config, directory


def check_cover(name: str, tensor: Assembly, *, where: str) -> None:
    """Raises UserError unless the pieces lie inside the tensor and have as many elements as it."""
    rows, columns = matrix_shape(tensor.shape)
    inside = all(
        p.at_row >= 0 and p.at_column >= 0 and p.at_row + p.rows <= rows and p.at_column + p.columns <= columns
        for p in tensor.pieces
    )
    area = sum(p.rows * p.columns for p in tensor.pieces)
    if not inside or area != rows * columns:
        raise UserError(f"{where}: {name} has {area:,} of {rows * columns:,} elements", FIX)
