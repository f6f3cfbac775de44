"""Steps that are not trusted on one process: rewinding, spikes, and what a run's time went into."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import toy
from arriero.checkpoint.digest import state_sha256
from arriero.checkpoint.find import committed
from arriero.common.errors import UserError
from arriero.common.settings import parse
from arriero.common.toml import file_settings
from arriero.distributed.parallel.mesh import Ranks
from arriero.observe.events import KINDS, goodput, read_events
from arriero.train import guard
from arriero.train.guard import SpikeDetector
from arriero.train.loop import ResumePlan, train
from arriero.train.recipe import Recipe
from arriero.train.trainer import Trainer
from programs import arriero

pytestmark = pytest.mark.slow


def recipe_in(directory: Path, **changes: Any) -> Recipe:
    recipe = parse(Recipe, file_settings(toy.write_recipe(directory)), prog="test")
    recipe = replace(recipe, checkpoint=replace(recipe.checkpoint, every=3, keep=0))
    return replace(recipe, train=replace(recipe.train, **changes))


def run(recipe: Recipe, *checkpoints: Path) -> str:
    train(recipe, Ranks(), local_rank=0, device_kind="cpu", plan=ResumePlan(checkpoints))
    return state_sha256(committed(Path(recipe.out) / "checkpoints")[-1])


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Batch 4 makes the loss NaN; the numbers of the batches that steps have used."""
    original, used = Trainer.forward_backward, list[int]()

    def forward_backward(self: Trainer, micro: Any, *, train: bool) -> torch.Tensor:
        loss = original(self, micro, train=train)
        used.append(self.position.next_sample // 8)
        return loss * math.nan if used[-1] == 4 else loss

    monkeypatch.setattr(Trainer, "forward_backward", forward_backward)
    return used


def test_a_rewind_leaves_out_the_window_and_a_resume_repeats_it(tmp_path: Path, poison: list[int]) -> None:
    recipe = recipe_in(tmp_path, steps=8, on_nonfinite="rewind")
    digest = run(recipe)
    assert poison == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]  # after batch 4 step 4 is done again, with batch 5
    checkpoints = committed(Path(recipe.out) / "checkpoints")
    states = [json.loads((path / "state.json").read_text()).get("skipped_samples") for path in checkpoints]
    assert states == [None, [[24, 16]], [[24, 16]]]
    lines = [json.loads(line) for line in (Path(recipe.out) / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines if line["kind"] == "step"] == list(range(1, 9))
    log = (Path(recipe.out) / "log.txt").read_text()
    assert "SKIPPED step 5: loss nan" in log
    assert "REWOUND to step 3" in log
    assert "samples 24 to 39 are left out" in log
    poison.clear()
    assert run(replace(recipe, out=str(tmp_path / "again")), checkpoints[1]) == digest
    assert poison == [8, 9]


def test_without_a_checkpoint_it_goes_back_to_the_start(tmp_path: Path, poison: list[int]) -> None:
    recipe = recipe_in(tmp_path, steps=6, on_nonfinite="rewind")
    run(replace(recipe, checkpoint=replace(recipe.checkpoint, every=0)))
    assert poison == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]


def test_what_rewinding_cannot_mend_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "forward_backward", lambda self, micro, train: torch.tensor(math.nan).double())
    with pytest.raises(UserError, match="rewound 10 times"):
        run(recipe_in(tmp_path, steps=6, on_nonfinite="rewind"))


def test_rewinding_needs_data_that_goes_on(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path, on_spike="rewind")
    recipe = replace(recipe, data=replace(recipe.data, order="megatron"))
    assert any("rewind leaves batches out" in str(problem) for problem in recipe.problems(1))


def test_a_spike_stands_out_from_the_running_median() -> None:
    spikes = SpikeDetector(10.0)
    for i in range(guard.MIN_LOSSES - 1):
        spikes.add(5.0 + 0.01 * (i % 5))
    assert spikes.limit() == math.inf
    spikes.add(5.0)
    assert 5.3 < spikes.limit() < 5.7  # a hundredth of the median is the least deviation
    for i in range(200):
        spikes.add(4.0 + (i % 2))
    assert len(spikes.recent) == guard.LOSS_WINDOW
    assert spikes.limit() == pytest.approx(4.5 + 10 * 1.4826 * 0.5)


