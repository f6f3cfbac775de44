"""Tensor parallelism as a table: which module is cut how (Megatron-LM, arXiv:1909.08053).

A column-parallel matrix is cut by output rows, a row-parallel one by input columns; each pair needs one sum forward and
one backward. The embedding is cut by vocabulary rows, and so is the head: its logits stay cut, and the loss is computed
on the cut vocabulary.
"""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)


def plan() -> dict[str, ParallelStyle]:
    """Module path -> style. `*` stands for every layer.

    The block's input becomes one replicated DTensor before its column-parallel matrices, so that their input gradients
    are added locally and summed over ranks once, not once a matrix.
    """
    whole, other = Replicate(), None
    return {
        "model.embed_tokens": RowwiseParallel(input_layouts=whole, output_layouts=whole),
        "model.layers.*.self_attn": PrepareModuleInput(
            input_layouts=(whole, other, other, other, other), desired_input_layouts=(whole, other, other, other, other)
        ),
        "model.layers.*.self_attn.q_proj": ColwiseParallel(),
        "model.layers.*.self_attn.k_proj": ColwiseParallel(),
        "model.layers.*.self_attn.v_proj": ColwiseParallel(),
        "model.layers.*.self_attn.o_proj": RowwiseParallel(),
        "model.layers.*.mlp": PrepareModuleInput(input_layouts=whole, desired_input_layouts=whole),
        "model.layers.*.mlp.gate_proj": ColwiseParallel(),
        "model.layers.*.mlp.up_proj": ColwiseParallel(),
        "model.layers.*.mlp.down_proj": RowwiseParallel(),
        "lm_head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False),
    }


def apply_tensor_parallel(model: nn.Module, mesh: DeviceMesh) -> None:
    """Cuts the model's parameters over `mesh` (one dimension), in place."""
    parallelize_module(model, mesh, plan())
