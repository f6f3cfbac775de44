"""Recomputation changes memory, not numbers, also where the parameters in flight are low-precision copies."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import toy
from arriero.distributed.parallel.config import RecomputeConfig
from arriero.distributed.parallel.recompute import apply_recompute
from arriero.model.llama import Llama
from arriero.train.precision import in_compute_dtype


@pytest.mark.parametrize(
    "config",
    [
        RecomputeConfig("full"), RecomputeConfig("first", (1,)), RecomputeConfig("selective"),
        RecomputeConfig("selective", keep=("attention",)), RecomputeConfig("selective", keep=("matmul",)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_the_same_to_the_bit(config: RecomputeConfig, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    plain = Llama(toy.CONFIG)
    forgetful = copy.deepcopy(plain)
    apply_recompute(forgetful, config)
    tokens = torch.randint(0, 259, (2, 16))
    for model in (plain, forgetful):
        in_compute_dtype(model, dtype)(tokens).float().square().sum().backward()
    for (name, one), other in zip(plain.named_parameters(), forgetful.parameters(), strict=True):
        assert one.grad is not None
        assert torch.equal(one.grad, other.grad), name  # type: ignore[arg-type]
    assert list(forgetful.state_dict()) == list(plain.state_dict())


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.attention = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.attention += operator is torch.ops.arriero.causal_attention.default
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize(("keep", "times"), [(("attention",), 1), (("matmul",), 2)])
def test_the_cpus_attention_is_kept_where_asked(keep: tuple[Any, ...], times: int) -> None:
    model = Llama(toy.CONFIG)
    apply_recompute(model, RecomputeConfig("selective", keep=keep))
    with _Count() as count:
        model(torch.randint(0, 259, (2, 16))).sum().backward()
    assert count.attention == times * toy.CONFIG.num_hidden_layers
