"""Applies a layout to the plain model, in the fixed order: tensor -> activation checkpointing -> compile -> ZeRO.

The model is laid out while it has no memory (on the meta device); then each process makes room for its own parts and
reads just those from a source: initial weights, a Hugging Face directory or a checkpoint.
"""

from __future__ import annotations

from typing import Protocol

import torch

from arriero.errors import UserError
from arriero.model.config import LlamaConfig
from arriero.model.llama import Llama
from arriero.parallel.mesh import ParallelConfig, Ranks
from arriero.parallel.shards import local, shards
from arriero.parallel.tensor import apply_tensor_parallel
from arriero.parallel.zero import apply_zero


class WeightSource(Protocol):
    """Whatever gives a slice of a named tensor: see weights/stream.py."""

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> torch.Tensor:
        """The part of `name` that `index` selects."""
        ...


def build_model(
    config: LlamaConfig, parallel: ParallelConfig, ranks: Ranks, *, device: torch.device, store: torch.dtype,
    compute: torch.dtype,
) -> Llama:  # fmt: skip
    """The model in its layout, with memory of its own and arbitrary values: call `load_weights` next.

    Args:
        config: the model's shape.
        parallel: the layout.
        ranks: this process's place in it.
        device: where the parts live.
        store: dtype of the parameters at rest, which the optimizer updates.
        compute: dtype of the parameters in flight.
    """
    with torch.device("meta"):
        model = Llama(config).to(store)
    if ranks.mesh is not None:
        if ranks.tensor > 1:
            apply_tensor_parallel(model, ranks.mesh["tensor"])
            tie(model)
        if ranks.data > 1:
            apply_zero(model, ranks.mesh["data"], parallel.zero_stage, compute)
    model.to_empty(device=device)
    tie(model)
    return model


def tie(model: Llama) -> None:
    """Makes the head the embedding again, where the config says so: laying out and `to_empty` part them."""
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight


def load_weights(model: Llama, source: WeightSource) -> None:
    """Fills this process's part of every parameter from `source`, reading no other part.

    Raises:
        UserError: a tensor of the wrong shape.
    """
    with torch.no_grad():
        for name, (shard, parameter) in shards(model).items():
            target, value = local(parameter), source.read(name, shard.index)
            if target.shape != value.shape:
                raise UserError(
                    f"{name}: the source gives {tuple(value.shape)}, the model needs {tuple(target.shape)}",
                    "use the config.json that belongs to these weights",
                )
            target.copy_(value)
