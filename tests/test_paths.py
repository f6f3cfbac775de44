"""Paths that no file can have, or that are not what a verb needs: one sentence and exit code 2, in every verb."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from small_models import TINY, random_weights, save_hf

import toy
from arriero.cli.main import dispatch

INPUTS = {
    "pretrain": "pretrain {}", "pretrain model": "pretrain TOY --model {} --out new",
    "pretrain init": "pretrain TOY --model= --init {} --out new",
    "pretrain data": "pretrain TOY --data.prefix {} --out new",
    "pretrain tokenizer": "pretrain TOY --tokenizer {} --out new", "pretrain resume": "pretrain --resume {}",
    "inspect": "inspect {}", "compare": "compare {} {}", "export": "export {} new",
    "export tokenizer": "export hf new --tokenizer {}", "convert": "convert {} new --to hf",
    "convert config": "convert hf new --to hf --config {}",
    "convert tokenizer": "convert hf new --to hf --tokenizer {}",
    "generate": "generate {} --prompt x", "generate tokenizer": "generate hf --prompt x --tokenizer {}",
    "bench": "bench {}", "launch": "launch slurm {}", "launch kind": "launch {}", "torture": "torture {} --kills 1",
    "verb": "{}",
}  # fmt: skip
OUTPUTS = {
    "pretrain out": "pretrain TOY --out {}", "compare out": "compare log log --out {}", "export": "export hf {}",
    "convert": "convert hf {} --to hf", "convert megatron": "convert hf {} --to megatron",
    "launch out": "launch slurm TOY --gpus-per-node 1 --out {}", "demo": "demo --out {}", "torture": "torture --out {}",
    "bench write": "bench TOY --sweep --write {}",
}  # fmt: skip
UNNAMEABLE = ["x" * 5000, "a/" + "x" * 300 + "/b", "a\0b"]
NO_INPUT = [
    *UNNAMEABLE,
    "file/inside",
    "loop",
    "loop/x",
    "pipe",
    "/dev/null",
    "\x1b[31mred",
    "a\nb",
    "\udcff\udc80",
    "empty",
]
NO_OUTPUT = [*UNNAMEABLE, "file/inside", "loop/x", "/proc/x/y", "dangling/x"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the commands need, and paths of every bad kind."""
    root = tmp_path_factory.mktemp("paths")
    save_hf(root / "hf", TINY, random_weights(TINY))
    toy.write_recipe(root)
    (root / "log").write_text("iteration,loss\n1,2.0\n2,1.5\n")
    (root / "file").write_text("x")
    (root / "empty").mkdir()
    (root / "loop").symlink_to("loop")
    (root / "dangling").symlink_to("gone")
    os.mkfifo(root / "pipe")
    return root


@pytest.mark.parametrize("words", [*INPUTS.values(), *OUTPUTS.values()])
def test_bad_paths(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: str) -> None:
    monkeypatch.chdir(home)
    before = sorted(os.listdir(home))
    for bad in NO_INPUT if words in INPUTS.values() else NO_OUTPUT:
        code = dispatch([word.replace("{}", bad).replace("TOY", "toy.toml") for word in words.split(" ")])
        printed = "".join(capsys.readouterr())
        assert code == 2, (bad, printed)
        assert "fix: " in printed
        assert "Traceback" not in printed
        assert not set(printed) & {"\x1b", "\0", "\udcff"}
        assert len(printed) < 3000
    assert sorted(os.listdir(home)) == before


def test_a_name_with_control_characters_is_written_and_shown_escaped(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(home)
    target = tmp_path / "\x1b[31mred\nline"
    for command in (["convert", "hf", str(target), "--to", "hf"], ["inspect", str(target)]):
        assert dispatch(command) == 0
        printed = "".join(capsys.readouterr())
        assert "\\x1b[31mred\\nline" in printed
        assert "\x1b" not in printed
