"""Reading a checkpoint under any layout: the shards that overlap the slice, and no other byte."""

from __future__ import annotations

from pathlib import Path

from arriero.checkpoint.directory import read_json
from arriero.checkpoint.tensors.safetensors_file import SafetensorsFile
from arriero.checkpoint.tensors.stream import Slice, TensorView, ViewReader, matrix_shape
from arriero.common.checkpoint_names import DAMAGED, is_optimizer_state
from arriero.common.errors import UserError
from arriero.common.text import escape
from arriero.common.untrusted import require_inside

INDEX = {"tensors": {str: {"shape": [int], "offset": [int], "part": [int], "dtype": str}}}
"""The part of a `rank-*.json` that places the shards: shape of the whole, where the shard begins, its own shape."""


class CheckpointReader(ViewReader):
    """The whole tensors of a checkpoint, out of the shards that the processes of any layout wrote.

    Keys are the parameters' global names, and STATE.NAME for the optimizer's states, such as `exp_avg.NAME`. `mapped`
    reads columns faster (see `RawFile`).

    Raises:
        UserError: on opening, if an index or a data file's header is not what it should be, or shards are missing.
    """

    def __init__(self, directory: Path, *, mapped: bool = True) -> None:
        shapes: dict[str, tuple[int, ...]] = {}
        dtypes: dict[str, str] = {}
        slices: dict[str, list[Slice]] = {}
        for index in sorted(directory.glob("rank-*.json")):
            file = SafetensorsFile(require_inside(directory, index.with_suffix(".safetensors")), mapped=mapped)
            for key, entry in read_json(index, INDEX)["tensors"].items():
                shape, offset, shard = tuple(entry["shape"]), tuple(entry["offset"]), file.view(key)
                if shapes.setdefault(key, shape) != shape or not _fits(shape, offset, shard.shape):
                    place = f"{list(shard.shape)} at {list(offset)} of {list(shape)}"
                    raise UserError(f"{index}: {escape(key)} is {place}", DAMAGED)
                if dtypes.setdefault(key, shard.dtype) != shard.dtype:
                    raise UserError(f"{index}: {escape(key)} is {shard.dtype} here, {dtypes[key]} elsewhere", DAMAGED)
                rows, columns = matrix_shape(shard.shape)
                out_row, out_column = (*offset, 0, 0)[:2]
                source = shard.slices[0].source
                slices.setdefault(key, []).append(Slice(source, 0, 0, rows, columns, out_row, out_column))
        views = {key: TensorView(dtypes[key], shapes[key], tuple(slices[key])) for key in sorted(shapes)}
        for key, view in views.items():  # before memory is allocated for a shape that a file merely claims
            view.check_coverage(f"{directory}: {escape(key)}")
        super().__init__(views, where=str(directory))

    def keys(self) -> list[str]:
        """Weights and optimizer states, sorted."""
        return list(self.tensors)

    def names(self) -> list[str]:
        """The parameters' names, sorted."""
        return [key for key in self.tensors if not is_optimizer_state(key, self.tensors)]

    def weights(self) -> ViewReader:
        """The parameters without the optimizer's states."""
        return ViewReader({name: self.tensors[name] for name in self.names()}, where=self.where)


def _fits(shape: tuple[int, ...], offset: tuple[int, ...], part: tuple[int, ...]) -> bool:
    """Whether a shard has as many dimensions as its tensor, at most two, and no negative size."""
    return len(shape) == len(offset) == len(part) <= 2 and min((0, *shape, *offset)) == 0
