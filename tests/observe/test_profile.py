from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from arriero.common.errors import UserError
from arriero.observe.profile import Profile, profile_problems, profile_steps


def test_steps() -> None:
    assert profile_steps("") is None
    assert profile_steps("10:13") == profile_steps("steps=10:13") == (10, 13)
    assert profile_steps("4:4") == (4, 4)


@pytest.mark.parametrize("text", ["10", "13:10", "0:3", "a:b", "1:2:3", "steps=", "-1:3", "1:"])
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="the first and the last step"):
        profile_steps(text)
    assert len(profile_problems(text, 100)) == 1


def test_after_the_last_step_it_has_no_effect() -> None:
    assert "begins after the last step, 6" in profile_problems("7:9", 6)[0].problem
    assert profile_problems("6:9", 6) == profile_problems("", 6) == []


@pytest.mark.parametrize("last", [3, 9])
def test_the_trace_holds_the_asked_steps(tmp_path: Path, last: int) -> None:
    """Steps multiply matrices of as many rows; a run that ends early still leaves its trace."""
    profile = Profile(f"2:{last}", tmp_path / "run" / "profile", 1)
    for number in range(1, 5):
        with profile.step(number):
            torch.ones(number, 2) @ torch.ones(2, 2)
    assert profile.finish() == f" profile: {tmp_path}/run/profile/rank-1.json"
    events = json.loads((tmp_path / "run" / "profile" / "rank-1.json").read_text())["traceEvents"]
    assert sum(e.get("name") == "aten::mm" for e in events) == min(last, 4) - 1


def test_steps_that_were_not_run_are_told(tmp_path: Path) -> None:
    profile = Profile("5:6", tmp_path, 0)
    with profile.step(1):
        pass
    assert profile.finish() == " NO profile: steps 5 to 6 were not run"
    assert Profile("", tmp_path, 0).finish() == ""
    assert list(tmp_path.iterdir()) == []
