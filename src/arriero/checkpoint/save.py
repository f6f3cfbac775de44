"""Saving the training state: each process writes the parts that it alone, or it first, holds."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from arriero.checkpoint.layout import STATE, TEMPORARY, commit, committed, step_directory, sync_directory, write_json
from arriero.errors import UserError
from arriero.model.llama import Llama
from arriero.parallel.mesh import Ranks
from arriero.parallel.shards import local, shards


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save, and what to keep."""

    every: int = 1000
    """Steps between checkpoints; 0 saves only the last step."""
    keep: int = 2
    """Newest checkpoints to keep; 0 keeps all."""

    def problems(self) -> list[UserError]:
        """All that is impossible about it."""
        if self.every < 0 or self.keep < 0:
            return [UserError("checkpoint.every and checkpoint.keep cannot be negative", "give 0 or more")]
        return []


def save_checkpoint(
    root: Path, step: int, *, parts: list[Llama], moments: dict[str, dict[str, Tensor]], state: dict[str, Any],
    texts: dict[str, str], ranks: Ranks,
) -> Path:  # fmt: skip
    """Writes `checkpoints/step-N`, whole or not at all; every process must call it.

    Args:
        root: the run's `checkpoints` directory, seen by all processes.
        step: steps completed.
        parts: what this process holds of the model.
        moments: the optimizer's, as `Optimizer.moments` gives them.
        state: everything else that a resumed run needs, as JSON.
        texts: further files by name, such as config.json and recipe.toml.
        ranks: this process's place.
    """
    final = step_directory(root, step)
    temporary = final.with_name(final.name + TEMPORARY)
    if ranks.first:
        for leftover in (temporary, final):  # of a run that was killed here, before it committed
            shutil.rmtree(leftover, ignore_errors=True)
        temporary.mkdir(parents=True)
    ranks.barrier()
    _write_parts(temporary, parts, moments, ranks)
    ranks.barrier()
    if ranks.first:
        write_json(temporary / STATE, {"step": step, **state})
        for name, text in texts.items():
            (temporary / name).write_text(text, encoding="utf-8")
        commit(temporary, final)
    ranks.barrier()
    return final


def _write_parts(directory: Path, parts: list[Llama], moments: dict[str, dict[str, Tensor]], ranks: Ranks) -> None:
    tensors: dict[str, Tensor] = {}
    where: dict[str, Any] = {}
    for path, (shard, parameter) in shards(parts, ranks).items():
        if not shard.written_by(ranks) or 0 in shard.local_shape:
            continue
        values = {shard.name: local(parameter).detach()}
        values |= {f"{moment}.{shard.name}": by_path[path] for moment, by_path in moments.items()}
        for key, value in values.items():
            tensors[key] = value.cpu().contiguous()
            where[key] = {"shape": list(shard.shape), "offset": list(shard.offset)}
    file = directory / f"rank-{ranks.rank:05d}.safetensors"
    save_file(tensors, file)
    with open(file, "rb") as handle:
        os.fsync(handle.fileno())
    write_json(file.with_suffix(".json"), where)
    sync_directory(directory)


def forget_old(root: Path, keep: int) -> None:
    """Deletes all but the newest `keep` checkpoints; 0 keeps all."""
    for path in committed(root)[:-keep] if keep else []:
        (path / "COMMITTED").unlink()  # first of all, so that a half-deleted one never counts as whole
        shutil.rmtree(path)
