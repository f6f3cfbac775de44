"""AdamW against torch.optim's own, step by step: with clipping, with offload, and taken up again in the middle."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from arriero.common import device
from arriero.distributed.parallel.mesh import Ranks
from arriero.model.config import LlamaConfig
from arriero.model.llama import Llama
from arriero.train.config import OptimConfig
from arriero.train.optim import AdamW, Optimizer

CONFIG = LlamaConfig(
    vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=6, attention_bias=True,
)  # fmt: skip
STEPS = 6


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pair(dtype: torch.dtype = torch.float32) -> tuple[Llama, Llama]:
    """Twice the same model."""
    ours, theirs = Llama(CONFIG).to(dtype), Llama(CONFIG).to(dtype)
    for number, (a, b) in enumerate(zip(ours.parameters(), theirs.parameters(), strict=True)):
        value = torch.randn(a.shape, generator=drawn(number), dtype=dtype)
        a.data.copy_(value)
        b.data.copy_(value)
    return ours, theirs


def give_gradients(model: Llama, step: int, change: Callable[[torch.Tensor], torch.Tensor] = lambda g: g) -> None:
    for number, p in enumerate(model.parameters()):
        p.grad = change(torch.randn(p.shape, generator=drawn(100 * step + number + 1000), dtype=p.dtype))


def torch_adamw(model: Llama, config: OptimConfig, **options: bool) -> torch.optim.AdamW:
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=config.betas, eps=config.eps, **options)


def take_step(optimizer: Optimizer, model: Llama, step: int, divisor: float = 1.0) -> None:
    give_gradients(model, step)
    optimizer.collect_gradients()
    optimizer.step(lr=rate(step), divisor=divisor)
    optimizer.clear()


def rate(step: int) -> float:
    return 1e-2 / step


def follow(theirs: torch.optim.AdamW, model: Llama, step: int, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    give_gradients(model, step, change)
    for group in theirs.param_groups:
        group["lr"] = rate(step)
    theirs.step()


@pytest.mark.parametrize("divisor", [1.0, 3.7, 0.31])
@pytest.mark.parametrize("offload", [False, True])
def test_every_step_is_that_of_torchs_fused_adamw_to_the_bit(*, offload: bool, divisor: float) -> None:
    """It is the same kernel; gradients divided beforehand by the float32 divisor are what it computes with."""
    config = OptimConfig(offload=offload)
    ours, theirs = pair()
    optimizer, reference = AdamW([ours], config, Ranks()), torch_adamw(theirs, config, fused=True)
    optimizer.load(None, updates=0)
    for step in range(1, STEPS + 1):
        take_step(optimizer, ours, step, divisor)
        follow(reference, theirs, step, lambda g: g / torch.tensor(divisor))
        for name, parameter in ours.named_parameters():
            other = theirs.get_parameter(name)
            assert torch.equal(parameter, other), (step, name)
            for moment, held in optimizer.states().items():
                assert torch.equal(held[name], reference.state[other][moment]), (step, name, moment)


def test_clipping_is_torchs_clipping_but_for_the_last_bit() -> None:
    """torch multiplies by the reciprocal, the kernel divides: each rounds once, so a gradient differs by one ulp."""
    ours, theirs = pair()
    optimizer, reference = AdamW([ours], OptimConfig(), Ranks()), torch_adamw(theirs, OptimConfig())
    optimizer.load(None, updates=0)
    for step in range(1, STEPS + 1):
        give_gradients(ours, step)
        optimizer.collect_gradients()
        norm = optimizer.gradient_norm().item()
        optimizer.step(lr=rate(step), divisor=(norm + 1e-6) / 0.5)
        give_gradients(theirs, step)
        assert torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5).item() == pytest.approx(norm, rel=1e-6)
        for group in reference.param_groups:
            group["lr"] = rate(step)
        reference.step()
    for name, parameter in ours.named_parameters():
        other = theirs.get_parameter(name)
        torch.testing.assert_close(
            optimizer.states()["exp_avg"][name], reference.state[other]["exp_avg"], rtol=1e-5, atol=1e-9
        )
        torch.testing.assert_close(parameter, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("divides", [True, False])
def test_in_float64_the_divisor_is_exact_and_the_plain_formula_is_met(
    *, divides: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel would take the divisor in float32, and two layouts whose norms differ in the last bit would part."""
    monkeypatch.setattr("arriero.train.optim.fused_adamw_takes_grad_scale", lambda kind: divides)
    ours, theirs = pair(torch.float64)
    optimizer, reference = AdamW([ours], OptimConfig(), Ranks()), torch_adamw(theirs, OptimConfig(), foreach=False)
    optimizer.load(None, updates=0)
    for step in range(1, STEPS + 1):
        take_step(optimizer, ours, step, 1.0 / 0.3)
        follow(reference, theirs, step, lambda g: g * 0.3)
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter, theirs.get_parameter(name), rtol=1e-13, atol=1e-15)
        moment = reference.state[theirs.get_parameter(name)]["exp_avg_sq"]
        torch.testing.assert_close(optimizer.states()["exp_avg_sq"][name], moment, rtol=1e-13, atol=0)


