"""`--verify-layout` says yes to a layout that is the same run, and no to one that is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import toy
from arriero.checkpoint.load import CheckpointReader
from arriero.train import verify_layout as verify
from programs import arriero

pytestmark = pytest.mark.slow


def test_a_bundled_recipe_s_own_layout(tmp_path: Path) -> None:
    """The 33B recipe's tensor 4 x pipeline 4 on 16 processes is run by hand; here its shape on 4 is."""
    words = ["--parallel.tensor-parallel", "2", "--parallel.pipeline-parallel", "2", "--nproc-per-node", "4"]
    config = toy.write_config(tmp_path, num_hidden_layers=4)
    recipe = ["tinyllama-1.1b", "--model", config, "--parallel.sequence-parallel", "True"]
    printed = arriero("pretrain", *recipe, *words, "--verify-layout", cwd=tmp_path)
    assert "pipeline 2 x tensor 2" in printed
    assert printed.count(" ok") == 5
    assert "the same run" in printed
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]  # nothing is left behind


def test_it_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs that differ in one gradient norm by one part in 1e9 are not the same run."""
    from arriero.train.recipe import Recipe

    def run(name: str, norm: float) -> verify.LayoutRun:
        made = verify.LayoutRun(Recipe(out=str(tmp_path / name)), tmp_path / f"{name}.json")
        made.results.write_text(json.dumps({"loss": [1.0], "gradient norm": [norm]}))
        return made

    class Same(CheckpointReader):
        def names(self) -> list[str]:
            return []

    monkeypatch.setattr(verify, "CheckpointReader", Same)
    monkeypatch.setattr(verify, "find_checkpoint", lambda path: tmp_path)
    found = verify.differences(run("a", 1.0), run("b", 1.0 + 1e-9))
    assert found["loss"] <= verify.MAX_RELATIVE_DIFFERENCE < found["gradient norm"]


def test_an_impossible_layout_is_refused_first(tmp_path: Path) -> None:
    printed = arriero("pretrain", "llama-33b-zero-32p", "--verify-layout", "--nproc-per-node", "12", code=2)
    assert "do not divide" in printed
