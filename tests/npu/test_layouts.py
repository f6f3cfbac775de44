"""A rank of a large layout on device npu, without the others: fake tensors in a fake process group.

Forward and backward must reach torch_npu's operators through FSDP2, DTensor and recomputation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch_npu
from test_torch_npu import Calls
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from arriero.distributed.parallel.apply import build_model_parts
from arriero.distributed.parallel.config import ParallelConfig, RecomputeConfig
from arriero.distributed.parallel.mesh import Ranks
from toy import CONFIG

WORLD = 8
LAYOUTS = {
    "zero 1": ParallelConfig(zero_stage=1),
    "zero 3": ParallelConfig(zero_stage=3),
    "tensor 2, zero 2": ParallelConfig(tensor_parallel=2),
    "tensor 2 with sequence, zero 2": ParallelConfig(tensor_parallel=2, sequence_parallel=True),
    "context 2, zero 2": ParallelConfig(context_parallel=2),
    "ulysses 2, zero 2": ParallelConfig(context_parallel=2, context_method="ulysses"),
}


@pytest.fixture(autouse=True)
def world() -> Iterator[None]:
    torch_npu.op_plugin.meta._meta_registrations._npu_fusion_attention_warning_printed = True
    dist.init_process_group("fake", rank=0, world_size=WORLD, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_a_rank_runs_on_fused_operators(name: str, recompute: str) -> None:
    parallel, length = LAYOUTS[name], 16
    config = replace(CONFIG, vocab_size=256)
    ranks = Ranks.build(parallel, "npu")
    (model,) = build_model_parts(
        config, parallel, RecomputeConfig(mode=recompute), ranks, length=length, device=torch.device("meta"),
        store=torch.float32, compute=torch.bfloat16,
    )  # fmt: skip
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="npu:0")
        rows = torch.zeros(2, length // parallel.context_parallel, dtype=torch.long, device="npu:0")
        positions = torch.arange(rows.shape[1], device="npu:0").expand(2, -1)
        with Calls() as calls:
            model(rows, positions, None, labels=rows).backward()
    layers, again = config.num_hidden_layers, 2 if recompute == "full" else 1
    expected = {
        "npu_fusion_attention": layers * again, "npu_rotary_mul": 2 * layers * again, "npu_swiglu": layers * again,
        "npu_rms_norm": 2 * layers * again + 1,
    }  # fmt: skip
    assert {operator: calls.count[f"npu::{operator}"] for operator in expected} == expected
    for path, parameter in model.named_parameters():
        assert parameter.grad is not None, path
        assert parameter.grad.device.type == "npu"