def test_a_device_whose_kernel_does_not_divide_gets_multiplied_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {kind: device.fused_adamw_takes_grad_scale(kind) for kind, _ in device.DEVICES.items()} == {
        "cpu": True, "cuda": True, "npu": False,
    }  # fmt: skip
    monkeypatch.setattr("arriero.train.optim.fused_adamw_takes_grad_scale", lambda kind: False)
    ours, theirs = pair()
    optimizer, reference = AdamW([ours], OptimConfig(), Ranks()), torch_adamw(theirs, OptimConfig(), fused=True)
    optimizer.load(None, updates=0)
    for step in range(1, STEPS + 1):
        take_step(optimizer, ours, step, 4.0)
        follow(reference, theirs, step, lambda g: g * 0.25)
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, theirs.get_parameter(name)), name


@pytest.mark.parametrize("offload", [False, True])
def test_taken_up_again_after_some_steps_it_goes_on_as_if_nothing_were(*, offload: bool) -> None:
    config = OptimConfig(offload=offload)
    whole, halves = pair()
    one, first = AdamW([whole], config, Ranks()), AdamW([halves], config, Ranks())
    one.load(None, updates=0)
    first.load(None, updates=0)
    for step in range(1, 4):
        take_step(one, whole, step, 2.5)
        take_step(first, halves, step, 2.5)
    saved = {m: {name: held.clone() for name, held in by_name.items()} for m, by_name in first.states().items()}
    second = AdamW([halves], config, Ranks())
    second.load(saved, updates=3)
    for step in range(4, STEPS + 1):
        take_step(one, whole, step, 2.5)
        take_step(second, halves, step, 2.5)
    for name, parameter in halves.named_parameters():
        assert torch.equal(parameter, whole.get_parameter(name)), name


@pytest.mark.parametrize("offload", [False, True])
def test_starting_anew_forgets_moments_steps_and_values(*, offload: bool) -> None:
    config = OptimConfig(offload=offload)
    used, fresh = pair()
    values = {name: p.detach().clone() for name, p in used.named_parameters()}
    a, b = AdamW([used], config, Ranks()), AdamW([fresh], config, Ranks())
    a.load(None, updates=0)
    b.load(None, updates=0)
    for step in range(1, 4):
        take_step(a, used, step)
    for name, parameter in used.named_parameters():
        parameter.data.copy_(values[name])
    a.load(None, updates=0)
    for step in range(1, 4):
        take_step(a, used, step)
        take_step(b, fresh, step)
    for name, parameter in used.named_parameters():
        assert torch.equal(parameter, fresh.get_parameter(name)), name


def test_moments_are_there_before_the_first_step() -> None:
    model, _ = pair()
    optimizer = AdamW([model], OptimConfig(), Ranks())
    optimizer.load(None, updates=0)
    before = {name: held.data_ptr() for name, held in optimizer.states()["exp_avg_sq"].items()}
    assert list(before) == [name for name, _ in model.named_parameters()]
    take_step(optimizer, model, 1)
    assert {name: held.data_ptr() for name, held in optimizer.states()["exp_avg_sq"].items()} == before
