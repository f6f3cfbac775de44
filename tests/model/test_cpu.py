"""The CPU's operators: outputs and every gradient against float64 autograd of the plain forms."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from arriero.common import device
from arriero.model import cpu, ops
from arriero.model.llama import Llama
from toy import CONFIG

DTYPES = (torch.float32, torch.bfloat16)
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.5e-2}  # relative, in norm
OPERATORS = ("_Attention", "_SwigluLinear", "_Norm", "_Rope", "_Linear")


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the operators of model/cpu.py that run from here on."""
    seen: list[str] = []
    for name in OPERATORS:
        function = getattr(cpu, name)

        class Spy:
            @staticmethod
            def apply(*inputs: object, function: object = function, name: str = name) -> object:
                seen.append(name)
                return function.apply(*inputs)  # type: ignore[attr-defined]

        monkeypatch.setattr(cpu, name, Spy)
    return seen


@pytest.fixture(params=[True, False], ids=["oneDNN", "MKL"])
def onednn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(device, "prefers_onednn", lambda: request.param)
    return bool(request.param)


def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=GENERATOR).to(dtype).requires_grad_()


GENERATOR = torch.Generator().manual_seed(0)


def results(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """The output and the gradient of every input."""
    out = function(*inputs)
    seed = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return [out, *torch.autograd.grad(out, inputs, seed)]


def assert_right(function: Callable[..., Tensor], *inputs: Tensor) -> None:
    """`function` on these inputs against itself on the same values in float64, where it is torch's plain form."""
    dtype = inputs[0].dtype
    wide = [x.detach().double().requires_grad_() for x in inputs]
    for got, expected in zip(results(function, list(inputs)), results(function, wide), strict=True):
        assert got.dtype == dtype
        assert got.shape == expected.shape
        assert (got - expected).norm() <= TOLERANCE[dtype] * (expected.norm() + 0.1 * math.sqrt(expected.numel()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 2, 127, 128, 129, 300])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (3, 1)])
def test_attention(dtype: torch.dtype, length: int, heads: int, groups: int, taken: list[str]) -> None:
    q = random(2, length, heads, 48, dtype=dtype)
    k, v = (random(2, length, groups, 48, dtype=dtype) for _ in "kv")
    assert_right(ops.causal_attention, q, k, v)
    assert taken == ["_Attention"]


