"""The fused operators of torch_npu against the plain ones, through a twin that computes what is documented."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import npu_twin
from arriero.common import device
from arriero.model import npu, ops
from arriero.model.llama import Llama
from programs import free_port
from toy import CONFIG

TOLERANCE = 1e-12  # float64, relative


@pytest.fixture
def npu_there() -> Iterator[None]:
    """Makes ops.py take its npu path on CPU tensors, with the twin as the vendor's package."""
    with on_twin():
        yield


class on_twin:  # noqa: N801
    def __enter__(self) -> None:
        self.plain, device.fused_operators = device.fused_operators, lambda kind: npu_twin  # type: ignore[assignment]
        npu_twin.calls.clear()

    def __exit__(self, *_: object) -> None:
        device.fused_operators = self.plain


def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=GENERATOR).to(dtype).requires_grad_()


GENERATOR = torch.Generator().manual_seed(0)


def both(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Output and input gradients on the plain path and on the twin."""
    results = []
    wanted = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    for context in (None, on_twin()):
        with context or torch.enable_grad():
            out = function(*inputs)
        seed = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
        results.append([out, *torch.autograd.grad(out, wanted, seed)])
    return results[0], results[1]


def assert_equal(function: Callable[..., Tensor], *inputs: Tensor, calls: list[str]) -> None:
    plain, fused = both(function, *inputs)
    assert [name for name, _ in npu_twin.calls] == calls
    for expected, got in zip(plain, fused, strict=True):
        assert got.shape == expected.shape
        assert (got - expected).norm() <= TOLERANCE * max(1.0, expected.norm().item())


def document_mask(rows: list[list[int]]) -> Tensor:
    """[B, 1, L, L], True within a document and not ahead; `rows` gives each row's document lengths."""
    numbers = torch.stack([torch.repeat_interleave(torch.tensor(lengths)) for lengths in rows])
    length = numbers.shape[1]
    same = numbers[:, None, :, None] == numbers[:, None, None, :]
    return same & torch.ones(length, length, dtype=torch.bool).tril()


@pytest.mark.parametrize("shape", [(2, 5, 32), (1, 1, 6), (7, 12)])
@pytest.mark.parametrize("eps", [1e-6, 0.3])
def test_norm(shape: tuple[int, ...], eps: float) -> None:
    inputs = random(*shape), random(shape[-1])
    assert_equal(lambda x, w: ops.rms_norm(x, w, eps), *inputs, calls=["npu_rms_norm"])


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("head_dim", [2, 6, 24, 128])
@pytest.mark.parametrize("by_row", [False, True])
def test_rope(heads: int, head_dim: int, by_row: bool) -> None:
    config = replace(CONFIG, head_dim=head_dim)
    positions = torch.tensor([[0, 1, 2, 3, 4], [0, 1, 0, 1, 2]]) if by_row else torch.arange(5)
    cos, sin = ops.rope_table(ops.rope_frequencies(config, 5, torch.float64), positions, torch.float64)
    assert_equal(lambda x: ops.apply_rope(x, cos, sin), random(2, 5, heads, head_dim), calls=["npu_rotary_mul"])


def test_swiglu() -> None:
    assert_equal(ops.swiglu, random(2, 3, 11), random(2, 3, 11), calls=["npu_swiglu"])


@given(
    batch=st.integers(1, 3), length=st.integers(1, 33), groups=st.sampled_from([1, 2, 3]),
    queries=st.sampled_from([1, 2, 4]), head_dim=st.sampled_from([1, 2, 6, 12, 40]),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_causal_attention(batch: int, length: int, groups: int, queries: int, head_dim: int) -> None:
    q = random(batch, length, groups * queries, head_dim)
    k, v = random(batch, length, groups, head_dim), random(batch, length, groups, head_dim)
    assert_equal(ops.causal_attention, q, k, v, calls=["npu_fusion_attention"])
    assert npu_twin.calls[0][1]["sparse_mode"] == 2


def test_a_row_longer_than_the_compressed_mask() -> None:
    length = npu.COMPRESSED_MASK_SIZE + 61
    assert_equal(ops.causal_attention, *(random(1, length, 1, 2) for _ in "qkv"), calls=["npu_fusion_attention"])


@given(
    rows=st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=4), min_size=1, max_size=3),
    groups=st.sampled_from([1, 2]), head_dim=st.sampled_from([3, 8]),
)  # fmt: skip
@settings(max_examples=30, deadline=None)
def test_attention_within_documents(rows: list[list[int]], groups: int, head_dim: int) -> None:
    length = max(map(sum, rows))
    mask = document_mask([[*row, *[1] * (length - sum(row))] for row in rows])
    q = random(len(rows), length, 4, head_dim)
    k, v = (random(len(rows), length, groups, head_dim) for _ in "kv")
    assert_equal(lambda *qkv: ops.causal_attention(*qkv, mask), q, k, v, calls=["npu_fusion_attention"])


