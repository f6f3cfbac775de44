from __future__ import annotations

import json
from pathlib import Path

import pytest

from arriero.cli.main import dispatch
from arriero.cli.torture import command as torture
from arriero.common.errors import EXIT_USAGE, CheckFailed, UserError
from programs import arriero

pytestmark = pytest.mark.slow


def test_killed_and_killed_again_it_ends_the_same(tmp_path: Path) -> None:
    printed = arriero("torture", "--kills", 3, "--processes", 2, "--seed", 3, "--json", "--out", tmp_path / "runs")
    found = json.loads(printed[printed.index("{") :])
    assert sum(found["kills"].values()) == 3
    assert found["resumes"] >= 3
    assert found["runs that ended otherwise"] == 0
    assert len(found["other layouts"]) == 3
    assert all(0 < value < 1e-10 for value in found["other layouts"].values())


def test_a_run_that_ends_otherwise_fails() -> None:
    results = torture.KillResults(runs=1, outcomes=[("other", [])])
    with pytest.raises(CheckFailed, match="1 of 1 runs ended otherwise"):
        torture.report(torture.TortureArgs(json=True), ("sha", []), results, {}, 1.0)
    with pytest.raises(CheckFailed, match="0 of 0 runs"):
        torture.report(torture.TortureArgs(json=True), ("sha", []), torture.KillResults(), {"tensor 2": 1e-3}, 1.0)


def test_impossible_orders_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(["torture", "--kills", "0"]) == EXIT_USAGE
    assert "--kills is 0" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is not empty"):
        torture.run(torture.TortureArgs(out=str(tmp_path)))
    inside = tmp_path / "checkpoints/step-00000002"
    with pytest.raises(UserError, match="is or lies in the checkpoint"):
        torture.run(torture.TortureArgs(out=str(inside / "runs")))
    assert not inside.exists()
