"""A small state and a saver for it, without a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from arriero.checkpoint.config import CheckpointConfig
from arriero.checkpoint.save import Saver, SaveResult
from arriero.checkpoint.shards import TensorShard
from arriero.distributed.parallel.mesh import Ranks


def state(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"embed.weight": (31, 8), "norm.weight": (8,), "exp_avg.embed.weight": (31, 8), "scalar": ()}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def parts(tensors: dict[str, torch.Tensor]) -> dict[str, TensorShard]:
    return {name: TensorShard(t, tuple(t.shape), (0,) * t.dim()) for name, t in tensors.items()}


def saver(root: Path, **config: Any) -> Saver:
    return Saver(root, CheckpointConfig(**{"retries": 0, "keep": 0} | config), Ranks())


def save(one: Saver, step: int, tensors: dict[str, torch.Tensor] | None = None) -> list[SaveResult]:
    """Saves, waits, and returns what became of it."""
    one.save(step, parts(tensors or state(step)), state={"updates": step}, texts={"config.json": "{}\n"})
    one.wait()
    return one.results()
