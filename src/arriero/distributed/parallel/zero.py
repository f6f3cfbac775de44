"""ZeRO (arXiv:1910.02054) by FSDP2: each data-parallel rank keeps a part of the state.

| stage | parameters | gradients between micro-batches | optimizer state |
| ----- | ---------- | ------------------------------- | --------------- |
| 1     | whole      | whole, summed once a step       | cut             |
| 2     | whole      | cut, summed every micro-batch   | cut             |
| 3     | cut        | cut, summed every micro-batch   | cut             |

FSDP's own averaging is off: the loss is already divided by the global number of valid tokens, so gradients are summed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import nn

from arriero.model.llama import Llama

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FSDPModule


def apply_zero(model: Llama, mesh: DeviceMesh, stage: int, compute_dtype: torch.dtype) -> None:
    """Shards each layer, then what is left (embedding, norm, head), in place.

    Args:
        model: what this process has of the model.
        mesh: one dimension to cut over; or two, the first of which holds copies (hybrid sharding).
        stage: ZeRO's.
        compute_dtype: of parameters in flight.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    low = compute_dtype in (torch.bfloat16, torch.float16)
    policy = (
        MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32) if low else MixedPrecisionPolicy()
    )
    for module in (*model.model.layers.values(), model):
        fully_shard(module, mesh=mesh, reshard_after_forward=stage == 3, mp_policy=policy)
    for module in model.modules():
        if is_fsdp(module):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no pre-multiplied sum


def is_fsdp(module: nn.Module) -> TypeGuard[FSDPModule]:
    """Whether FSDP manages it; a single process need not import FSDP for it."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def set_gradient_sync(model: Llama, stage: int, *, last: bool) -> None:
    """Sets whether this micro-batch's backward sums gradients over ranks; without FSDP it does nothing."""
    if is_fsdp(model):
        model.set_requires_gradient_sync(last or stage > 1)


def reshard(model: Llama) -> None:
    """Frees parameters that are still gathered after a forward pass without backward; without FSDP it does nothing."""
    for module in model.modules():
        if is_fsdp(module):
            module.reshard()


def time_collectives(model: Llama, watch: Callable[..., Any]) -> None:
    """Has FSDP's all-gathers and reduce-scatters called as `watch(call, ...)`; without FSDP it does nothing.

    Hybrid sharding's all-reduce between copies has no such hook.
    """
    managed = [module for module in model.modules() if is_fsdp(module)]
    if not managed:
        return
    from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather, DefaultReduceScatter

    class WatchedAllGather(DefaultAllGather):
        def __call__(self, *tensors: Any, **keywords: Any) -> Any:
            return watch(super().__call__, *tensors, **keywords)

    class WatchedReduceScatter(DefaultReduceScatter):
        def __call__(self, *tensors: Any, **keywords: Any) -> Any:
            return watch(super().__call__, *tensors, **keywords)

    for module in managed:
        module.set_custom_all_gather(WatchedAllGather())
        module.set_custom_reduce_scatter(WatchedReduceScatter())