@pytest.mark.parametrize("policy", ["ignore", "skip", "stop", "rewind"])
def test_a_spike_is_handled_as_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str) -> None:
    monkeypatch.setattr(guard, "MIN_LOSSES", 3)
    original = Trainer.forward_backward

    def forward_backward(self: Trainer, micro: Any, *, train: bool) -> torch.Tensor:
        loss = original(self, micro, train=train)
        return torch.full_like(loss, 1000.0) if self.position.next_sample == 4 * 8 else loss

    monkeypatch.setattr(Trainer, "forward_backward", forward_backward)
    recipe = recipe_in(tmp_path, steps=6, on_spike=policy)
    if policy == "stop":
        with pytest.raises(UserError, match=r"step 5: loss 1000, .* a spike"):
            run(recipe)
        return
    run(recipe)
    log = (Path(recipe.out) / "log.txt").read_text()
    assert ("SKIPPED step 5: loss 1000" in log) == (policy != "ignore")
    assert ("REWOUND to step 3" in log) == (policy == "rewind")
    lines = [json.loads(line) for line in (Path(recipe.out) / "metrics.jsonl").read_text().splitlines()]
    assert sum(line.get("skipped_iterations", 0) for line in lines) == (policy == "skip")


def test_the_time_of_a_run_by_hand() -> None:
    def steps(first: int, last: int, at: float) -> list[dict[str, Any]]:
        return [{"event": "step", "at": at + i, "step": first + i, "seconds": 1.0, "data": 0.25}
                for i in range(last - first + 1)]  # fmt: skip

    events = [
        {"event": "begin", "at": 100.0}, {"event": "ready", "at": 104.0, "step": 0}, *steps(1, 5, 105.0),
        {"event": "saved", "at": 109.5, "step": 5, "seconds": 0.5}, *steps(6, 8, 110.5),  # killed at 112.5
        {"event": "begin", "at": 200.0}, {"event": "ready", "at": 202.0, "step": 5}, *steps(6, 6, 203.0),
        {"event": "rewind", "at": 203.5, "step": 5}, *steps(6, 7, 204.5), {"event": "end", "at": 206.0},
    ]  # fmt: skip
    found = goodput(events)
    assert found["wall"] == pytest.approx(12.5 + 6.0) == sum(found[kind] for kind in KINDS)
    assert (found["restart"], found["lost"], found["checkpoint"]) == (6.0, 4.0, 0.5)
    assert (found["productive"], found["data wait"]) == (7 * 0.75, 7 * 0.25)
    assert goodput([])["wall"] == 0


def test_the_time_of_a_run_that_was_killed_and_resumed(tmp_path: Path) -> None:
    recipe = toy.write_recipe(tmp_path)
    out, last = tmp_path / "run", 0
    words = ["--checkpoint.every", "20", "--checkpoint.keep", "0", "--train.steps", "100000"]
    command = [sys.executable, "-m", "arriero", "pretrain", str(recipe), *words]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as child:
        while not committed(out / "checkpoints") or not 5 < last % 20 < 15:  # in the middle between two checkpoints
            assert child.poll() is None
            time.sleep(0.005)
            last = max([event.get("step", 0) for event in read_events(out)], default=0)
        child.send_signal(signal.SIGKILL)
    arriero("pretrain", "--resume", out, "--train.steps", last + 10)
    found = goodput(read_events(out))
    assert sum(found[kind] for kind in KINDS) == pytest.approx(found["wall"])
    assert all(found[kind] > 0 for kind in ("productive", "checkpoint", "restart", "lost"))
    printed = arriero("inspect", out)
    shares = [float(word[:-1]) for word in printed.partition("time ")[2].partition(" of ")[0].split() if "%" in word]
    assert len(shares) == len(KINDS)
    assert sum(shares) == pytest.approx(100, abs=0.3)
