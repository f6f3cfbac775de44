"""Run by test_ops.py on two processes: under sequence parallelism the fused operators give the same model."""

from __future__ import annotations

from collections import Counter

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import npu_twin
from arriero.common import device
from arriero.distributed.parallel.tensor import apply_tensor_parallel
from arriero.model.llama import Llama
from toy import CONFIG


def results(tensor_parallel: bool) -> list[torch.Tensor]:
    """Logits and every gradient, whole, of the same weights and tokens."""
    torch.manual_seed(0)
    model = Llama(CONFIG).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + 0.1)
    tokens = torch.randint(0, CONFIG.vocab_size, (2, 8))
    if tensor_parallel:
        apply_tensor_parallel(model, init_device_mesh("cpu", (2,)), sequence=True)
    logits = model(tokens)
    logits = logits.full_tensor() if tensor_parallel else logits
    logits.square().sum().backward()
    gradients = [p.grad for p in model.parameters()]
    return [logits, *(g.full_tensor() if hasattr(g, "full_tensor") else g for g in gradients)]


dist.init_process_group("gloo")
expected = results(tensor_parallel=False)
device.fused_operators = lambda kind: npu_twin  # type: ignore[assignment]
got = results(tensor_parallel=True)
for want, have in zip(expected, got, strict=True):
    assert (have - want).norm() <= 1e-12 * want.norm()
layers = CONFIG.num_hidden_layers
called = Counter(name for name, _ in npu_twin.calls)
assert called == {
    "npu_fusion_attention": layers, "npu_rotary_mul": 2 * layers, "npu_swiglu": layers, "npu_rms_norm": 2 * layers + 1,
}, called  # fmt: skip
dist.destroy_process_group()
