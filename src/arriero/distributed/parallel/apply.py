"""Applies a layout to the plain model in a fixed order: pipeline, float8, context, tensor, recompute, compile, ZeRO.

The model is laid out while it has no memory (on the meta device); then each process allocates its own parts and
reads just those from a source: initial weights, a Hugging Face directory or a checkpoint.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import nn

from arriero.common.device import has_float8_units
from arriero.common.errors import UserError
from arriero.distributed.parallel.compiled import apply_compile
from arriero.distributed.parallel.config import Float8Recipe, ParallelConfig, RecomputeConfig
from arriero.distributed.parallel.context import apply_context_parallel
from arriero.distributed.parallel.float8 import apply_float8
from arriero.distributed.parallel.mesh import Ranks
from arriero.distributed.parallel.pipeline import prune_to_stage, stages_of
from arriero.distributed.parallel.recompute import apply_recompute
from arriero.distributed.parallel.shards import is_dtensor, local, shards
from arriero.distributed.parallel.zero import apply_zero
from arriero.model.config import FAMILIES, LlamaConfig
from arriero.model.llama import Llama


class WeightSource(Protocol):
    """A source of slices of named tensors: initial weights, a Hugging Face directory, a checkpoint."""

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> torch.Tensor:
        """The part of `name` that `index` selects."""
        ...


@runtime_checkable
class CheckpointSource(WeightSource, Protocol):
    """A source that fills memory in place, as a checkpoint does."""

    def read_into(self, name: str, start: list[int], out: torch.Tensor) -> None:
        """Fills `out` with the part of `name` that begins at `start`."""
        ...

    def dtype(self, name: str) -> torch.dtype:
        """The stored dtype."""
        ...


def build_model_parts(
    config: LlamaConfig, parallel: ParallelConfig, recompute: RecomputeConfig, ranks: Ranks, *, length: int,
    device: torch.device, store: torch.dtype, compute: torch.dtype, float8: Float8Recipe = "none",
    compiled: bool = False,
) -> list[Llama]:  # fmt: skip
    """What this process holds of the model, one part a pipeline stage, with arbitrary values: `load_weights` is next.

    Args:
        config: the model's shape.
        parallel: the layout.
        recompute: activation checkpointing.
        ranks: this process's coordinates in the layout.
        length: tokens of a sequence, all context ranks together.
        device: where the parts live.
        store: dtype of the parameters at rest, which the optimizer updates.
        compute: dtype of the parameters in flight.
        float8: how the decoder layers' matmuls are done in 8 bits.
        compiled: whether each layer is compiled.
    """
    parts = []
    for stage in stages_of(parallel, ranks.coordinates["pipeline"]):
        with torch.device("meta"):
            model: Llama = FAMILIES.get(config.model_type).module(config).to(store)
        if parallel.pipeline_parallel > 1:
            prune_to_stage(model, stage, parallel)
        apply_float8(model, float8, emulate=not has_float8_units(device.type))
        if ranks.context > 1:
            apply_context_parallel(model, parallel, ranks, length)
        if ranks.mesh is not None and ranks.sizes["tensor"] > 1:
            from arriero.distributed.parallel.tensor import (
                apply_tensor_parallel,  # imports DTensors, which takes a second
            )

            apply_tensor_parallel(model, ranks.mesh["tensor"], sequence=parallel.sequence_parallel)
            tie_embeddings(model)
        apply_recompute(model, recompute, stage)
        if compiled:
            apply_compile(model)
        if ranks.mesh is not None and ranks.sizes["replica"] > 1:
            apply_zero(model, ranks.mesh["replica", "zero"], parallel.zero_stage, compute)
        elif ranks.mesh is not None and ranks.sizes["zero"] > 1:
            apply_zero(model, ranks.mesh["zero"], parallel.zero_stage, compute)
        materialize(model, device)
        tie_embeddings(model)
        parts.append(model)
    return parts


def materialize(model: Llama, device: torch.device) -> None:
    """Allocates every parameter on `device`, with arbitrary values.

    It is `to_empty` without `empty_like` on the meta device, which imports the compiler's algebra: more than a second.
    """
    if any(is_dtensor(parameter) for parameter in model.parameters()):
        model.to_empty(device=device)
        return
    for module in model.modules():
        for name, held in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(torch.empty(held.shape, dtype=held.dtype, device=device)))


def tie_embeddings(model: Llama) -> None:
    """Ties the head to the embedding again, where the config asks for it: sharding and `to_empty` separate them."""
    if model.config.tie_word_embeddings and model.lm_head is not None and model.model.embed_tokens is not None:
        model.lm_head.weight = model.model.embed_tokens.weight


def load_weights(parts: list[Llama], source: WeightSource, ranks: Ranks) -> None:
    """Fills this process's part of every parameter from `source`, reading no other part.

    Raises:
        UserError: a tensor of the wrong shape.
    """
    with torch.no_grad():
        for shard, parameter in shards(parts, ranks).values():
            target = local(parameter)
            if (
                isinstance(source, CheckpointSource)
                and target.device.type == "cpu"
                and target.dtype == source.dtype(shard.name)
            ):
                source.read_into(shard.name, list(shard.offset), target)
                continue
            value = source.read(shard.name, shard.index)
            if target.shape != value.shape:
                raise UserError(
                    f"{shard.name}: the source gives {tuple(value.shape)}, the model needs {tuple(target.shape)}",
                    "use the config.json that belongs to these weights",
                )
            target.copy_(value)