def test_documents_do_not_see_each_other() -> None:
    """Attention within packed documents is that of each document alone: the mask means what it says."""
    lengths = [4, 1, 7]
    q, k, v = random(1, 12, 4, 6), random(1, 12, 2, 6), random(1, 12, 2, 6)
    parts = (x.split(lengths, dim=1) for x in (q, k, v))
    alone = torch.cat([ops.causal_attention(*part) for part in zip(*parts, strict=True)], dim=1)
    with on_twin():
        packed = ops.causal_attention(q, k, v, document_mask([lengths]))
    torch.testing.assert_close(packed, alone, rtol=1e-12, atol=1e-12)


def test_fewer_queries_than_keys() -> None:
    """A context-parallel process attends with its own positions to all keys, under a mask of its own."""
    mask = (torch.tensor([0, 1, 6, 7])[:, None] >= torch.arange(8))[None, None]
    q, k, v = random(2, 4, 4, 6), random(2, 8, 2, 6), random(2, 8, 2, 6)
    assert_equal(lambda *qkv: ops.causal_attention(*qkv, mask), q, k, v, calls=["npu_fusion_attention"])


@pytest.mark.usefixtures("npu_there")
def test_one_inverse_of_a_mask_serves_all_layers_and_goes_with_it() -> None:
    mask = document_mask([[3, 4]])
    for _ in range(2):
        ops.causal_attention(random(1, 7, 2, 4), random(1, 7, 2, 4), random(1, 7, 2, 4), mask)
    first, second = (call["atten_mask"] for _, call in npu_twin.calls)
    assert first is second
    npu_twin.calls.clear()
    del first, second
    held = len(npu._inverted_masks)
    del mask
    assert len(npu._inverted_masks) == held - 1


# The classic silent bug: without atten_mask the kernel is not causal, whatever sparse_mode says.


@given(length=st.integers(1, 20), masked=st.booleans())
@settings(max_examples=20, deadline=None)
def test_a_mask_is_always_given(length: int, masked: bool) -> None:
    mask = document_mask([[length]]) if masked else None
    with on_twin():
        ops.causal_attention(random(1, length, 2, 4), random(1, length, 2, 4), random(1, length, 2, 4), mask)
    given_mask = npu_twin.calls[0][1]["atten_mask"]
    assert isinstance(given_mask, Tensor)
    assert given_mask.dtype == torch.bool


@pytest.mark.parametrize("sparse_mode", [0, 2, 3])
def test_the_twin_shows_what_a_missing_mask_does(sparse_mode: int) -> None:
    q, k, v = (random(1, 9, 2, 4) for _ in "qkv")
    wrong = npu._fusion_attention(npu_twin, q, k, v, hidden=None, sparse_mode=sparse_mode, ahead=0)  # type: ignore[arg-type]
    assert (wrong - ops.causal_attention(q, k, v)).abs().max() > 0.1
    everything = torch.ones(1, 1, 9, 9, dtype=torch.bool)
    torch.testing.assert_close(wrong, ops.causal_attention(q, k, v, everything))  # it looks ahead


def test_the_twin_shows_what_an_uninverted_mask_does() -> None:
    q, k, v = (random(1, 9, 2, 4) for _ in "qkv")
    mask = document_mask([[9]])
    wrong = npu._fusion_attention(npu_twin, q, k, v, hidden=mask, sparse_mode=0, ahead=npu.UNBOUNDED)
    right = ops.causal_attention(q, k, v, mask)
    assert not torch.allclose(wrong, right)


def test_the_twin_refuses_a_mask_of_another_mode() -> None:
    q, k, v = (random(1, 9, 2, 4) for _ in "qkv")
    with pytest.raises(AssertionError, match="compressed causal mask"):
        npu._fusion_attention(npu_twin, q, k, v, hidden=~document_mask([[9]]), sparse_mode=2, ahead=0)
    with pytest.raises(AssertionError, match="whole mask"):
        npu._fusion_attention(npu_twin, q, k, v, hidden=npu._causal_mask(q), sparse_mode=0, ahead=0)


