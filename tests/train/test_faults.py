"""One process of three goes wrong: all of them notice, do the same, and name it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from toy import write_config, write_data

pytestmark = pytest.mark.slow

CASES = {  # fault and the layout of three data-parallel processes: three copies, or one state cut in three
    "nan in one copy": ("nan", 1, {"parallel.zero_group": 1}),
    "nan in one shard": ("nan", 1, {"train.check_replicas_every": 0}),
    "flip": ("flip", 2, {"parallel.zero_group": 1}),
    "sleep": ("sleep", 1, {"watch.seconds": 1.5}),
    "slow": ("slow", 2, {"watch.every": 2}),
}


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Runs all cases in one launch; the directory of the runs, and what each process told."""
    root = tmp_path_factory.mktemp("faults")
    common = {
        "model": write_config(root / "model"), "data.prefix": write_data(root / "data"), "train.steps": 6,
        "train.sequence_length": 16, "train.global_batch": 6, "train.micro_batch": 2, "train.dtype": "float32",
        "train.check_replicas_every": 1, "checkpoint.every": 0, "schedule.lr": 1e-2, "data.split": "90,10,0",
    }  # fmt: skip
    cases = [
        {"name": name, "fault": fault, "rank": rank,
         "settings": {k: str(v) for k, v in {**common, **settings, "out": root / name}.items()}}
        for name, (fault, rank, settings) in CASES.items()
    ]  # fmt: skip
    job = {"cases": cases, "processes": 3, "results": str(root / "results.jsonl")}
    (root / "job.json").write_text(json.dumps(job))
    command = [sys.executable, str(Path(__file__).parent / "run_faults.py"), str(root / "job.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return root, [json.loads(line) for line in (root / "results.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("case", ["nan in one copy", "nan in one shard"])
def test_a_nan_on_one_process_has_all_skip_the_same_step(told: Any, case: str) -> None:
    root, results = told
    mine = sorted((r["rank"], r["skipped"], r["failed"]) for r in results if r["case"] == case)
    assert mine == [(rank, [3], "") for rank in range(3)]  # and the copies were alike after every step
    assert "SKIPPED step 3" in (root / case / "log.txt").read_text()


def test_a_flipped_bit_in_one_copy_names_its_process_and_stops_all(told: Any) -> None:
    mine = [r["failed"] for r in told[1] if r["case"] == "flip"]
    assert len(mine) == 3
    assert set(mine) == {
        "after step 3 copies of one state differ: rank 2 from ranks 0-1 in model.norm.weight; the run has stopped"
    }


def test_a_step_that_takes_too_long_leaves_the_stacks_of_all(told: Any) -> None:
    home = told[0] / "sleep"
    stacks = [(home / "stacks" / f"rank-{rank:05d}.txt").read_text() for rank in range(3)]
    assert "in oversleep" in stacks[1]
    assert all("in forward_backward" in stacks[rank] for rank in (0, 2))  # they wait in a collective
    assert all("in _watch" in text for text in stacks)  # all threads are there
    log = (home / "log.txt").read_text()
    assert "WATCHDOG: step 3 takes longer than 1.5 s: rank 1 in run_faults.py" in log
    assert "ranks 0, 2 in" in log
    assert "WATCHDOG: step 3 ended after" in log


def test_a_slow_process_is_named_in_the_metrics_and_the_log(told: Any) -> None:
    home = told[0] / "slow"
    lines = [json.loads(line) for line in (home / "metrics.jsonl").read_text().splitlines()]
    found = [line for line in lines if line["kind"] == "ranks"]
    assert [line["iteration"] for line in found] == [2, 4, 6]
    assert {line["slowest_rank"] for line in found} == {2}
    assert all(line["slowest_ms"] > 200 and line["slowest_ratio"] > 1.5 for line in found)
    assert "SLOW: rank 2 takes" in (home / "log.txt").read_text()
