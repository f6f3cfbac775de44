"""Matmuls in 8-bit floats, emulated on the CPU: against arithmetic of our own, against bfloat16, against itself."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import case, launch, settings
from run_layouts import run_case
from test_layouts import shared_memory

import toy
from arriero.checkpoint.digest import state_sha256
from arriero.cli.main import dispatch
from arriero.common import device
from arriero.common.device import has_float8_units
from arriero.common.errors import EXIT_OK, EXIT_USAGE, UserError
from arriero.common.settings import parse
from arriero.common.toml import file_settings
from arriero.distributed.parallel import apply, float8
from arriero.distributed.parallel.config import ParallelConfig, RecomputeConfig
from arriero.distributed.parallel.mesh import Ranks
from arriero.model.llama import Llama
from arriero.train.build import build_trainer
from arriero.train.preflight import preflight
from arriero.train.recipe import Recipe
from arriero.train.trainer import Trainer

pytestmark = pytest.mark.slow

# Sizes that float8 takes, also in halves; the toy's own heads are too narrow.
SHAPE: dict[str, Any] = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 128}
CONFIG = replace(toy.CONFIG, **SHAPE)
MATRICES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
            "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip
RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp")


def recipe_in(directory: Path, **train: Any) -> Recipe:
    path = toy.write_recipe(directory)
    toy.write_config(directory / "model", **SHAPE)
    recipe = parse(Recipe, file_settings(path), prog="test")
    return replace(recipe, train=replace(recipe.train, **{"dtype": "bfloat16", **train}))


def trainer_of(recipe: Recipe, checkpoint: Path | None = None) -> Trainer:
    trainer = build_trainer(recipe, Ranks(), local_rank=0, device_kind="cpu")
    trainer.load(checkpoint)
    return trainer


def kinds(model: torch.nn.Module) -> dict[str, str]:
    return {path: type(module).__name__ for path, module in model.named_modules()}


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_layers_matrices_are_converted_and_nothing_is_renamed(recipe: Any) -> None:
    with torch.device("meta"):
        plain, model = Llama(CONFIG), Llama(CONFIG)
    held = dict(model.named_parameters())
    float8.apply_float8(model, recipe, emulate=True)
    wanted = {f"model.layers.{i}.{path}" for i in range(2) for path in MATRICES}
    assert {path for path, kind in kinds(model).items() if kind == "Float8Linear"} == wanted
    assert list(model.state_dict()) == list(plain.state_dict())
    assert all(parameter is held[name] for name, parameter in model.named_parameters())
    float8.apply_float8(plain, "none", emulate=True)
    assert "Float8Linear" not in kinds(plain).values()


def rounded(x: np.ndarray, mantissa: int, lowest: int, largest: float) -> np.ndarray:
    """To the nearest float of so many mantissa bits and lowest exponent, ties to even, no value above the largest."""
    exponent = np.maximum(np.floor(np.log2(np.maximum(np.abs(x), 1e-300))), lowest)
    step = 2.0 ** (exponent - mantissa)
    return np.clip(np.round(x / step) * step, -largest, largest)


FORMATS = {"e4m3": (3, -6, 448.0), "e5m2": (2, -14, 57344.0)}


def seen(x: torch.Tensor, form: str, axis: int | None, *, power: bool) -> np.ndarray:
    """What a float8 matmul sees of x: scaled to the format's largest value over `axis`, cast, scaled back."""
    values = x.detach().numpy()
    scale = FORMATS[form][2] / np.abs(values).max(axis=axis, keepdims=axis is not None).astype(np.float64)
    scale = (2.0 ** np.floor(np.log2(scale)) if power else scale).astype(np.float32)
    return rounded((values * scale).astype(np.float64), *FORMATS[form]) / scale


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_layer_computes_what_quantised_operands_give_in_float64(recipe: Any) -> None:
    torch.manual_seed(0)
    model = Llama(replace(CONFIG, mlp_bias=True))
    float8.apply_float8(model, recipe, emulate=True)
    layer = model.model.layers["0"].mlp.gate_proj
    layer.bias.data.normal_()
    x = (torch.randn(32, 64) * torch.logspace(-3, 3, 32)[:, None]).requires_grad_()
    gradient = torch.randn(32, 128) * torch.logspace(3, -3, 32)[:, None]
    out = layer(x[None])
    out.backward(gradient[None])
    w, rows = layer.weight, recipe != "tensorwise"
    low = "e4m3" if rows else "e5m2"

    def cast(t: torch.Tensor, form: str, axis: int) -> np.ndarray:
        return seen(t, form, axis if rows else None, power=rows)

    forward = cast(x, "e4m3", 1) @ cast(w, "e4m3", 1).T + layer.bias.detach().numpy()
    # The input gradient sums over the weight's rows, which are scaled anew, or as a whole where the recipe says so.
    whole = seen(w, "e4m3", None, power=True) if recipe == "rowwise_with_gw_hp" else cast(w, "e4m3", 0)
    to_input = cast(gradient, low, 1) @ whole
    to_weight = cast(gradient, low, 0).T @ cast(x, "e4m3", 0)
    if recipe == "rowwise_with_gw_hp":
        to_weight = gradient.double().numpy().T @ x.detach().double().numpy()
    exact = x.detach().double().numpy() @ w.detach().double().numpy().T + layer.bias.detach().double().numpy()
    for got, wanted in ((out[0], forward), (x.grad, to_input), (w.grad, to_weight)):
        error = np.linalg.norm(got.detach().double().numpy() - wanted) / np.linalg.norm(wanted)
        assert error < 1e-6
    assert np.linalg.norm(forward - exact) / np.linalg.norm(exact) > 1e-3  # the cast is not lost in the noise