@given(
    sizes=st.tuples(*(st.integers(1, most) for most in (3, 40, 3, 3))), rows=st.integers(1, 9),
    head_dim=st.sampled_from([1, 2, 5, 16]), dtype=st.sampled_from(DTYPES), kept=st.sampled_from([0, 1000]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_attention_in_blocks_of_any_size(
    sizes: tuple[int, ...], rows: int, head_dim: int, dtype: torch.dtype, kept: int
) -> None:
    """With the weights kept, and (in bfloat16) computed a second time."""
    batch, length, groups, queries = sizes
    q = random(batch, length, groups * queries, head_dim, dtype=dtype)
    k, v = (random(batch, length, groups, head_dim, dtype=dtype) for _ in "kv")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "QUERY_BLOCK", rows)
        patch.setattr(cpu, "KEEP_WEIGHTS_UP_TO", kept)
        assert_right(ops.causal_attention, q, k, v)


@pytest.mark.parametrize("kept", [0, 1000])
def test_attention_s_own_formula(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64, where only the formula can differ; and its gradient against finite differences."""
    monkeypatch.setattr(cpu, "supports", lambda *x: True)
    monkeypatch.setattr(cpu, "QUERY_BLOCK", 3)
    monkeypatch.setattr(cpu, "KEEP_WEIGHTS_UP_TO", kept)
    q, k, v = random(1, 8, 4, 2), random(1, 8, 2, 2), random(1, 8, 2, 2)
    mine = cpu.causal_attention(q, k, v)
    plain = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True)
    torch.testing.assert_close(mine, plain.transpose(1, 2), rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(cpu.causal_attention, (q, k, v))


def test_the_other_operators_own_formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "supports", lambda *x: True)
    gate, up, weight, bias = random(1, 3, 5), random(1, 3, 5), random(4, 5), random(4)
    assert torch.autograd.gradcheck(cpu.swiglu_linear, (gate, up, weight, bias))
    cos, sin = ops.rope_table(ops.rope_frequencies(CONFIG, 3, torch.float64), torch.arange(3), torch.float64)
    assert torch.autograd.gradcheck(lambda x: cpu.apply_rope(x, cos, sin), random(2, 3, 2, CONFIG.head_dim))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 5, 32), (1, 1, 6), (7, 12), (2, 300, 64)])
@pytest.mark.parametrize("eps", [1e-6, 0.3])
def test_norm(dtype: torch.dtype, shape: tuple[int, ...], eps: float, taken: list[str]) -> None:
    assert_right(lambda x, w: ops.rms_norm(x, w, eps), random(*shape, dtype=dtype), random(shape[-1], dtype=dtype))
    assert taken == ["_Norm"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("by_row", [False, True])
def test_rope(dtype: torch.dtype, by_row: bool, taken: list[str]) -> None:
    positions = torch.tensor([[0, 1, 2, 3, 4], [0, 1, 0, 1, 2]]) if by_row else torch.arange(5)
    tables = ops.rope_table(ops.rope_frequencies(CONFIG, 5, torch.float64), positions, dtype)
    x = random(2, 5, 4, CONFIG.head_dim, dtype=dtype)
    assert_right(lambda x: ops.apply_rope(x, *(t.to(x.dtype) for t in tables)), x)
    assert taken == ["_Rope"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.usefixtures("onednn")
def test_swiglu_and_down_projection(dtype: torch.dtype, biased: bool, taken: list[str]) -> None:
    def function(gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        down = ops.Linear(11, 6, bias=bias is not None)
        values = {"weight": weight, "bias": bias} if bias is not None else {"weight": weight}
        return torch.func.functional_call(Down(down), {f"down.{k}": v for k, v in values.items()}, (gate, up))

    inputs = [random(*s, dtype=dtype) for s in ((2, 3, 11), (2, 3, 11), (6, 11), (6,))]
    assert_right(function, *inputs[: 3 + biased])
    assert taken == ["_SwigluLinear"]


class Down(nn.Module):
    def __init__(self, down: nn.Linear) -> None:
        super().__init__()
        self.down = down

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        return ops.swiglu_linear(gate, up, self.down)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", [(7,), (1, 1), (2, 3, 5), (200, 40)])
def test_linear(biased: bool, shape: tuple[int, ...], onednn: bool, taken: list[str]) -> None:
    inputs = [random(*s, dtype=torch.float32) for s in ((*shape, 24), (10, 24), (10,))]
    assert_right(ops.linear, *inputs[: 2 + biased])
    assert taken == ["_Linear"] * onednn


def test_linear_of_strided_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "prefers_onednn", lambda: True)
    x, weight = random(6, 5, 8, dtype=torch.float32), random(8, 9, dtype=torch.float32)
    assert_right(lambda x, w: ops.linear(x.transpose(0, 1)[:, ::2], w.t()), x, weight)
    assert_right(lambda x, w: ops.linear(x[:1].expand(4, 5, 8), w.t()).transpose(0, 1), x, weight)


def test_linear_gives_only_the_gradients_that_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "prefers_onednn", lambda: True)
    x, weight, bias = (random(*s, dtype=torch.float32) for s in ((4, 3), (2, 3), (2,)))
    for wanted in ([x], [weight], [bias], [x, bias]):
        for tensor in (x, weight, bias):
            tensor.requires_grad_(any(tensor is w for w in wanted))
        got = torch.autograd.grad(ops.linear(x, weight, bias).square().sum(), wanted)
        expected = torch.autograd.grad(F.linear(x, weight, bias).square().sum(), wanted)
        torch.testing.assert_close(got, expected)


def test_only_amd_prefers_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    for vendor, expected in (("AuthenticAMD", True), ("GenuineIntel", False), ("", False)):
        monkeypatch.setattr(device, "_proc", lambda file, key, vendor=vendor: vendor)
        assert device.prefers_onednn.__wrapped__() == (expected and torch.backends.mkldnn.is_available())


# Where torch must do it itself.


def all_operators(dtype: torch.dtype, mask: Tensor | None = None, requires_grad: bool = True) -> None:
    q, x, g = (random(1, 4, 2, 8, dtype=dtype), random(1, 4, 8, dtype=dtype), random(8, dtype=dtype))
    weight, tables = random(8, 8, dtype=dtype), (torch.ones(4, 8, dtype=dtype),) * 2
    q, x, g, weight = (t.requires_grad_(requires_grad) for t in (q, x, g, weight))
    ops.causal_attention(q, q, q, mask)
    ops.rms_norm(x, g, 1e-5)
    ops.apply_rope(q, *tables)
    ops.linear(x, weight)
    ops.swiglu_linear(x, x, ops.Linear(8, 8, bias=False).to(dtype))


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes_are_torchs(dtype: torch.dtype, taken: list[str]) -> None:
    all_operators(dtype)
    assert taken == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_gradients_only_products_are_ours(dtype: torch.dtype, taken: list[str], onednn: bool) -> None:
    with torch.no_grad():
        all_operators(dtype)
    linears = 2 * (dtype == torch.float32 and onednn)  # the down projection is a Linear
    assert taken == ["_Attention", *["_Linear"] * linears]


@pytest.mark.parametrize("dtype", DTYPES)
def test_masks_and_earlier_keys_are_torchs(dtype: torch.dtype, taken: list[str]) -> None:
    q, k = random(1, 4, 2, 8, dtype=dtype), random(1, 6, 2, 8, dtype=dtype)
    assert_right(lambda q, k: ops.causal_attention(q, k, k, torch.ones(1, 1, 4, 6, dtype=torch.bool)), q, k)
    assert_right(lambda q, k: ops.causal_attention(q, k, k), q, k)
    long = cpu.KEEP_WEIGHTS_UP_TO * 8 + 1
    assert_right(ops.causal_attention, *(random(1, long, 1, 8, dtype=dtype) for _ in "qkv"))
    assert taken == ["_Attention"] * (dtype == torch.bfloat16)


def test_mixed_dtypes_are_torchs(taken: list[str]) -> None:
    x = random(1, 4, 8, dtype=torch.bfloat16)
    ops.rms_norm(x, random(8, dtype=torch.float32), 1e-5)
    ops.apply_rope(x.view(1, 4, 1, 8), *[torch.ones(4, 8)] * 2)
    assert taken == []


def test_dtensors_are_torchs(taken: list[str]) -> None:
    """As seen by type: a subclass of Tensor is left alone."""

    class Other(Tensor):
        pass

    x = random(1, 4, 8, dtype=torch.float32)
    assert cpu.supports(x)
    assert not cpu.supports(x.as_subclass(Other))
    assert not cpu.supports(x, x.detach().as_subclass(Other))
    assert not cpu.supports(x.to("meta"))
    assert taken == []


@pytest.mark.parametrize("kind", ["subclass", "before", "after"])
def test_a_down_projection_with_additions_is_called_as_it_is(kind: str, taken: list[str]) -> None:
    class Twice(ops.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    down = (Twice if kind == "subclass" else ops.Linear)(8, 4)
    if kind == "before":
        down.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    if kind == "after":
        down.register_forward_hook(lambda module, args, out: out * 2)
    gate, up = random(2, 8, dtype=torch.float32), random(2, 8, dtype=torch.float32)
    torch.testing.assert_close(ops.swiglu_linear(gate, up, down), down(F.silu(gate) * up))
    assert "_SwigluLinear" not in taken


# The whole model.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("onednn")
def test_the_model_agrees_with_float64(dtype: torch.dtype, taken: list[str]) -> None:
    torch.manual_seed(0)
    model = Llama(CONFIG).to(dtype)
    wide = Llama(CONFIG).double()
    wide.load_state_dict(model.state_dict())
    tokens = torch.randint(0, CONFIG.vocab_size, (2, 21))
    for m in (model, wide):
        F.cross_entropy(m(tokens).flatten(0, 1).double(), tokens.roll(-1).flatten()).backward()
    for (name, one), other in zip(model.named_parameters(), wide.named_parameters(), strict=True):
        error = (one.grad - other[1].grad).norm() / other[1].grad.norm()
        assert error < (2e-5 if dtype == torch.float32 else 5e-2), name
    layers = CONFIG.num_hidden_layers
    counts = {name: taken.count(name) for name in OPERATORS[:-1]}
    assert counts == {"_Attention": layers, "_SwigluLinear": layers, "_Norm": 2 * layers + 1, "_Rope": 2 * layers}


def test_no_compiler_is_imported() -> None:
    """torch._dynamo costs seconds at the first step."""
    code = (
        "import sys, torch; from arriero.model import ops; x = torch.randn(1, 4, 2, 8, requires_grad=True); "
        "ops.causal_attention(x, x, x).sum().backward(); sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=900).returncode == 0
