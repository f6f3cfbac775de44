"""Megatron's `torch_dist` directories, read without Megatron and without unpickling.

They are torch's distributed checkpoints: `.metadata` is a pickle that lists, for each tensor, its chunks and where each
lies (a torch.save archive inside a `.distcp` file). torch's own reader would run that pickle; here it is followed
symbolically, as in torch_file.py. Layers are stacked on a first dimension, under Transformer Engine's names.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from arriero.checkpoint.formats.foreign_config import ConfigHints, ForeignModel
from arriero.checkpoint.formats.megatron import TRACKER, RankModel, combine_ranks, iteration_directory
from arriero.checkpoint.tensors.pickle_symbols import (
    MAX_PICKLE_BYTES,
    Call,
    TensorRef,
    non_negative_ints,
    parse_symbolically,
)
from arriero.checkpoint.tensors.raw_file import RawFile
from arriero.checkpoint.tensors.stream import ITEMSIZE, FileMatrix, Slice, TensorView, matrix_shape
from arriero.checkpoint.tensors.torch_file import TorchFile
from arriero.common.errors import UserError
from arriero.common.untrusted import read_bytes, require_file_name, require_inside
from arriero.model.config import MAX_LAYERS

FIX = "copy the whole directory again"


def is_torch_dist(path: Path) -> bool:
    """Whether the directory, or the iteration that its tracker names, is a distributed checkpoint."""
    try:
        folder = iteration_directory(path) if (path / TRACKER).is_file() else path
    except UserError:
        return False
    return (folder / ".metadata").is_file()


def open_torch_dist(path: Path, hints: ConfigHints) -> ForeignModel:
    """Opens a distributed checkpoint under Hugging Face's names; optimizer states are left out.

    Raises:
        UserError: a file, chunk or tensor is missing or broken, or the shape is unknown.
    """
    folder = iteration_directory(path)
    common = folder / "common.pt"  # Megatron before 0.19 keeps the arguments here
    payload = TorchFile(require_inside(folder, common)).root if common.is_file() else {}
    rank = RankModel(folder, [_unstack(_tensors(folder))], payload if isinstance(payload, dict) else {})
    return replace(combine_ranks(path, folder, {(0, 0): rank}, hints), kind="torch_dist", layout="torch_dist")


def _tensors(folder: Path) -> dict[str, TensorView]:
    """Every model tensor, whole, of up to three dimensions, the first two merged into rows."""
    metadata = require_inside(folder, folder / ".metadata")
    root = parse_symbolically(read_bytes(metadata, FIX, MAX_PICKLE_BYTES), str(metadata))
    try:
        return _described(folder, root)
    except (AttributeError, KeyError, TypeError, ValueError, IndexError, OverflowError):  # of another form than DCP's
        raise UserError(f"{metadata}: is no distributed checkpoint's", FIX) from None


def _described(folder: Path, root: Any) -> dict[str, TensorView]:
    described = root.state["state_dict_metadata"]
    places = {_place(index): info.state for index, info in root.state["storage_data"].items()}
    files: dict[str, RawFile] = {}
    tensors = {}
    for key, entry in described.items():
        state = entry.state if isinstance(entry, Call) and isinstance(entry.state, dict) else {}
        if (
            not isinstance(state.get("chunks"), list)
            or key.startswith(("optimizer.", "chained_"))
            or "_extra_state" in key
        ):
            continue
        shape = non_negative_ints(state["size"])
        slices: list[Slice] = []
        for chunk in state["chunks"]:
            offsets, sizes = non_negative_ints(chunk.state["offsets"]), non_negative_ints(chunk.state["sizes"])
            place = places.get((key, offsets))
            if place is None:
                raise UserError(f"{folder}: does not list where {key} at {list(offsets)} lies", FIX)
            stored = _stored(folder, place, files, key)
            if stored.shape != sizes:
                raise UserError(f"{folder}: {key} at {list(offsets)} is {list(stored.shape)}, not {list(sizes)}", FIX)
            dtype = stored.dtype
            slices += _placed(stored, shape, offsets, sizes)
        tensors[str(key)] = TensorView(dtype, shape, tuple(slices))
        tensors[str(key)].check_coverage(f"{folder}: {key}")
    return tensors


def _place(index: Any) -> tuple[str, tuple[int, ...] | None]:
    offset, name = index.state.get("offset"), index.state["fqn"]
    return name if isinstance(name, str) else "", None if offset is None else non_negative_ints(offset)


def _stored(folder: Path, place: dict[str, Any], files: dict[str, RawFile], key: str) -> TensorView:
    """One chunk's archive inside its .distcp file."""
    name = require_file_name(place["relative_path"], str(folder / ".metadata"))
    if name not in files:
        files[name] = RawFile(require_inside(folder, folder / name))
    begin, size = int(place["offset"]), int(place["length"])
    if begin < 0 or size < 0 or begin + size > files[name].size:
        raise UserError(f"{folder / name}: ends before {key}", FIX)
    archive = TorchFile(folder / name, begin=begin, size=size, file=files[name])
    if not isinstance(archive.root, TensorRef):
        raise UserError(f"{folder / name}: {key} is no tensor", FIX)
    return archive.tensor(archive.root, key)


def _placed(
    stored: TensorView, shape: tuple[int, ...], offsets: tuple[int, ...], sizes: tuple[int, ...]
) -> list[Slice]:
    """A chunk as slices of the tensor seen as a matrix: one for each layer in it."""
    source = stored.slices[0].source
    if len(shape) < 3:
        rows, columns = matrix_shape(sizes)
        out_row, out_column = (*offsets, 0, 0)[:2]
        return [Slice(source, 0, 0, rows, columns, out_row, out_column)]
    deep, rows, columns = sizes
    return [
        Slice(source, i * rows, 0, rows, columns, (offsets[0] + i) * shape[1] + offsets[1], offsets[2])
        for i in range(deep)
    ]


def _unstack(tensors: dict[str, TensorView]) -> dict[str, TensorView]:
    """Gives each layer of a stacked tensor its own name."""
    result: dict[str, TensorView] = {}
    for key, tensor in tensors.items():
        if not tensor.shape or not key.startswith("decoder.layers.") or re.match(r"decoder\.layers\.[0-9]+\.", key):
            result[key] = tensor
            continue
        count, shape = tensor.shape[0], tensor.shape[1:]
        if count > MAX_LAYERS:
            raise UserError(f"{key} stacks {count:,} layers", FIX)
        for n in range(count):
            name = key.replace("decoder.layers.", f"decoder.layers.{n}.")
            if len(shape) == 1:  # [layers, n]: a row of the matrix becomes a column of its own
                result[name] = TensorView(tensor.dtype, shape, _row_as_column(tensor.slices, n))
            else:
                slices = tuple(tensor.window(n * shape[0], 0, *shape))
                result[name] = TensorView(tensor.dtype, shape, slices)
    return result


def _row_as_column(slices: tuple[Slice, ...], row: int) -> tuple[Slice, ...]:
    """Row `row` of a matrix of stacked vectors, as a vector: the elements are columns there and rows here."""
    found = []
    for part in slices:
        if not part.out_row <= row < part.out_row + part.rows:
            continue
        source = part.source
        assert isinstance(source, FileMatrix)
        start = source.offset + (part.row + row - part.out_row) * source.row_bytes
        item = ITEMSIZE[source.dtype]
        vector = replace(source, offset=start + part.column * item, rows=part.columns, columns=1, row_bytes=item)
        found.append(Slice(vector, 0, 0, part.columns, 1, out_row=part.out_column))
    return tuple(found)
