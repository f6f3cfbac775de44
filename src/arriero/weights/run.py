"""A run's checkpoint as a `PieceReader`: the parts that each process wrote, put together under global names."""

from __future__ import annotations

from pathlib import Path

from arriero.common.errors import UserError
from arriero.common.untrusted import inside, read_json
from arriero.model.config import LlamaConfig
from arriero.weights.huggingface import checked
from arriero.weights.safetensors_file import SafetensorsFile
from arriero.weights.stream import Assembly, Piece, PieceReader, matrix_shape

FIX = "the checkpoint is damaged: use another one"


MARKER = "COMMITTED"  # checkpoint/layout.py has the rest of the names
_INDEX = {"tensors": {str: {"shape": [int], "offset": [int]}}}


def step_of(path: Path) -> int:
    """The step that a checkpoint's directory is named after."""
    return int(path.name.removeprefix("step-"))


def committed(root: Path) -> list[Path]:
    """All checkpoints below `root` that were written to the end, oldest first."""
    named = [p for p in root.glob("step-*") if p.name.removeprefix("step-").isdigit() and (p / MARKER).is_file()]
    return sorted(named, key=step_of)


def places(index: Path) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Of each tensor in a process's file: the whole's shape, and where the part begins in it.

    Raises:
        UserError: the index is not one.
    """
    tensors = read_json(inside(index.parent, index), FIX, _INDEX)["tensors"]
    return {key: (tuple(t["shape"]), tuple(t["offset"])) for key, t in tensors.items()}


def is_checkpoint(path: Path) -> bool:
    """Whether `path` is one checkpoint of a run."""
    return (path / "state.json").is_file() and any(path.glob("rank-*.json"))


def is_run(path: Path) -> bool:
    """Whether `path` is a run directory."""
    return (path / "checkpoints").is_dir()


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