def smoothed(losses: list[float], width: int = 10) -> np.ndarray:
    return np.convolve(losses, np.ones(width) / width, mode="valid")


def test_sixty_steps_have_bfloat16s_loss(tmp_path: Path) -> None:
    """Measured: the smoothed losses differ by 0.08% (tensorwise) and 0.07% (rowwise) at most."""
    losses = {}
    for kind in ("none", "tensorwise", "rowwise"):
        recipe = recipe_in(tmp_path / kind, float8=kind, steps=60, micro_batch=8)
        # The toy's own rate of 1e-2 is a chaotic one: bfloat16 and float32 part by 0.7% there, and float8 by 3%.
        trainer = trainer_of(replace(recipe, schedule=replace(recipe.schedule, lr=3e-3, min_lr=3e-4)))
        losses[kind] = [trainer.step().lm_loss for _ in range(60)]
        assert {p.dtype for p in trainer.parts[0].parameters()} == {torch.float32}
        trainer.close()
    wide = smoothed(losses["none"])
    assert wide[-1] < 0.6 * wide[0]
    for kind in ("tensorwise", "rowwise"):
        worst = np.abs(smoothed(losses[kind]) / wide - 1).max()
        assert 1e-4 < worst < 0.005
    assert losses["tensorwise"] != losses["rowwise"]


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_recomputed_layers_give_the_same_gradient(tmp_path: Path, mode: Any) -> None:
    kept = trainer_of(recipe_in(tmp_path / "kept", float8="tensorwise", micro_batch=8))
    again = recipe_in(tmp_path / "again", float8="tensorwise", micro_batch=8)
    again_trainer = trainer_of(replace(again, recompute=RecomputeConfig(mode)))
    for trainer in (kept, again_trainer):
        trainer.forward_backward(trainer.loader.micro_batches(trainer.loader.batches, 0), train=True)
    for one, other in zip(kept.parts[0].parameters(), again_trainer.parts[0].parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)  # type: ignore[arg-type]


def test_interrupted_equals_uninterrupted_to_the_bit(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path, float8="tensorwise", steps=4, micro_batch=8)
    full = trainer_of(replace(recipe, out=str(tmp_path / "full")))
    for _ in range(4):
        full.step()
    part = trainer_of(replace(recipe, out=str(tmp_path / "part")))
    for _ in range(2):
        part.step()
    resumed = trainer_of(recipe, part.save())
    while resumed.done < 4:
        resumed.step()
    wide = trainer_of(replace(recipe, train=replace(recipe.train, float8="none")))
    assert list(wide.tensors_to_save()) == list(full.tensors_to_save())  # a checkpoint does not tell them apart
    assert state_sha256(full.save()) == state_sha256(resumed.save())


# name -> (settings, dtype in flight, limits of loss and gradient norm). Layouts add in other orders, which in bfloat16
# is noise as large as float8's own: float32 in flight leaves float8 alone to differ.
LAYOUTS: dict[str, tuple[dict[str, Any], str, float, float]] = {
    "zero-2": (settings(zero_stage=2), "float32", 3e-4, 5e-3),
    "zero-3": (settings(zero_stage=3), "float32", 3e-4, 5e-3),
    "tensor": (settings(tensor_parallel=2, sequence_parallel=True), "float32", 2e-3, 2e-2),
}


