"""The learning rate as a function of the step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from arriero.train.config import ScheduleConfig
from arriero.train.schedule import describe_rate_change, learning_rate

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


def test_a_longer_run_tells_how_its_rate_moves() -> None:
    config = ScheduleConfig(lr=3e-4, min_lr=3e-5)
    line = describe_rate_change(config, 6, config, 9, done=6)
    last, following = learning_rate(config, 5, 6), learning_rate(config, 6, 9)
    assert f"from {last:.3E} in step 6 to {following:.3E} in step 7" in line
    assert "--schedule.decay_steps 6 --allow-change schedule.decay_steps" in line
    assert describe_rate_change(config, 6, replace(config, decay_steps=6), 9, done=6) == ""
    later = describe_rate_change(replace(config, shape="wsd"), 100, replace(config, shape="wsd"), 200, done=50)
    assert "in step 91" in later or "in step 92" in later  # where the old one began to fall
    assert "--schedule.decay_steps 100" in later
    changed = describe_rate_change(config, 9, replace(config, lr=1e-3, warmup_steps=2), 9, done=4)
    assert "--schedule.lr 0.0003 --schedule.warmup_steps 0" in changed


SCHEDULES = st.builds(
    ScheduleConfig, shape=st.sampled_from(["cosine", "linear", "constant", "wsd"]), lr=st.sampled_from([1e-3, 3e-4]),
    min_lr=st.sampled_from([0.0, 1e-4]), warmup_steps=st.sampled_from([0, 3]), decay_steps=st.sampled_from([0, 7, 20]),
)  # fmt: skip


@given(SCHEDULES, SCHEDULES, st.integers(1, 30), st.integers(1, 30), st.integers(0, 30))
def test_a_line_is_due_just_where_the_curve_departs_and_its_advice_mends_it(
    then: ScheduleConfig, now: ScheduleConfig, before: int, steps: int, done: int
) -> None:  # fmt: skip
    done = min(done, before, steps)
    line = describe_rate_change(then, before, now, steps, done=done)
    both = range(done, max(done + 1, min(before, steps)))
    assert bool(line) == any(learning_rate(then, i, before) != learning_rate(now, i, steps) for i in both)
    if line:
        words = line.partition("stays with ")[2].partition(" --allow")[0].split()
        kinds = {"shape": str, "lr": float, "min_lr": float, "wsd_decay_fraction": float}
        keys = [word.removeprefix("--schedule.") for word in words[::2]]
        corrected = replace(now, **{k: kinds.get(k, int)(v) for k, v in zip(keys, words[1::2], strict=True)})
        assert describe_rate_change(then, before, corrected, steps, done=done) == ""
