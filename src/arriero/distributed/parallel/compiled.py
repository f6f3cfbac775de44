"""Compilation of the decoder layers, one by one, by torch.compile (torch calls it regional compilation).

All layers have one code and one shape, so the first layer's compilation serves the others: start-up does not grow with
depth. A run compiles a layer's training pass, and its pass without gradients where there is a validation; twice that
where recompute.mode "first" makes two kinds of layers.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from arriero.model.head import loss_and_gradient, summed_loss
from arriero.model.llama import Llama


def apply_compile(model: Llama) -> None:
    """Has each layer's forward compiled when it is first called, in place; parameters keep their names.

    The forward is replaced, not the call: FSDP's hooks, which gather the layer's parameters, stay outside. A layer that
    recomputes is compiled together with its recomputation. So is the softmax of the logits, where the vocabulary is
    not cut. What cannot be compiled whole is an error (`fullgraph`), not a slow run. No shape changes during a run, so
    none is made symbolic.
    """
    for layer in model.model.layers.values():
        layer.forward = torch.compile(layer.forward, fullgraph=True, dynamic=False)
    if model.model.embed_tokens is not None:
        model.model.embed_tokens.register_forward_hook(_wait_for_collective)
    if model.token_loss is summed_loss:
        model.token_loss = partial(summed_loss, chunk=torch.compile(loss_and_gradient, fullgraph=True, dynamic=False))


def _wait_for_collective(module: nn.Module, inputs: object, out: Tensor) -> Tensor:
    """The tensor-parallel embedding returns a sum that is still in flight; a compiled layer would lose its gradient.

    The copy waits for it, and autograd sees that.
    """
    from torch.distributed._functional_collectives import AsyncCollectiveTensor  # imports DTensors: a second

    return out.clone() if isinstance(out, AsyncCollectiveTensor) else out
