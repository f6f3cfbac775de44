"""Tensor parallelism as a table: which module is cut how (Megatron-LM, arXiv:1909.08053 and arXiv:2205.05198).

A column-parallel matrix is cut by output rows, a row-parallel one by input columns; each pair needs one sum forward and
one backward. The embedding is cut by vocabulary rows, and so is the head: the loss is computed on the cut vocabulary,
for which two numbers a token are exchanged. Under sequence parallelism the stream between the blocks is cut by
position, too: the sum after a block becomes a reduce-scatter, and an all-gather stands before the next.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.distributed.tensor.placement_types import Placement

from arriero.model.config import FAMILIES, LlamaConfig
from arriero.model.head import VocabularyShard, linear_cross_entropy
from arriero.model.llama import Llama


def styles(*, sequence: bool) -> dict[str, Callable[[], ParallelStyle]]:
    """The styles that a family's plan (model/family.py) names.

    The block's input becomes one replicated DTensor before its column-parallel matrices, so that their input gradients
    are added locally and summed over ranks once, not once a matrix.
    """
    whole, none = Replicate(), None
    stream = Shard(1) if sequence else Replicate()
    return {
        "embedding": lambda: RowwiseParallel(input_layouts=whole, output_layouts=stream),
        "attention": lambda: PrepareModuleInput(
            input_layouts=(stream, none, none, none, none), desired_input_layouts=(whole, none, none, none, none)
        ),
        "mlp": lambda: PrepareModuleInput(input_layouts=stream, desired_input_layouts=whole),
        "column": ColwiseParallel,
        "row": lambda: RowwiseParallel(output_layouts=stream),
        "norm": lambda: SequenceParallel(use_local_output=True),
        "head": lambda: ColwiseParallel(input_layouts=stream, output_layouts=Shard(-1), use_local_output=False),
    }


def plan(config: LlamaConfig, *, sequence: bool) -> dict[str, ParallelStyle]:
    """Module path -> style, of the model's family. `*` is every layer; norms are in it with `sequence` only."""
    table: Mapping[str, str] = FAMILIES.get(config.model_type).plan
    by_name = styles(sequence=sequence)
    return {path: by_name[style]() for path, style in table.items() if sequence or style != "norm"}


def apply_tensor_parallel(model: Llama, mesh: DeviceMesh, *, sequence: bool) -> None:
    """Cuts the parameters of what is there of the model over `mesh` (one dimension), in place."""
    absent = {"model.embed_tokens": model.model.embed_tokens, "model.norm": model.model.norm, "lm_head": model.lm_head}
    table = {
        path: style
        for path, style in plan(model.config, sequence=sequence).items()
        if absent.get(path, model) is not None
    }
    parallelize_module(model, mesh, table)
    if model.lm_head is not None:
        model.token_loss = VocabularyParallelLoss(mesh, model.config.vocab_size, Shard(1) if sequence else Replicate())


class VocabularyParallelLoss:
    """The summed loss where each process holds some rows of the head."""

    def __init__(self, mesh: DeviceMesh, vocabulary: int, stream: Placement) -> None:
        self.mesh, self.stream = mesh, stream
        each = -(-vocabulary // mesh.size())  # as DTensor cuts: rounded up, the last may have less
        self.cut = VocabularyShard(mesh.get_local_rank() * each, self._gather)

    def _gather(self, value: Tensor) -> Tensor:
        out = [torch.empty_like(value) for _ in range(self.mesh.size())]
        dist.all_gather(out, value, group=self.mesh.get_group())
        return torch.stack(out)

    def __call__(self, head: nn.Linear, x_BLD: Tensor, labels_BL: Tensor, scale: float = 1.0) -> Tensor:
        """As model/head.py's summed_loss, the same on every process; `x_BLD` is the stream as it is cut here."""
        stream = DTensor.from_local(x_BLD, self.mesh, [self.stream], run_check=False)
        whole = stream.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
        weight = head.weight
        assert isinstance(weight, DTensor)
        return linear_cross_entropy(
            whole.flatten(0, 1), weight.to_local(), labels_BL.flatten(), scale=scale, cut=self.cut
        )
