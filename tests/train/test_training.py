"""The loop against a plain transformers loop, precision, and resuming to the bit."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import toy
from arriero.checkpoint.digest import state_sha256
from arriero.common.errors import UserError
from arriero.common.settings import parse
from arriero.common.toml import file_settings
from arriero.distributed.parallel.mesh import Ranks
from arriero.train.build import build_trainer
from arriero.train.loop import ResumePlan, train
from arriero.train.precision import LossScale
from arriero.train.recipe import Recipe
from arriero.train.schedule import learning_rate
from arriero.train.trainer import Trainer


def recipe_in(directory: Path, **train_changes: Any) -> Recipe:
    recipe = parse(Recipe, file_settings(toy.write_recipe(directory)), prog="test")
    return replace(recipe, train=replace(recipe.train, **train_changes))


def trainer_of(recipe: Recipe, checkpoint: Path | None = None) -> Trainer:
    trainer = build_trainer(recipe, Ranks(), local_rank=0, device_kind="cpu")
    trainer.load(checkpoint)
    return trainer


def test_five_steps_equal_a_plain_transformers_loop(tmp_path: Path) -> None:
    """Same weights, same batches, AdamW with decay groups, clipping, accumulation: transformers and torch alone."""
    recipe = recipe_in(tmp_path, grad_clip=0.5)
    recipe = replace(recipe, optim=replace(recipe.optim, weight_decay=0.3))
    ours = trainer_of(recipe)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**ours.config.to_json()))
    theirs.load_state_dict({k: v.clone() for k, v in ours.parts[0].state_dict().items()}, strict=False)
    matrices = [p for p in theirs.parameters() if p.dim() > 1]
    vectors = [p for p in theirs.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.3}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=1.0, betas=recipe.optim.betas, eps=recipe.optim.eps)
    for step in range(5):
        batch = ours.loader.batches.batch(step, 0, recipe.train.global_batch)
        tokens, labels = torch.from_numpy(batch.tokens), torch.from_numpy(batch.labels)
        logits = theirs(tokens).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        for group in adamw.param_groups:
            group["lr"] = learning_rate(recipe.schedule, step, recipe.train.steps)
        adamw.step()
        adamw.zero_grad()
        result = ours.step()
        assert result.lm_loss == pytest.approx(loss.item(), rel=1e-5)
        assert result.grad_norm == pytest.approx(norm.item(), rel=1e-5)
        assert norm > 0.5  # clipping is at work
    for name, parameter in theirs.named_parameters():
        assert torch.allclose(parameter, ours.parts[0].get_parameter(name), rtol=1e-3, atol=1e-4), name


def test_masked_labels_and_micro_batches_do_not_change_the_mean(tmp_path: Path) -> None:
    """The loss is divided by all valid tokens at once: unevenly masked micro-batches give the same as one batch."""
    whole = trainer_of(recipe_in(tmp_path / "a", dtype="float64", micro_batch=8))
    cut = trainer_of(recipe_in(tmp_path / "b", dtype="float64", micro_batch=2))
    gradients = []
    for trainer in (whole, cut):
        micro = trainer.loader.micro_batches(trainer.loader.batches, 0)
        row = 0
        for i, m in enumerate(micro):
            labels = m.labels.clone()
            for one in labels:
                one[: 3 * row] = -100  # each row loses more: micro-batches have unequal counts
                row += 1
            micro[i] = m._replace(labels=labels, valid=int((labels != -100).sum()))
        loss = trainer.forward_backward(micro, train=True)
        gradients.append((loss.item(), [p.grad.clone() for p in trainer.parts[0].parameters()]))
    assert gradients[0][0] == pytest.approx(gradients[1][0], rel=1e-12)
    for a, b in zip(gradients[0][1], gradients[1][1], strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_interrupted_equals_uninterrupted_to_the_bit(tmp_path: Path, dtype: str) -> None:
    recipe = recipe_in(tmp_path, dtype=dtype, steps=4)
    full = trainer_of(replace(recipe, out=str(tmp_path / "full")))
    for _ in range(4):
        full.step()
    part = trainer_of(replace(recipe, out=str(tmp_path / "part")))
    for _ in range(2):
        part.step()
    resumed = trainer_of(recipe, part.save())
    while resumed.done < 4:
        resumed.step()
    assert state_sha256(full.save()) == state_sha256(resumed.save())


def test_dtypes_at_rest_and_in_flight(tmp_path: Path) -> None:
    trainer = trainer_of(recipe_in(tmp_path, dtype="bfloat16"))
    seen = []
    trainer.parts[0].model.norm.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    trainer.step()
    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in trainer.parts[0].parameters()} == {torch.float32}


def test_offloaded_optimizer_changes_nothing(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path, dtype="bfloat16")
    away = replace(recipe, optim=replace(recipe.optim, offload=True))
    here, there = trainer_of(recipe), trainer_of(away)
    for _ in range(3):
        assert here.step().lm_loss == there.step().lm_loss
    ours = {p.data_ptr() for p in there.parts[0].parameters()}
    assert not ours & {p.data_ptr() for p in there.optimizer.masters.values()}  # it really works on copies
    for a, b in zip(here.parts[0].parameters(), there.parts[0].parameters(), strict=True):
        assert torch.equal(a, b)


def test_loss_scale_grows_and_halves() -> None:
    scale = LossScale(8.0, window=3, hysteresis=2)
    for _ in range(3):
        scale.update(finite=True)
    assert scale.scale == 16.0
    scale.update(finite=False)
    assert scale.scale == 16.0  # hysteresis
    scale.update(finite=False)
    assert scale.scale == 8.0
    for _ in range(10):
        scale.update(finite=False)
    assert scale.scale == 1.0


@pytest.mark.parametrize("policy", ["skip", "stop"])
def test_a_nonfinite_step_is_printed_counted_and_harms_nothing(
    tmp_path: Path, policy: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_in(tmp_path, steps=3, on_nonfinite=policy)
    original = Trainer.forward_backward
    weights: list[torch.Tensor] = []

    def poisoned(self: Trainer, micro: Any, *, train: bool) -> torch.Tensor:
        weight = self.parts[0].get_parameter("model.norm.weight")
        weights.append(weight.detach().clone())
        loss = original(self, micro, train=train)
        if self.done == 1:
            self.parts[0].get_parameter("model.norm.weight").grad[0] = math.nan
        return loss

    monkeypatch.setattr(Trainer, "forward_backward", poisoned)
    arguments = {"local_rank": 0, "device_kind": "cpu", "plan": ResumePlan()}
    if policy == "stop":
        with pytest.raises(UserError, match="step 2"):
            train(recipe, Ranks(), **arguments)
        return
    train(recipe, Ranks(), **arguments)
    assert torch.equal(weights[1], weights[2])  # the poisoned step changed nothing
    assert not torch.equal(weights[0], weights[1])
    lines = [json.loads(line) for line in (Path(recipe.out) / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    assert [s["skipped_iterations"] for s in steps] == [0, 1, 0]
    assert steps[1]["grad_norm"] == "NaN"
    assert "grad norm: nan" in capsys.readouterr().out
