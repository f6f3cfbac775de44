"""Going on with a run: what may change, what a damaged checkpoint costs, what signals do."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from arriero.checkpoint.digest import state_sha256
from arriero.checkpoint.find import committed
from arriero.cli.main import dispatch
from arriero.common.errors import EXIT_OK, EXIT_STOPPED, EXIT_USAGE, UserError
from arriero.data.indexed import IndexedWriter
from arriero.train.run import duration
from programs import arriero
from toy import write_recipe

pytestmark = pytest.mark.slow


@pytest.fixture
def copy(begun: Path, tmp_path: Path) -> Path:
    shutil.copytree(begun, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--seed", "5"], ["seed is 5, and the run began with 1234", "--allow-change seed"]),
        (["--train.global-batch", "16"], ["train.global_batch is 16, and the run began with 8"]),
        (["--schedule.lr", "0.5", "--allow-change", "seed"], ["schedule.lr is 0.5", "--allow-change seed: it has not"]),
        (["--allow-change", "schedule.lr"], ["nothing that needs it has changed"]),
        (["--resume", "nowhere"], ["nowhere: no such directory"]),
        (["--stop-after", "soon"], ["--stop-after is 'soon'", "such as 55m"]),
    ],
)
def test_what_would_make_it_another_run_is_refused(
    copy: Path, words: list[str], said: list[str], capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    before = state_sha256(committed(copy / "checkpoints")[-1])
    assert dispatch(["pretrain", "--resume", str(copy), *words]) == EXIT_USAGE
    printed = capsys.readouterr().err
    assert all(part in printed for part in said), printed
    assert state_sha256(committed(copy / "checkpoints")[-1]) == before


def test_other_data_under_the_same_name_is_refused(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = (copy / "recipe.toml").read_text()
    prefix = Path(re.findall(r'prefix = "(.*)"', recipe)[0])
    other = copy.parent / prefix.name
    writer = IndexedWriter(other, np.dtype(np.uint16))
    writer.add(np.arange(20_000, dtype=np.uint16) % 259)
    writer.end_document()
    writer.close()
    assert dispatch(["pretrain", "--resume", str(copy), "--data.prefix", str(other)]) == EXIT_USAGE
    assert "data is " in capsys.readouterr().err


def test_allow_change_without_resume_has_no_effect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path)
    assert dispatch(["pretrain", str(recipe), "--allow-change", "seed"]) == EXIT_USAGE
    assert "without --resume has no effect" in capsys.readouterr().err


def test_longer_and_allowed_changes_are_shown_and_a_damaged_checkpoint_is_passed_over(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    newest = committed(copy / "checkpoints")[-1]
    with open(newest / "rank-00000.safetensors", "r+b") as file:
        file.seek(-5, os.SEEK_END)
        file.write(b"?")
    words = ["pretrain", "--resume", str(copy), "--train.steps", "8", "--checkpoint.every", "0"]
    words += ["--train.grad-clip", "0.5", "--allow-change", "train.grad_clip"]
    assert dispatch(words) == EXIT_OK
    printed = capsys.readouterr().out
    assert "changed since the checkpoint: train.steps: 6 -> 8" in printed
    assert "changed since the checkpoint: train.grad_clip: 1.0 -> 0.5" in printed
    assert f"DAMAGED: {newest}/rank-00000.safetensors: tensor " in printed
    assert "step-00000004 after step 4" in printed
    assert committed(copy / "checkpoints")[-1].name == "step-00000008"


def test_auto_begins_and_then_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["pretrain", str(write_recipe(tmp_path)), "--resume", "auto", "--checkpoint.every", "2"]
    assert dispatch(words) == EXIT_OK
    assert "resumed" not in capsys.readouterr().out
    assert dispatch([*words, "--train.steps", "7"]) == EXIT_OK
    assert "step-00000006 after step 6" in capsys.readouterr().out


def test_duration() -> None:
    assert [duration(text) for text in ("", "90s", "55m", "1.5h", "1d")] == [0, 90, 3300, 5400, 86400]
    for text in ("5", "m", "-1s", "0s"):
        with pytest.raises(UserError):
            duration(text)


def test_a_signal_saves_and_stops_and_the_run_ends_as_if_nothing_had_been(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    words = [sys.executable, "-m", "arriero", "pretrain", str(recipe), "--train.steps", "12", "--nproc-per-node", "2"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if "iteration        2/" in line:
            process.send_signal(signal.SIGTERM)
            time.sleep(0.02)
            process.send_signal(signal.SIGTERM)  # a second one harms nothing
    assert process.wait() == EXIT_STOPPED, said
    assert "go on with: arriero pretrain --resume" in said
    stopped = committed(tmp_path / "run/checkpoints")[-1]
    assert json.loads((stopped / "state.json").read_text())["step"] < 12
    arriero("pretrain", "--resume", tmp_path / "run", "--nproc-per-node", 2)
    arriero(*words[3:], "--out", tmp_path / "quiet")
    ends = [committed(tmp_path / name / "checkpoints")[-1] for name in ("run", "quiet")]
    assert state_sha256(ends[0]) == state_sha256(ends[1])


def test_stop_after(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path)
    assert dispatch(["pretrain", str(recipe), "--train.steps", "100000", "--stop-after", "1s"]) == EXIT_STOPPED
    assert "stopped after step" in capsys.readouterr().out
    assert len(committed(tmp_path / "run/checkpoints")) == 1
