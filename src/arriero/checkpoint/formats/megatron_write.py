"""Files of one rank each, planned: every rank's torch.save archive, and which rows of the model go where in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from arriero.checkpoint.formats.dialects import Dialect
from arriero.checkpoint.formats.megatron import DEEPSPEED_TRACKER, RANK_FILE_NAME, TRACKER
from arriero.checkpoint.formats.sharding_plan import ParallelDegrees, RankTensor, ShardingPlan, split_layers
from arriero.checkpoint.tensors.stream import ITEMSIZE, TensorView
from arriero.checkpoint.tensors.torch_write import Namespace, TensorSpec, plan_archive
from arriero.checkpoint.tensors.transfer import OutputFile, WriteOp
from arriero.common.errors import UserError
from arriero.model.config import LlamaConfig


@dataclass(frozen=True)
class RankFormat:
    """The format of a checkpoint's files."""

    dialect: Dialect
    degrees: ParallelDegrees
    dtype: str | None = None
    """None keeps each tensor's own."""
    iteration: int = 0
    """The iteration to claim; 0 is `release`, which makes Megatron start at 0 without an optimizer."""
    deepspeed: bool = False
    """AscendSpeed's DeepSpeed flavour."""
    arguments: dict[str, Any] | None = None
    """Megatron's own, written under `args` (formats/megatron_args.py)."""


def plan_ranks(
    directory: Path, weights: Mapping[str, TensorView], config: LlamaConfig, form: RankFormat
) -> list[OutputFile]:
    """Plans every rank's file below `directory`, and writes the tracker; `check_degrees` has passed.

    Raises:
        UserError: rows of one fused tensor have different dtypes.
    """
    degrees, iteration = form.degrees, form.iteration
    word = "release" if iteration == 0 else f"iter_{iteration:07d}"
    tracker = directory / (DEEPSPEED_TRACKER if form.deepspeed else TRACKER)
    tracker.write_text(("release" if iteration == 0 else str(iteration)) + "\n")
    layers = split_layers(config, degrees)
    files = []
    for t in range(degrees.tensor):
        for p in range(degrees.pipeline):
            rank = f"mp_rank_{t:02d}" + (f"_{p:03d}" if degrees.pipeline > 1 else "")
            path = directory / word / (f"{rank}_model_states.pt" if form.deepspeed else f"{rank}/{RANK_FILE_NAME}")
            path.parent.mkdir(parents=True, exist_ok=True)
            plan = ShardingPlan(config, form.dialect, degrees, t)
            chunks = [list(plan.rank_tensors(p, v, layers[p, v])) for v in range(degrees.virtual)]
            files.append(_plan_rank(path, chunks, weights, config, form))
    return files


def _plan_rank(
    path: Path, chunks: list[list[RankTensor]], weights: Mapping[str, TensorView], config: LlamaConfig, form: RankFormat
) -> OutputFile:
    """One rank's file: the payload's structure, then where each planned's rows come from."""
    dialect, dtype = form.dialect, form.dtype
    models: list[dict[str, TensorSpec]] = []
    contents: list[RankTensor | bytes] = []
    for chunk in chunks:
        model: dict[str, TensorSpec] = {}
        for planned in chunk:
            model[planned.key] = TensorSpec(_rank_tensor_dtype(planned, weights, dtype), planned.shape)
            contents.append(planned)
            if dialect.inv_freq and planned.key.endswith(dialect.input_norm):
                frequencies = inverse_frequencies(config)
                model[planned.key.removesuffix(dialect.input_norm) + dialect.inv_freq] = TensorSpec(
                    "F32", frequencies.shape
                )
                contents.append(frequencies.tobytes())
        models.append(model)
    root: dict[str, Any] = {"checkpoint_version": 3.0}
    if form.deepspeed:
        root |= {"module": models[0], "dp_world_size": 0}
    else:
        root["iteration"] = form.iteration
        if form.arguments is not None:
            root["args"] = Namespace(form.arguments)
        root |= {"model": models[0]} if len(models) == 1 else {f"model{v}": model for v, model in enumerate(models)}
    size, blobs, offsets = plan_archive(root)
    writes = []
    for i, content in enumerate(contents):
        if isinstance(content, bytes):
            blobs.append((offsets[i], content))
            continue
        for region in content.regions:
            width = region.columns * ITEMSIZE[dtype or weights[region.name].dtype]
            at = offsets[i] + region.out_row * width
            writes.append(WriteOp(region.name, region.row, region.rows, region.column, region.columns, at, region.step))
    return OutputFile(path, size, blobs, writes)


def _rank_tensor_dtype(planned: RankTensor, weights: Mapping[str, TensorView], dtype: str | None) -> str:
    kinds = {dtype or weights[region.name].dtype for region in planned.regions}
    if len(kinds) != 1:
        raise UserError(
            f"{planned.key} would join tensors of {' and '.join(sorted(kinds))}", "give one --dtype for all"
        )
    return kinds.pop()


def inverse_frequencies(config: LlamaConfig) -> np.ndarray:
    """The unscaled rotary frequencies in float32, as old checkpoints store them."""
    exponent = np.arange(0, config.head_dim, 2, dtype=np.float32) / config.head_dim
    return (1.0 / (np.float32(config.rope_theta) ** exponent)).astype(np.float32)