@pytest.fixture(scope="module")
def runs() -> Iterator[dict[str, dict[str, Any]]]:
    """One process with and without float8, and two."""
    root = Path(tempfile.mkdtemp(prefix="arriero-float8-", dir=shared_memory()))
    try:
        toy.write_data(root / "data")
        toy.write_config(root / "plain", **SHAPE)
        alone = [
            run_case(case(root, f"{kind}, {dtype}", dtype=dtype, train__float8=kind))
            for kind in ("none", "tensorwise")
            for dtype in ("bfloat16", "float32")
        ]
        pairs = [
            case(root, name, dtype=dtype, train__float8="tensorwise", **layout)
            for name, (layout, dtype, *_) in LAYOUTS.items()
        ]
        yield {r["name"]: r for r in alone if r} | launch(root, 2, pairs)
    finally:
        shutil.rmtree(root)


def apart(one: dict[str, Any], other: dict[str, Any], key: str) -> float:
    return max(abs(b / a - 1) for a, b in zip(one[key], other[key], strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_processes_give_the_numbers_of_one(runs: dict[str, dict[str, Any]], layout: str) -> None:
    """Measured, loss and gradient norm: 2e-5 and 1e-3 under ZeRO, 1e-3 and 5e-3 under tensor parallelism."""
    _, dtype, loss, norm = LAYOUTS[layout]
    one, two = runs[f"tensorwise, {dtype}"], runs[layout]
    assert apart(one, two, "loss") < loss
    assert apart(one, two, "grad_norm") < norm
    assert apart(runs[f"none, {dtype}"], one, "loss") > 2 * apart(one, two, "loss")  # float8 itself weighs more


def said(recipe: Recipe) -> str:
    return "\n".join(str(p) for p in recipe.problems(recipe.parallel.model_parallel))


def test_what_does_not_work_is_refused_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = recipe_in(tmp_path, float8="tensorwise")
    assert said(good) == ""
    for dtype in ("float32", "float16", "float64"):
        wide = replace(good, train=replace(good.train, dtype=dtype))
        assert f"does not go with train.dtype {dtype}" in said(wide)
    short = replace(good, train=replace(good.train, sequence_length=20, micro_batch=2))
    assert "train.micro_batch x train.sequence_length 40 is not a multiple of 16" in said(short)
    weights_wide = replace(short, train=replace(short.train, float8="rowwise_with_gw_hp"))
    assert said(weights_wide) == ""  # sums over tokens in bfloat16
    cut = replace(good, parallel=ParallelConfig(tensor_parallel=2))
    assert said(cut) == ""
    toy.write_config(tmp_path / "model", **{**SHAPE, "num_key_value_heads": 1, "intermediate_size": 136})
    assert "intermediate_size 136 is not a multiple of 16" in said(good)
    toy.write_config(tmp_path / "model", **{**SHAPE, "intermediate_size": 112})
    assert "intermediate_size 112 over 2 ranks is not a multiple of 16 each" in said(cut)
    toy.write_config(tmp_path / "model")  # four heads of 8, two of them for keys and values
    assert "num_key_value_heads x head_dim 16 over 2 ranks" in said(cut)
    toy.write_config(tmp_path / "model", **SHAPE)
    with pytest.raises(UserError, match=r"train\.float8 does not work on npu"):
        preflight(good, 1, [], kind="npu")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torchao" else find(name))
    assert "pip install torchao" in said(good)


@pytest.mark.parametrize(("capability", "units"), [((8, 0), False), ((8, 9), True), ((9, 0), True)])
def test_the_device_decides_whether_it_is_emulated(
    capability: tuple[int, int], units: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert has_float8_units("cuda") is units
    assert not device.has_float8_units("cpu")
    monkeypatch.setattr(apply, "has_float8_units", lambda kind: has_float8_units("cuda"))
    part = apply.build_model_parts(
        CONFIG, ParallelConfig(), RecomputeConfig(), Ranks(), length=32, device=torch.device("cpu"),
        store=torch.float32, compute=torch.bfloat16, float8="rowwise",
    )[0]  # fmt: skip
    assert part.model.layers["1"].mlp.up_proj.linear_mm_config.output.emulate is not units


def test_a_run_says_that_it_is_emulated_and_float8_makes_it_another_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(toy.write_recipe(tmp_path))
    toy.write_config(tmp_path / "model", **SHAPE)
    words = ["--train.dtype", "bfloat16", "--train.steps", "2"]
    assert dispatch(["pretrain", recipe, *words]) == EXIT_OK
    assert "emulated" not in capsys.readouterr().out
    words = ["pretrain", "--resume", str(tmp_path / "run"), "--train.steps", "3", "--train.float8", "tensorwise"]
    assert dispatch(words) == EXIT_USAGE
    assert "train.float8 is tensorwise, and the run began with none" in capsys.readouterr().err
    assert dispatch([*words, "--allow-change", "train.float8"]) == EXIT_OK
    printed = capsys.readouterr().out
    assert "float8 is emulated" in printed
    assert "changed since the checkpoint: train.float8: none -> tensorwise" in printed
