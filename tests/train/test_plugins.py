"""The examples of optimizer, schedule and model family, each run from outside the package, as a user's own file is."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

import toy
from arriero.checkpoint.load import CheckpointReader
from arriero.common.errors import UserError
from arriero.common.registry import Registry
from arriero.common.settings import parse
from arriero.common.toml import file_settings
from arriero.distributed.parallel.mesh import Ranks
from arriero.model.config import FAMILIES, LlamaConfig
from arriero.train.build import build_trainer
from arriero.train.recipe import Recipe

EXAMPLES = Path(__file__).parents[2] / "examples" / "extending"


def pretrain(*words: object, plugins: str, path: Path = EXAMPLES, code: int = 0) -> str:
    """Runs `arriero pretrain` with `path` on PYTHONPATH."""
    paths = os.pathsep.join([str(path), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "ARRIERO_PLUGINS": plugins}
    command = [sys.executable, "-m", "arriero", "pretrain", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_an_optimizer_and_a_schedule_of_ones_own_in_every_layout(tmp_path: Path) -> None:
    recipe = toy.write_recipe(tmp_path)
    own = ["--optim.name", "lion", "--schedule.shape", "inverse-sqrt", "--train.dtype", "float64"]
    layout = ["--nproc-per-node", "2", "--parallel.tensor-parallel", "2"]
    one, two = tmp_path / "run", tmp_path / "two"
    pretrain(recipe, *own, plugins="optimizer,schedule")
    pretrain(recipe, *own, *layout, "--out", two, plugins="optimizer,schedule")
    for a, b in zip(metrics(one), metrics(two), strict=True):
        assert a["lm_loss"] == pytest.approx(b["lm_loss"], rel=1e-10)
    rates = [line["learning_rate"] for line in metrics(one)]
    assert rates == pytest.approx([5e-3, 1e-2, *(1e-2 * math.sqrt(2 / (step + 1)) for step in (2, 3, 4, 5))])
    reader = CheckpointReader(two / "checkpoints/step-00000006")
    assert reader.shape("momentum.model.norm.weight") == reader.shape("model.norm.weight")
    assert not [name for name in reader.names() if name.startswith("momentum")]
    assert "optim.name" in pretrain(recipe, "--optim.name", "lion", plugins="", code=2)


def test_lion_is_the_papers_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setenv("ARRIERO_PLUGINS", "optimizer")
    recipe: Recipe = parse(Recipe, file_settings(toy.write_recipe(tmp_path)), prog="test")
    recipe = replace(recipe, optim=replace(recipe.optim, name="lion"))
    __import__("optimizer")
    whole = build_trainer(recipe, Ranks(), local_rank=0, device_kind="cpu")
    whole.load(None)
    name = "model.layers.0.mlp.up_proj.weight"
    before, seen = whole.parts[0].get_parameter(name).detach().clone(), []
    update = type(whole.optimizer).update
    monkeypatch.setattr(type(whole.optimizer), "update", lambda self, u: (seen.append(u), update(self, u))[1])
    result = whole.step()
    moved = whole.parts[0].get_parameter(name).detach() - before * (
        1 - result.learning_rate * recipe.optim.weight_decay
    )
    assert torch.allclose(moved.abs(), torch.tensor(result.learning_rate), rtol=1e-3)
    assert [u.lr / result.learning_rate for u in seen] == [0.5, 1.0, 1.0]
    assert [u.weight_decay for u in seen] == pytest.approx([0.1, 0.1, 0.0])
    checkpoint = whole.save()
    later = build_trainer(recipe, Ranks(), local_rank=0, device_kind="cpu")
    later.load(checkpoint)
    assert [whole.step().lm_loss for _ in range(3)] == [later.step().lm_loss for _ in range(3)]
    whole.close()
    later.close()


def test_an_installed_package_names_its_plugin_as_an_entry_point(tmp_path: Path) -> None:
    recipe = toy.write_recipe(tmp_path)
    package = tmp_path / "site"
    package.mkdir()
    (package / "own_schedule.py").write_text((EXAMPLES / "schedule.py").read_text())
    information = package / "own_schedule-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: own-schedule\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("[arriero.plugins]\nown = own_schedule\n")
    pretrain(recipe, "--schedule.shape", "inverse-sqrt", "--train.steps", 1, plugins="", path=package)
    printed = pretrain(recipe, "--optim.name", "absent", "--out", tmp_path / "no", plugins="absent_module", code=2)
    assert "the plugin absent_module cannot be imported" in printed


def test_a_name_is_registered_once() -> None:
    registry: Registry[int] = Registry("table.key", {"first": "math:pi"})
    registry.register("second", 2)
    registry.register("second", 2)
    with pytest.raises(ValueError, match=r"table\.key second"):
        registry.register("second", 3)
    assert registry.get("first") == math.pi
    with pytest.raises(UserError, match="did you mean 'second'"):
        registry.get("secnod")


def test_a_model_family_of_ones_own_is_transformers_and_trains_in_other_layouts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.syspath_prepend(EXAMPLES)
    __import__("model_family")
    multipliers = {
        "embedding_multiplier": 3.0, "residual_multiplier": 0.4, "logits_scaling": 2.0, "attention_multiplier": 0.2
    }  # fmt: skip
    recipe = toy.write_recipe(tmp_path)
    file = tmp_path / "model" / "config.json"
    raw = json.loads(file.read_text()) | {"model_type": "granite", "architectures": ["GraniteForCausalLM"]}
    file.write_text(json.dumps(raw | multipliers))
    config = LlamaConfig.from_json(file)
    assert LlamaConfig.from_dict(config.to_json()) == config
    ours = FAMILIES.get("granite").module(config).double()
    theirs = transformers.GraniteForCausalLM(transformers.GraniteConfig(**config.to_json())).double()
    theirs.load_state_dict(ours.state_dict(), strict=False)
    tokens = torch.arange(60).reshape(2, 30)
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=1e-5, atol=1e-7)
    double = ["--train.dtype", "float64"]
    layout = ["--nproc-per-node", "2", "--parallel.pipeline-parallel", "2", "--out", tmp_path / "two"]
    pretrain(recipe, *double, "--train.steps", 3, plugins="model_family")
    pretrain(recipe, *double, "--train.steps", 3, *layout, plugins="model_family")
    for a, b in zip(metrics(tmp_path / "run"), metrics(tmp_path / "two"), strict=True):
        assert a["lm_loss"] == pytest.approx(b["lm_loss"], rel=1e-10)
    assert "model_type is 'granite'" in pretrain(recipe, "--out", tmp_path / "no", plugins="", code=2)
