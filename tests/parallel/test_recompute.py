"""Recomputation changes memory, not numbers, also where the parameters in flight are low-precision copies."""

from __future__ import annotations

import copy

import pytest
import torch

import toy
from arriero.model.llama import Llama
from arriero.parallel.recompute import RecomputeConfig, apply_recompute
from arriero.train.precision import forward_in


@pytest.mark.parametrize(
    "config", [RecomputeConfig("full"), RecomputeConfig("first", (1,)), RecomputeConfig("selective")]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_the_same_to_the_bit(config: RecomputeConfig, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    plain = Llama(toy.CONFIG)
    forgetful = copy.deepcopy(plain)
    apply_recompute(forgetful, config)
    tokens = torch.randint(0, 259, (2, 16))
    for model in (plain, forgetful):
        forward_in(model, dtype)(tokens).float().square().sum().backward()
    for (name, one), other in zip(plain.named_parameters(), forgetful.parameters(), strict=True):
        assert one.grad is not None
        assert torch.equal(one.grad, other.grad), name  # type: ignore[arg-type]
    assert list(forgetful.state_dict()) == list(plain.state_dict())
