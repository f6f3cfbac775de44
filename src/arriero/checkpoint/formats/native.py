"""A run's checkpoint as a `PieceReader`: the parts that each process wrote, put together under global names."""

from __future__ import annotations

from pathlib import Path

from arriero.checkpoint.find import newest_checkpoint
from arriero.checkpoint.formats.huggingface import checked
from arriero.checkpoint.tensors.safetensors_file import SafetensorsFile
from arriero.checkpoint.tensors.stream import Assembly, Piece, PieceReader, check_cover, matrix_shape
from arriero.common.checkpoint_names import DAMAGED
from arriero.common.untrusted import read_json, require_inside
from arriero.model.config import LlamaConfig

_INDEX = {"tensors": {str: {"shape": [int], "offset": [int]}}}


def places(index: Path) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Of each tensor in a process's file: the whole's shape, and where the part begins in it.

    Raises:
        UserError: the index is not one.
    """
    tensors = read_json(require_inside(index.parent, index), DAMAGED, _INDEX)["tensors"]
    return {key: (tuple(t["shape"]), tuple(t["offset"])) for key, t in tensors.items()}


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
        file = SafetensorsFile(require_inside(directory, index.with_suffix(".safetensors")))
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
