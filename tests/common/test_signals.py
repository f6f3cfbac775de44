"""Signals to a run of several processes, however they arrive: saved, or ended at once, and nothing left behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from toy import write_recipe

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
SAVED = ["group twice", "timeout -s INT", "launcher", "worker 1", "nohup", "lone, timeout -s INT"]
ENDED = {
    "second Ctrl-C": (130, "ended by SIGINT: without saving"),
    "starting": (143, "ended by SIGTERM: before the first step"),
    "verify, Ctrl-C": (130, "ended by SIGINT"),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    recipe = write_recipe(tmp_path_factory.mktemp("signals"))
    command = [sys.executable, HERE / "run_signals.py", recipe, *SAVED, *ENDED]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return {record["case"]: record for record in map(json.loads, done.stdout.splitlines())}


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("case", SAVED)
def test_the_state_is_saved_however_a_signal_arrives(outcomes: dict[str, Any], case: str) -> None:
    found = outcomes[case]
    assert (found["code"], found["saved"], found["orphans"], found["left"]) == (75, 1, [], []), found["output"]
    assert found["output"].count("saving after the present step") == 1
    assert "Ctrl-C ends at once, without saving" in found["output"]
    assert "Traceback" not in found["output"]


@pytest.mark.parametrize("case", ENDED)
def test_what_cannot_be_saved_ends_in_order(outcomes: dict[str, Any], case: str) -> None:
    found = outcomes[case]
    assert (found["code"], found["saved"], found["orphans"], found["left"]) == (ENDED[case][0], 0, [], []), found[
        "output"
    ]
    assert ENDED[case][1] in found["output"]
    assert "Traceback" not in found["output"]
    assert case.startswith("second") or "saving" not in found["output"]
