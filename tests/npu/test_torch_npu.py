"""Our calls against the real torch_npu's operators: names, defaults, shapes and dtypes, forward and backward.

Nothing is computed: the tensors are fake. The numbers are the twin's part (tests/model/test_ops.py).
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch_npu
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import npu_twin
from arriero.common import device
from arriero.distributed.parallel.mesh import Ranks
from arriero.model import npu, ops
from arriero.model.llama import Llama
from arriero.train.config import OptimConfig
from arriero.train.optim import AdamW
from toy import CONFIG

TWINS = ("npu_fusion_attention", "npu_rms_norm", "npu_rotary_mul", "npu_swiglu")


class Calls(TorchDispatchMode):
    """Counts the operators that reach the device, with the arguments of the last call of each."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()
        self.last: dict[str, dict[str, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        self.count[name] += 1
        arguments = func._schema.arguments  # the dispatcher leaves out what equals its default
        defaults = {a.name: a.default_value for a in arguments}
        self.last[name] = {**defaults, **dict(zip(defaults, args, strict=False)), **(kwargs or {})}
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def fake() -> Iterator[FakeTensorMode]:
    original = torch.get_default_dtype()
    # Without this the shape rule of the attention asks a real device which chip it is, to print a warning.
    torch_npu.op_plugin.meta._meta_registrations._npu_fusion_attention_warning_printed = True
    with FakeTensorMode() as mode:
        yield mode
    torch.set_default_dtype(original)


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, device="npu:0").requires_grad_()


@pytest.mark.parametrize("name", TWINS)
def test_the_twin_has_the_vendors_arguments(name: str) -> None:
    schema = getattr(torch.ops.npu, name).default._schema
    ours = inspect.signature(getattr(npu_twin, name)).parameters
    assert list(ours) == [argument.name for argument in schema.arguments]
    for argument in schema.arguments:
        default = ours[argument.name].default
        if argument.has_default_value():
            assert default == argument.default_value, argument.name
        else:
            assert default is inspect.Parameter.empty, argument.name


def test_device_facts() -> None:
    assert device.device_type() == "npu"
    assert device.device_count("npu") == 1
    assert device.fused_operators("npu") is torch_npu
    assert device.DEVICES.get("npu") == dist.get_default_backend_for_device("npu")
    assert device.device_name("npu") == "Ascend910B2"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("masked", [False, True])
def test_attention(dtype: torch.dtype, heads: tuple[int, int], masked: bool) -> None:
    q, k, v = random(2, 6, heads[0], 16, dtype=dtype), *(random(2, 6, heads[1], 16, dtype=dtype) for _ in "kv")
    mask = torch.ones(2, 1, 6, 6, dtype=torch.bool, device="npu:0").tril() if masked else None
    with Calls() as calls:
        out = ops.causal_attention(q, k, v, mask)
        gradients = torch.autograd.grad(out.sum(), (q, k, v))
    assert out.shape == q.shape
    assert out.dtype == dtype
    assert [(g.shape, g.dtype) for g in gradients] == [(x.shape, dtype) for x in (q, k, v)]
    assert calls.count["npu::npu_fusion_attention"] == calls.count["npu::npu_fusion_attention_grad"] == 1
    given = calls.last["npu::npu_fusion_attention"]
    assert (given["sparse_mode"], given["scale"], given["head_num"]) == (0 if masked else 2, 0.25, heads[0])
    assert given["atten_mask"].shape == (
        (2, 1, 6, 6) if masked else (npu.COMPRESSED_MASK_SIZE, npu.COMPRESSED_MASK_SIZE)
    )


def test_a_wrong_argument_is_refused() -> None:
    with pytest.raises(RuntimeError, match="pre_tokens"):
        torch_npu.npu_fusion_attention(*(random(1, 2, 1, 16) for _ in "qkv"), 1, "BSND", pre_tokens=1)


@pytest.mark.parametrize("by_row", [False, True])
def test_the_model_runs_on_fused_operators_alone(by_row: bool) -> None:
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("npu:0"):
        model = Llama(CONFIG)
        tokens = torch.zeros(2, 12, dtype=torch.long)
        positions = torch.zeros(2, 12, dtype=torch.long) if by_row else None
        mask = torch.ones(2, 1, 12, 12, dtype=torch.bool).tril() if by_row else None
    with Calls() as calls:
        logits = model(tokens, positions, mask)
        logits.float().sum().backward()
    assert logits.shape == (2, 12, CONFIG.vocab_size)
    assert logits.dtype == torch.bfloat16
    layers = CONFIG.num_hidden_layers
    expected = {"npu_fusion_attention": layers, "npu_rotary_mul": 2 * layers, "npu_swiglu": layers,
                "npu_rms_norm": 2 * layers + 1}  # fmt: skip
    assert {name: calls.count[f"npu::{name}"] for name in expected} == expected
    assert not {"aten::rsqrt", "aten::silu", "aten::_softmax"} & set(calls.count), "a plain operator was used"
    assert not any("scaled_dot_product" in name for name in calls.count)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.shape == parameter.shape


def test_the_optimizer_is_the_fused_one() -> None:
    with torch.device("npu:0"):
        model = Llama(CONFIG)
    optimizer = AdamW([model], OptimConfig(), Ranks())
    optimizer.load(None, updates=0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.collect_gradients()
    with Calls() as calls:
        optimizer.step(lr=1e-3, divisor=2.0)
    assert calls.count["aten::_fused_adamw_"] == 2  # decayed parameters and exempt ones
    assert "aten::sqrt" not in calls.count
