"""Reading a checkpoint under any layout: the tensor's parts that overlap the slice, and no other byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from arriero.checkpoint.layout import STATE, committed, read_json, verify
from arriero.errors import UserError


class CheckpointReader:
    """Gives slices of whole tensors out of the parts that the processes of another layout wrote.

    Keys are the parameters' global names, and `exp_avg.NAME` and `exp_avg_sq.NAME` for the moments.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._parts: dict[str, list[tuple[Path, tuple[int, ...]]]] = {}
        self._open: dict[Path, Any] = {}
        for index in sorted(directory.glob("rank-*.json")):
            for key, part in read_json(index).items():
                self._shapes[key] = tuple(part["shape"])
                self._parts.setdefault(key, []).append((index.with_suffix(".safetensors"), tuple(part["offset"])))

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
        path, _ = self._parts[name][0]
        return self._file(path).get_slice(name)[:0].dtype

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> torch.Tensor:
        """The part of `name` that `index` (a slice a dimension, step 1) selects.

        Raises:
            UserError: the checkpoint lacks the tensor, or a part of it.
        """
        if name not in self._parts:
            raise UserError(f"{self.directory}: holds no tensor {name}", "use a checkpoint of the same model")
        wanted = [range(n)[s] for n, s in zip(self._shapes[name], index or (slice(None),) * 9, strict=False)]
        out, filled = torch.empty([len(r) for r in wanted], dtype=self.dtype(name)), 0
        for path, offset in self._parts[name]:
            source = self._file(path).get_slice(name)
            here, there = [], []
            for r, o, n in zip(wanted, offset, source.get_shape(), strict=True):
                start, stop = max(r.start, o), min(r.stop, o + n)
                here.append(slice(start - o, max(start, stop) - o))
                there.append(slice(start - r.start, max(start, stop) - r.start))
            if all(s.stop > s.start for s in here):
                piece = source[tuple(here)]
                out[tuple(there)] = piece
                filled += piece.numel()
        if filled != out.numel():
            fix = "the checkpoint is damaged: use another one"
            raise UserError(f"{self.directory}: {name} has {filled} of {out.numel()} elements", fix)
        return out

    def _file(self, path: Path) -> Any:
        if path not in self._open:
            try:
                self._open[path] = safe_open(path, framework="pt")
            except Exception as error:  # the library's own error class is private
                fix = "the checkpoint is damaged: use another one"
                raise UserError(f"{path}: cannot be read ({error})", fix) from None
        return self._open[path]


def open_checkpoint(path: Path) -> CheckpointReader:
    """Opens a checkpoint directory, or the newest checkpoint of a run directory."""
    return CheckpointReader(find_checkpoint(path))


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that `path` means: itself, or the newest whole one of the run.

    Raises:
        UserError: there is none.
    """
    if not path.exists():
        raise UserError(f"{path}: no such directory", "name a run directory, or one of its checkpoints/step-*")
    if (path / STATE).is_file():
        return path
    found = committed(path / "checkpoints")
    if not found:
        raise UserError(f"{path}: holds no checkpoint", "start the run without --resume, or name another directory")
    return found[-1]


def load_state(directory: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint, after every file of it was checked against the manifest.

    Raises:
        UserError: a file is missing, changed or cut short; the error names it.
    """
    wrong = verify(directory)
    if wrong:
        raise UserError("\n".join(wrong), f"remove {directory} to resume from the checkpoint before it")
    state: dict[str, Any] = read_json(directory / STATE)
    return state
