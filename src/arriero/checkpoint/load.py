"""Reading a checkpoint under any layout: the tensor's parts that overlap the slice, and no other byte."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from arriero.checkpoint.formats.native import places
from arriero.checkpoint.tensors.raw_file import RawFile
from arriero.checkpoint.tensors.safetensors_file import SafetensorsFile
from arriero.checkpoint.tensors.stream import torch_dtype
from arriero.checkpoint.verify import shape_problems, verify
from arriero.common.checkpoint_names import DAMAGED
from arriero.common.errors import UserError
from arriero.common.files import open_regular
from arriero.common.text import shown
from arriero.common.untrusted import require_inside
from arriero.distributed.parallel.mesh import Ranks
from arriero.model.config import LlamaConfig


@dataclass(frozen=True)
class StoredPart:
    """A piece of a whole tensor in a file."""

    path: Path
    offset: tuple[int, ...]
    """Where the piece begins in the whole."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int
    """Byte of the file at which it begins."""


class CheckpointReader:
    """Gives slices of whole tensors out of the parts that the processes of another layout wrote.

    Keys are the parameters' global names, and `exp_avg.NAME` and `exp_avg_sq.NAME` for the moments.

    Raises:
        UserError: on opening, if an index or a data file's header is not what it should be.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._parts: dict[str, list[StoredPart]] = {}
        self._files: dict[Path, RawFile] = {}
        self._maps: dict[Path, mmap.mmap] = {}
        for index in sorted(directory.glob("rank-*.json")):
            path = index.with_suffix(".safetensors")
            file = SafetensorsFile(require_inside(directory, path))
            self._files[path] = RawFile(path)
            for key, (whole, offset) in places(index).items():
                part = file.assembly(key)
                if not len(whole) == len(offset) == len(part.shape) or min((0, *whole, *offset)) < 0:
                    raise UserError(
                        f"{index}: {shown(key)} is {list(part.shape)} at {list(offset)} of {list(whole)}", DAMAGED
                    )
                dtype = torch_dtype(part.dtype)
                start = part.pieces[0].source.offset  # type: ignore[attr-defined]
                self._shapes[key] = whole
                self._parts.setdefault(key, []).append(StoredPart(path, offset, part.shape, dtype, start))
        for key, whole in self._shapes.items():  # before memory is taken for a shape that a file merely claims
            held, needed = sum(math.prod(part.shape) for part in self._parts[key]), math.prod(whole)
            if held != needed:
                raise UserError(f"{directory}: {shown(key)} has {held} of {needed} elements", DAMAGED)

    def keys(self) -> list[str]:
        """Weights and moments."""
        return sorted(self._shapes)

    def names(self) -> list[str]:
        """The parameters' names."""
        return [key for key in self.keys() if not key.startswith("exp_avg")]

    def shape(self, name: str) -> tuple[int, ...]:
        """The whole tensor's shape."""
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """The stored dtype."""
        return self._parts[name][0].dtype

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> torch.Tensor:
        """The part of `name` that `index` (a slice a dimension, step 1) selects.

        Raises:
            UserError: the checkpoint lacks the tensor, or a part of it.
        """
        if name not in self._parts:
            raise UserError(f"{self.directory}: holds no tensor {name}", "use a checkpoint of the same model")
        wanted = [range(n)[s] for n, s in zip(self._shapes[name], index or (slice(None),) * 9, strict=False)]
        out = torch.empty([len(r) for r in wanted], dtype=self.dtype(name))
        self.read_into(name, [r.start for r in wanted], out)
        return out

    def read_into(self, name: str, start: list[int], out: torch.Tensor) -> None:
        """Fills `out` with the part of `name` that begins at `start`, without another copy of it.

        Raises:
            UserError: as `read`.
        """
        filled = 0
        for part in self._parts[name]:
            here, there = [], []
            for first, length, o, n in zip(start, out.shape, part.offset, part.shape, strict=True):
                low, high = max(first, o), min(first + length, o + n)
                here.append(slice(low - o, max(low, high) - o))
                there.append(slice(low - first, max(low, high) - first))
            if all(s.stop > s.start for s in here):
                target = out[tuple(there)]
                if target.is_contiguous() and all(
                    s.stop - s.start == n for s, n in zip(here[1:], part.shape[1:], strict=True)
                ):
                    self._read_rows(part, here[0].start if here else 0, target)
                else:
                    target.copy_(self._view(part)[tuple(here)])
                filled += target.numel()
        if filled != out.numel():
            raise UserError(f"{self.directory}: {name} has {filled} of {out.numel()} elements", DAMAGED)

    def _read_rows(self, part: StoredPart, row: int, target: torch.Tensor) -> None:
        """Whole rows: their bytes go where they belong, past all page tables."""
        flat = target.reshape(-1).view(torch.uint8).numpy().data
        start = part.start + row * (len(flat) // max(1, target.shape[0] if target.dim() else 1))
        self._files[part.path].read_into(start, flat)

    def _view(self, part: StoredPart) -> torch.Tensor:
        """The part in the file's own pages: only what is touched is read."""
        if part.path not in self._maps:
            with open(open_regular(part.path), "rb") as file:
                self._maps[part.path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        count = torch.Size(part.shape).numel()
        flat = torch.frombuffer(self._maps[part.path], dtype=part.dtype, count=count, offset=part.start)
        return flat.view(part.shape)


def newest_intact_checkpoint(
    paths: list[Path], ranks: Ranks, *, say: Callable[[str], None], model: LlamaConfig | None = None
) -> Path:  # fmt: skip
    """The first of these checkpoints in which every byte is as it was written; the processes share the reading.

    Args:
        paths: the best first; the same on every process.
        ranks: this process's place.
        say: is told loudly of each one that is damaged.
        model: what the checkpoint must hold the tensors of; compared before any of them is read.

    Raises:
        UserError: none of them is whole.
    """
    for path in paths:
        mine = "\n".join(
            (shape_problems(path, model) if model else []) or verify(path, share=ranks.rank, of=ranks.world)
        )
        wrong = list(dict.fromkeys(line for text in ranks.texts(mine) for line in text.splitlines()))
        if not wrong:
            return path
        listed = [*wrong[:4], f"and {len(wrong) - 4} more"] if len(wrong) > 5 else wrong
        for line in listed:
            say(f" DAMAGED: {line}")
        say(f" DAMAGED: {shown(path)} is not used")
    raise UserError(f"{paths[0].parent}: no checkpoint there is whole", "start again, or from a copy kept elsewhere")
