"""The model against transformers: logits, loss and every gradient, in float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
import transformers

from arriero.model.config import LlamaConfig, RopeScaling, parameter_shapes
from arriero.model.llama import Llama

BASE = LlamaConfig(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=4, head_dim=8, rms_norm_eps=1e-5, max_position_embeddings=32,
)  # fmt: skip
LLAMA3 = RopeScaling(
    "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
)
VARIANTS = {
    "mha": {},
    "gqa": {"num_key_value_heads": 2},
    "mqa": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "head_dim": {"head_dim": 12},
    "eps and theta": {"rms_norm_eps": 1e-2, "rope_theta": 500.0},
    "rope llama3": {"rope_scaling": LLAMA3},
    "rope linear": {"rope_scaling": RopeScaling("linear", factor=4.0)},
    "rope dynamic, short": {"rope_scaling": RopeScaling("dynamic", factor=2.0)},
    "rope dynamic, long": {"rope_scaling": RopeScaling("dynamic", factor=2.0), "max_position_embeddings": 8},
    "all": {
        "num_key_value_heads": 2, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True,
        "head_dim": 6, "rope_scaling": LLAMA3,
    },
}  # fmt: skip


@pytest.fixture
def wide_transformers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lifts the places where transformers drops to float32 (norm, rotary) to float64, so that 1e-10 can be asked."""
    original = torch.get_default_dtype()
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch, "float", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(original)


def pair(config: LlamaConfig, dtype: torch.dtype) -> tuple[Llama, transformers.LlamaForCausalLM]:
    """The same random weights in both implementations; weights large enough that each operator matters."""
    torch.manual_seed(0)
    ours = Llama(config).to(dtype)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (1.0 if "norm" in name else 0.0))
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**config.to_json(), attn_implementation="eager")
    ).to(dtype)
    missing = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert not missing.missing_keys
    assert not missing.unexpected_keys
    return ours, theirs


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.usefixtures("wide_transformers")
def test_logits_loss_and_gradients_equal_transformers(variant: str) -> None:
    config = dataclasses.replace(BASE, **VARIANTS[variant])
    ours, theirs = pair(config, torch.float64)
    tokens = torch.randint(0, config.vocab_size, (2, 21), generator=torch.Generator().manual_seed(1))
    logits, expected = ours(tokens), theirs(tokens).logits
    assert logits.dtype == torch.float64
    assert relative(logits, expected) < 1e-10
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    expected_loss = theirs(tokens, labels=tokens).loss
    assert abs(loss.item() / expected_loss.item() - 1) < 1e-10
    loss.backward()
    expected_loss.backward()
    expected_gradients = dict(theirs.named_parameters())
    names = [name for name, _ in ours.named_parameters()]
    assert set(names) == set(parameter_shapes(config))
    for name, parameter in ours.named_parameters():
        gradient = expected_gradients[name].grad
        if name.endswith("k_proj.bias"):  # a constant added to all keys of a head leaves only its rotation's effect
            assert torch.allclose(parameter.grad, gradient, rtol=1e-9, atol=1e-13), name
        else:
            assert relative(parameter.grad, gradient) < 1e-10, name


@pytest.mark.parametrize("variant", ["mha", "all", "rope linear"])
def test_float32_equals_transformers(variant: str) -> None:
    config = dataclasses.replace(BASE, **VARIANTS[variant])
    ours, theirs = pair(config, torch.float32)
    tokens = torch.randint(0, config.vocab_size, (2, 21), generator=torch.Generator().manual_seed(1))
    assert relative(ours(tokens), theirs(tokens).logits) < 2e-6


def test_mask_and_positions_separate_documents() -> None:
    """Two documents in one row, masked and with positions reset, give what each gives alone."""
    model = Llama(BASE).double()
    a, b = torch.randint(0, 61, (1, 5)), torch.randint(0, 61, (1, 7))
    document = torch.tensor([0] * 5 + [1] * 7)
    mask = ((document[:, None] == document[None]) & torch.ones(12, 12, dtype=torch.bool).tril())[None, None]
    positions = torch.cat((torch.arange(5), torch.arange(7)))
    together = model(torch.cat((a, b), dim=1), positions, mask)
    assert torch.allclose(together, torch.cat((model(a), model(b)), dim=1), atol=1e-12)


def test_causal() -> None:
    model = Llama(BASE).double()
    tokens = torch.randint(0, 61, (1, 9))
    changed = tokens.clone()
    changed[0, 6] = (changed[0, 6] + 1) % 61
    difference = (model(tokens) - model(changed)).abs().amax(-1)[0]
    assert difference[:6].max() == 0
    assert difference[6:].min() > 0
