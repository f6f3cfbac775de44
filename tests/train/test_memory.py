"""The memory that a run needs at least: counted without allocating it, and compared with the machine's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import toy
from arriero.cli.main import dispatch
from arriero.distributed.parallel.config import ParallelConfig
from arriero.model.config import LlamaConfig, count_parameters, parameter_shapes
from arriero.train import memory
from arriero.train.config import TrainConfig
from arriero.train.recipe import Recipe


def recipe_of(model: str = "llama2-7b", **changes: int | str) -> Recipe:
    recipe = Recipe(model=model)
    parallel = {k: v for k, v in changes.items() if k in ParallelConfig.__dataclass_fields__}
    train = {k: v for k, v in changes.items() if k in TrainConfig.__dataclass_fields__}
    return replace(recipe, train=replace(recipe.train, **train), parallel=replace(recipe.parallel, **parallel))


def test_parameters_are_counted_as_their_shapes_say() -> None:
    for config in (toy.CONFIG, replace(toy.CONFIG, tie_word_embeddings=True, attention_bias=True, mlp_bias=True)):
        whole = 0
        for shape in parameter_shapes(config).values():
            size = 1
            for n in shape:
                size *= n
            whole += size
        assert count_parameters(config) == whole


@pytest.mark.parametrize(
    ("changes", "processes", "bytes_each"),
    [  # 6.7e9 parameters: 16 bytes each, as ZeRO's paper counts mixed precision's (arXiv:1910.02054, figure 1)
        ({"dtype": "float32"}, 1, 16.0),
        ({"dtype": "float32", "zero_stage": 1}, 64, 8 + 16 / 64),
        ({"dtype": "float32", "zero_stage": 2}, 64, 4 + 16 / 64),
        ({"dtype": "bfloat16"}, 1, 18.0),
        ({"dtype": "bfloat16", "zero_stage": 1}, 64, 6 + 16 / 64),
        ({"dtype": "bfloat16", "zero_stage": 2}, 64, 2 + 16 / 64),
        ({"zero_stage": 3}, 64, 16 / 64),
        ({"zero_stage": 3, "zero_group": 8}, 64, 16 / 8),
        ({"tensor_parallel": 8, "pipeline_parallel": 2, "zero_stage": 3}, 16, 18 / 16),
        ({"dtype": "float64"}, 1, 32.0),
    ],
)
def test_state(changes: dict[str, int | str], processes: int, bytes_each: float) -> None:
    recipe = recipe_of(**changes)
    share = memory.minimum_bytes(recipe, processes)["state"] / count_parameters(recipe.model_config())
    assert share == pytest.approx(bytes_each)


@pytest.mark.parametrize(
    ("available", "machine", "refused", "told"),
    [(1e12, 1e12, False, False), (50e9, 200e9, False, True), (1e9, 64e9, True, False), (0.0, 0.0, False, False)],
)
def test_far_too_little_is_refused_and_hardly_enough_is_told(
    monkeypatch: pytest.MonkeyPatch, available: float, machine: float, refused: bool, told: bool
) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: available)
    monkeypatch.setattr(memory, "machine_memory", lambda: machine)
    problems, lines = memory.memory_problems(recipe_of(global_batch=8), 1, 1)
    assert (bool(problems), bool(lines)) == (refused, told)
    if refused:
        assert "6,738,415,616 parameters" in problems[0].problem
        assert "this machine has 64.0 GB" in problems[0].problem
        assert "make the model smaller" in problems[0].fix


@pytest.mark.parametrize(
    ("shape", "words", "message"),
    [
        (
            {"hidden_size": 2**20, "num_attention_heads": 4096, "num_key_value_heads": 4096, "head_dim": 256},
            [],
            "the model",
        ),
        ({"vocab_size": 2**31 - 1}, [], "the model"),
        ({"num_hidden_layers": 1000, "hidden_size": 2**16, "intermediate_size": 2**18}, [], "the model"),
        ({}, ["--train.micro-batch", str(2**20), "--train.global-batch", str(2**20)], "train.micro_batch"),
        ({}, ["--train.global-batch", str(2**20), "--train.sequence-length", "20000"], "train.global_batch"),
        ({}, ["--train.steps", "1000000000", "--data.order", "megatron"], "train.steps"),
    ],
)
def test_what_no_machine_holds_is_refused_before_anything_is_allocated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], shape: dict[str, int], words: list[str], message: str
) -> None:
    recipe = toy.write_recipe(tmp_path)
    toy.write_config(tmp_path / "m", **shape)
    assert isinstance(LlamaConfig.from_json(tmp_path / "m"), LlamaConfig)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(memory, "machine_memory", lambda: 4e9)
        code = dispatch(["pretrain", str(recipe), "--model", str(tmp_path / "m"), *words])
    assert code == 2
    printed = capsys.readouterr().err
    assert "and this machine has 4.0 GB" in printed
    assert f"make {message} smaller" in printed
    assert not (tmp_path / "run").exists()
