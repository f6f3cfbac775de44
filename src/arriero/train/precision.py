"""Mixed precision: parameters are cast to the compute dtype for a forward pass; masters and gradient sums are float32.

Under ZeRO, FSDP casts. Without it, `in_compute_dtype` casts under autograd, once a forward pass, with the same result:
low-precision weights and activations, gradients cast up and added in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from arriero.distributed.parallel.zero import is_fsdp
from arriero.model.llama import Llama


def store_dtype(compute: torch.dtype) -> torch.dtype:
    """The dtype of parameters at rest: float32, or float64 in a proof."""
    return torch.float64 if compute == torch.float64 else torch.float32


class CastParameters(nn.Module):
    """A model called with its parameters cast, under autograd.

    Of the embedding only the rows that are looked up are cast, and their gradients are added in float32; a head that is
    tied to it gets the whole table cast.
    """

    def __init__(self, model: Llama, compute: torch.dtype) -> None:
        super().__init__()
        self.inner, self.compute = model, compute
        if model.model.embed_tokens is not None:
            model.model.embed_tokens.row_dtype = compute

    def forward(self, *inputs: Any, **keywords: Any) -> Tensor:
        """As the model's own forward."""
        named = self.inner.named_parameters(remove_duplicate=False)
        cast = {name: parameter.to(self.compute) for name, parameter in named if name != "model.embed_tokens.weight"}
        # A tied head's cast must not become the embedding's table, too.
        out: Tensor = functional_call(self.inner, cast, inputs, keywords, tie_weights=False)
        return out


def in_compute_dtype(model: Llama, compute: torch.dtype) -> nn.Module:
    """The module to call for the model's forward pass with its parameters in `compute`."""
    if is_fsdp(model) or compute == store_dtype(compute):
        return model
    return CastParameters(model, compute)


@dataclass
class LossScale:
    """float16's dynamic loss scale: doubled after a clean window, halved when overflows exhaust the hysteresis.

    The decision rests on the global gradient norm, which is the same on all ranks, so no communication is needed.
    """

    scale: float
    window: int
    hysteresis: int
    clean: int = 0
    """Finite steps since the last change."""
    patience: int = 0
    """Overflows since the last growth."""

    def update(self, *, finite: bool) -> None:
        """Updates the scale after a step."""
        if finite:
            self.clean += 1
            if self.clean == self.window:
                self.scale, self.clean, self.patience = self.scale * 2, 0, 0
            return
        self.clean, self.patience = 0, self.patience + 1
        if self.patience >= self.hysteresis:
            self.scale = max(1.0, self.scale / 2)
