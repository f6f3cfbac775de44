from __future__ import annotations

from typing import Any

import pytest
import torch

from arriero.observe import step_time
from arriero.observe.step_time import StepClock


class FakeTime:
    """A clock that stands still until it is told to go on."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock_time(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    fake = FakeTime()
    monkeypatch.setattr(step_time, "time", fake)
    return fake


def test_phases_follow_each_other_without_a_gap(clock_time: FakeTime) -> None:
    clock = StepClock("cpu")
    clock_time.now += 1
    clock.begin(shown=False)
    for phase, seconds in (("data_wait", 2), ("forward", 3), ("backward", 4), ("forward", 5), ("optimizer", 6)):
        clock_time.now += seconds
        clock.mark(phase)
    expected = {"logging": 1, "data_wait": 2, "forward": 8, "backward": 4, "optimizer": 6}
    assert clock.take() == expected
    assert sum(expected.values()) == clock_time.now
    assert clock.take() == {}


def test_what_is_inside_is_taken_from_what_is_around(clock_time: FakeTime) -> None:
    clock = StepClock("cpu")

    def collective() -> str:
        clock_time.now += 2
        return "sum"

    clock_time.now += 1
    assert clock.inside("communication", collective) == "sum"
    clock_time.now += 3
    clock.mark("forward")
    assert clock.take() == {"communication": 2, "forward": 4}


def test_a_validation_is_one_phase_whatever_runs_in_it(clock_time: FakeTime) -> None:
    clock = StepClock("cpu")
    with clock.whole("validation"):
        clock_time.now += 2
        clock.mark("forward")
        clock.inside("communication", lambda: setattr(clock_time, "now", clock_time.now + 1))
    clock_time.now += 4
    clock.begin(shown=True)
    assert clock.take() == {"logging": 4, "validation": 3}


def test_between_the_calls_of_a_schedule(clock_time: FakeTime) -> None:
    clock = StepClock("cpu")

    def forward(x: int) -> int:
        clock_time.now += x
        return x

    timed = clock.timed(forward, "forward", "communication")
    for _ in range(2):
        clock_time.now += 10
        assert timed(3) == 3
    assert clock.take() == {"communication": 20, "forward": 6}


class Device:
    """An accelerator whose events tell a time of their own."""

    clock = 0.0

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = Device.clock

        def elapsed_time(self, other: Any) -> float:
            return other.at - self.at  # ms, as torch's


def test_on_an_accelerator_events_count_and_only_in_a_step_that_is_shown(
    clock_time: FakeTime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_device_module", lambda kind: Device)
    clock = StepClock("cuda")
    for shown in (True, False):
        clock.begin(shown=shown)
        for phase in ("data_wait", "forward", "backward", "forward", "optimizer"):
            clock_time.now += 0.001  # the host is soon done
            Device.clock += 50
            clock.mark(phase)
        found = clock.take()
        assert found["data_wait"] == pytest.approx(0.001)
        if shown:
            assert (found["forward"], found["backward"], found["optimizer"]) == (0.1, 0.05, 0.05)
        else:
            assert not {"forward", "backward", "optimizer"} & set(found)
