"""The benchmark of the CPU's training step against its peers, small, with those that are installed."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture
def train_cpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("train_cpu")


def test_table_and_figures(tmp_path: Path, train_cpu: Any) -> None:
    wanted = ("arriero", "transformers", "transformers Trainer", "litgpt")
    only = [word for name in wanted for word in ("--only", name)]
    words = ["--tiny", "--dtype", "float32", "--rounds", "2", "--steps", "2", "--threads", "1", *only]
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "train_cpu.py"), *words, "--json", str(tmp_path / "found.json")],
        capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    table = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    assert (
        [line[0] for line in table[2:]]
        == [f"| {name}" for name in wanted]
        == [f"| {row['contender']}" for row in found["rows"]]
    )
    assert len({len(line) for line in table}) == 1
    rows = {row["contender"]: row for row in found["rows"]}
    for name in wanted:
        absent = [p for p in train_cpu.contenders()[name].needs if not importlib.util.find_spec(p)]
        assert rows[name].get("problem", "") == (f"not installed: {', '.join(absent)}" if absent else "")
    assert {"arriero", "transformers"} <= {name for name, row in rows.items() if "problem" not in row}
    for row in (row for row in rows.values() if "problem" not in row):
        check_row(row, rows["arriero"], found)
    assert rows["arriero"]["of_arriero"] == 1.0


def check_row(row: dict[str, Any], ours: dict[str, Any], found: dict[str, Any]) -> None:
    """The figures follow from the turns, and the contender trains what arriero trains."""
    # ln V + initializer_range^2 x hidden / 2 at random weights; the last loss is after six updates of the same kind.
    assert row["first_loss"] == pytest.approx(math.log(512), rel=0.02)
    assert row["first_loss"] == pytest.approx(ours["first_loss"], abs=1e-4)
    assert row["last_loss"] == pytest.approx(ours["last_loss"], abs=1e-3)
    assert abs(row["last_loss"] - row["first_loss"]) > 1e-3
    rates = [2 * 256 / turn["cpu_seconds"] for turn in row["turns"]]
    assert len(rates) == 2
    assert row["tokens_per_cpu_second"] == pytest.approx(sum(rates) / 2)
    ratios = [turn["cpu_seconds"] / mine["cpu_seconds"] for turn, mine in zip(ours["turns"], row["turns"], strict=True)]
    assert row["of_arriero"] == pytest.approx(sum(ratios) / 2)
    # Matrices: 2 layers of 4 x 64^2 + 3 x 64 x 128, and the head; attention: 6 L d s.
    flops = 6 * (2 * (4 * 64**2 + 3 * 64 * 128) + 512 * 64) + 6 * 2 * 64 * 64
    peak = max(found["matmul_tflops_before"], found["matmul_tflops_after"])
    assert row["mfu"] == pytest.approx(flops * row["tokens_per_cpu_second"] / (peak * 1e12))
    assert row["first_step_seconds"] > 0
    assert 0.1 < row["peak_memory_gb"] < 10
    assert row["compile_seconds"] is None


def test_losses_that_differ_are_refused(train_cpu: Any) -> None:
    same = {"a": 10.40001, "b": 10.40005, "c": 10.39996}
    assert train_cpu.disagreement(same, 1e-4) == ""
    assert train_cpu.disagreement({"a": 10.4}, 1e-4) == ""
    for other in (10.4002, 10.3998, math.nan, math.inf):
        told = train_cpu.disagreement(same | {"d": other}, 1e-4)
        assert "do not train the same model" in told
        assert f"d {other:.6f}" in told


def test_nothing_is_compared_after_a_disagreement(train_cpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stub:
        turns = 0

        def __init__(self, job: Any) -> None:
            self.name, self.closed, self.start = job.name, False, {}
            stubs.append(self)

        def warm_up(self) -> None:
            self.start = {"first_loss": 6.2 if self.name == "arriero" else 6.3}

        def turn(self, steps: int) -> None:
            Stub.turns += steps

        def close(self) -> None:
            self.closed = True

    stubs: list[Stub] = []
    monkeypatch.setattr(train_cpu, "start", Stub)
    with pytest.raises(SystemExit, match=r"arriero 6\.2.*transformers 6\.3"):
        train_cpu.main(["--tiny", "--rounds", "1", "--only", "arriero", "--only", "transformers"])
    assert [stub.closed for stub in stubs] == [True, True]
    assert Stub.turns == 0


def test_a_library_for_the_peers_must_be_there(train_cpu: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train_cpu.main(["--preload", "/nowhere/libtcmalloc.so"])
    assert "there is no /nowhere/libtcmalloc.so" in capsys.readouterr().err


PROGRAM = """
from turns import Turns
turns = Turns(warmup=2)
turns.begin()
for step in range(7):
    print("a library's print")
    if step == 5:
        raise RuntimeError("out of luck")
    turns.after_step(10.0 - step)
"""


def test_turns_are_counted_and_a_failure_is_told(tmp_path: Path, train_cpu: Any) -> None:
    turns = importlib.import_module("turns")
    log, path = tmp_path / "log", {"PYTHONPATH": f"{BENCHMARKS}:{os.environ.get('PYTHONPATH', '')}"}
    player = turns.Player("one", [sys.executable, "-c", PROGRAM], log, path)
    start = player.warm_up()
    assert (start["first_loss"], start["last_loss"], len(start["warmup_seconds"])) == (10.0, 9.0, 2)
    assert player.turn(1)["last_loss"] == 8.0
    assert player.turn(2)["last_loss"] == 6.0
    assert [turn["last_loss"] for turn in player.turns] == [8.0, 6.0]
    assert all(turn["cpu_seconds"] > 0 for turn in player.turns)
    with pytest.raises(turns.PlayerError, match=r"(?s)one failed.*out of luck"):
        player.turn(1)
    player.close()
    ended = turns.Player("two", [sys.executable, "-c", PROGRAM], log, path)
    ended.warm_up()
    ended.close()
    assert ended.process.returncode == 0
