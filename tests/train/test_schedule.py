"""The learning rate as a function of the step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from arriero.train.schedule import ScheduleConfig, learning_rate

BASE = ScheduleConfig(lr=1.0, min_lr=0.1, warmup_steps=10)


def curve(config: ScheduleConfig, steps: int = 100) -> list[float]:
    return [learning_rate(config, i, steps) for i in range(steps + 1)]


def theirs(make: str, steps: int, **options: float) -> list[float]:
    """The same curve from transformers' scheduler, which starts its warm-up at 0, one step before ours."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = getattr(transformers, make)(optimizer, num_warmup_steps=10, num_training_steps=steps, **options)
    rates = []
    for _ in range(steps + 1):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


def test_cosine_and_linear_equal_transformers_after_warmup() -> None:
    cosine, linear = curve(replace(BASE, min_lr=0.0)), curve(replace(BASE, min_lr=0.0, shape="linear"))
    assert cosine[10:] == pytest.approx(theirs("get_cosine_schedule_with_warmup", 100)[10:], abs=1e-12)
    assert linear[10:] == pytest.approx(theirs("get_linear_schedule_with_warmup", 100)[10:], abs=1e-12)


def test_warmup_reaches_the_peak_and_never_is_zero() -> None:
    rates = curve(BASE)
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert curve(replace(BASE, warmup_steps=0, warmup_fraction=0.1)) == rates


def test_wsd_holds_then_falls() -> None:
    rates = curve(replace(BASE, shape="wsd", wsd_decay_fraction=0.2))
    assert set(rates[10:81]) == {1.0}
    assert rates[90] == pytest.approx(0.55)
    assert rates[100] == pytest.approx(0.1)


@given(
    st.sampled_from(["cosine", "linear", "constant", "wsd"]), st.integers(0, 20), st.integers(1, 200),
    st.integers(0, 300), st.floats(0.01, 1),
)  # fmt: skip
def test_bounds_hold_for_any_schedule(shape: str, warmup: int, steps: int, step: int, part: float) -> None:
    config = ScheduleConfig(shape=shape, lr=1.0, min_lr=0.1, warmup_steps=warmup, wsd_decay_fraction=part)
    rate = learning_rate(config, step, steps)
    assert 0 < rate <= 1.0
    if step >= max(warmup, steps) and shape != "constant":
        assert rate == pytest.approx(0.1)


def test_impossible_values_are_named() -> None:
    both = replace(BASE, warmup_fraction=0.1)
    assert "both set" in str(both.problems()[0])
    assert "min_lr" in str(replace(BASE, min_lr=2.0).problems()[0])
    assert not BASE.problems()