# The whole model, and where the kernels decline.


@pytest.mark.parametrize("packed", [False, True])
def test_the_model_is_the_same_on_fused_operators(packed: bool) -> None:
    torch.manual_seed(0)
    model = Llama(CONFIG).double()
    tokens = torch.randint(0, CONFIG.vocab_size, (2, 9))
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 8], [0, 1, 2, 0, 1, 0, 1, 2, 3]]) if packed else None
    mask = document_mask([[9], [3, 2, 4]]) if packed else None
    results = []
    for context in (None, on_twin()):
        with context or torch.enable_grad():
            logits = model(tokens, positions, mask)
            gradients = torch.autograd.grad(logits.square().sum(), list(model.parameters()))
        results.append([logits, *gradients])
    for expected, got in zip(*results, strict=True):
        assert (got - expected).norm() <= TOLERANCE * expected.norm()
    layers = CONFIG.num_hidden_layers
    assert Counter(name for name, _ in npu_twin.calls) == {
        "npu_fusion_attention": layers, "npu_rotary_mul": 2 * layers, "npu_swiglu": layers,
        "npu_rms_norm": 2 * layers + 1,
    }  # fmt: skip


def test_the_model_is_the_same_under_sequence_parallelism() -> None:
    """There the norms see DTensors, for which the vendor's operators have no rules."""
    script = Path(__file__).with_name("sequence_parallel_norms.py")
    port = str(free_port())
    environment = {
        **os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(script.parents[1]),
    }  # fmt: skip
    processes = [
        subprocess.Popen([sys.executable, script], env={**environment, "RANK": str(rank)}, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    try:
        printed = [process.communicate(timeout=900)[1].decode() for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(printed)


@pytest.mark.usefixtures("npu_there")
def test_the_norms_epsilon_is_the_models() -> None:
    model = Llama(replace(CONFIG, rms_norm_eps=0.25)).double()
    model(torch.zeros(1, 3, dtype=torch.long))
    assert {call["epsilon"] for name, call in npu_twin.calls if name == "npu_rms_norm"} == {0.25}


@pytest.mark.usefixtures("npu_there")
def test_beyond_the_kernels_limits_torch_does_it() -> None:
    wide = (random(1, 3, 1, 770) for _ in "qkv")
    assert ops.causal_attention(*wide).shape == (1, 3, 1, 770)
    table = random(3, 896), random(3, 896)
    assert ops.apply_rope(random(1, 3, 1, 896), *table).shape == (1, 3, 1, 896)
    assert ops.apply_rope(random(1000, 1, 1, 2), random(1, 2), random(1, 2)).shape == (1000, 1, 1, 2)
    assert ops.rms_norm(random(1, 3, 8, dtype=torch.bfloat16), random(8, dtype=torch.float32), 1e-5).shape == (1, 3, 8)
    with torch.inference_mode():  # the attention kernel is for training
        assert ops.causal_attention(*(random(1, 3, 1, 4) for _ in "qkv")).shape == (1, 3, 1, 4)
    assert npu_twin.calls == []


def test_fused_operators_are_npus_alone() -> None:
    for kind, _ in device.DEVICES.items():
        assert device.fused_operators(kind) is None  # torch_npu is not installed here


def test_only_npu_needs_the_cpu_to_sum_float64() -> None:
    assert [device.reduces_on_host(kind, torch.float64) for kind in ("cpu", "cuda", "npu")] == [False, False, True]
    assert not device.reduces_on_host("npu", torch.float32)


def test_grouped_heads_under_a_mask_are_spread_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """There no fused kernel takes both a mask and fewer key-value heads; the result is the same."""
    q, k, v = random(1, 6, 4, 8), random(1, 6, 2, 8), random(1, 6, 2, 8)  # float64: torch's own attention
    mask = torch.ones(6, 6, dtype=torch.bool).tril()[None, None]
    expected = ops.causal_attention(q, k, v, mask)
    seen = []
    plain = torch.nn.functional.scaled_dot_product_attention

    def record(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: object) -> torch.Tensor:
        seen.append((k.shape[1], options["enable_gqa"]))
        return plain(q, k, v, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
    ops.causal_attention(q, k, v)
    monkeypatch.setattr(ops.device, "expands_kv_heads_under_mask", lambda kind: True)
    ops.causal_attention(q, k, v)
    assert seen == [(2, True), (2, True)]  # causal attention shares heads everywhere
    assert torch.equal(ops.causal_attention(q, k, v, mask), expected)
    assert seen[2] == (4, False)
