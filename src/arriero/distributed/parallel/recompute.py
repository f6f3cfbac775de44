"""Activation checkpointing (arXiv:1604.06174): layers drop activations and recompute them in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from arriero.common import device
from arriero.distributed.parallel.config import RecomputeConfig
from arriero.model.llama import Llama

# Selective mode keeps the results of the operators that are named, and recomputes all others.
OPERATORS: dict[str, tuple[Any, ...]] = {
    "matmul": (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default),
    "attention": (
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
        torch.ops.aten._scaled_dot_product_cudnn_attention.default,
        torch.ops.arriero.causal_attention.default,  # model/cpu.py
    ),
}


def apply_recompute(model: Llama, config: RecomputeConfig, stage: int = 0) -> None:
    """Applies activation checkpointing to layers of `model`, which is pipeline stage `stage`, in place.

    The layer's forward is replaced rather than wrapped in a module: parameter names stay what they are.
    """
    if config.mode == "none":
        return
    layers = list(model.model.layers.values())
    if config.mode == "first":
        count = config.first_layers[stage if len(config.first_layers) > 1 else 0]
        layers = layers[:count]
    for layer in layers:
        layer.mlp.recomputed = True  # type: ignore[union-attr]
        layer.forward = _checkpointed_forward(layer, config)


class _LayerForward(nn.Module):
    """A layer's own forward, to be called with other parameters than it holds."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.run = layer, layer.forward

    def forward(self, *inputs: Any) -> Any:
        return self.run(*inputs)


def _checkpointed_forward(layer: nn.Module, config: RecomputeConfig) -> Callable[..., Any]:
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}  # no dropout, no random state
    if config.mode == "selective":
        kept = {op for name in config.keep for op in OPERATORS[name]}
        if "matmul" in config.keep and device.prefers_onednn():
            kept.add(torch.ops.mkldnn._linear_pointwise.default)
        if "attention" in config.keep and hasattr(torch.ops.npu, "npu_fusion_attention"):
            kept.add(torch.ops.npu.npu_fusion_attention.default)

        def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
            return CheckpointPolicy.MUST_SAVE if operator in kept else CheckpointPolicy.PREFER_RECOMPUTE

        options["context_fn"] = partial(create_selective_checkpoint_contexts, policy)
    body = _LayerForward(layer)

    def forward(*inputs: Any) -> Any:
        # Within a functional_call (train/precision.py) the layer holds low-precision copies of its parameters; by the
        # time it is computed again it holds its own, so the copies are handed to it a second time.
        copies: dict[str, torch.Tensor] = {
            name: p for name, p in body.named_parameters() if not isinstance(p, nn.Parameter)
        }
        if copies:
            return checkpoint(lambda *values: functional_call(body, copies, values), *inputs, **options)
        return checkpoint(body.run, *inputs, **options)

    return forward
