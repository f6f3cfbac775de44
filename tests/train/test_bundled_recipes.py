"""Every recipe and shape that comes with arriero: it parses, fits its devices, and the docs say what the files say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from arriero.common.settings import Setting, parse
from arriero.common.toml import file_settings
from arriero.model.config import LlamaConfig, count_parameters
from arriero.train.recipe import Recipe, bundled_directory, find_bundled

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path for path in bundled_directory().glob("*.toml") if path.stem != "demo")
SEEDS = ("llama-7b-zero-8p", "llama-13b-ptd-8p", "llama-33b-zero-32p", "llama-65b-ptd-32p")
PARAMETERS = {  # the models' published sizes
    "llama-7b": 6_738_415_616, "llama-13b": 13_015_864_320, "llama-33b": 32_528_943_616, "llama-65b": 65_285_660_672,
    "llama2-7b": 6_738_415_616, "llama2-13b": 13_015_864_320, "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248, "llama3-70b": 70_553_706_496, "llama3.1-8b": 8_030_261_248,
    "tinyllama-1.1b": 1_100_048_384,
}  # fmt: skip


def read(path: Path, **changes: str) -> Recipe:
    settings = file_settings(path) + [Setting(key, value.split(), "change") for key, value in changes.items()]
    return parse(Recipe, settings, prog="arriero pretrain")


def devices(path: Path) -> int:
    """What the recipe's first line says."""
    said = re.match(r"# For (\d+) devices: ", path.read_text(encoding="utf-8"))
    assert said, f"{path.name}: the first line must be '# For N devices: ...'"
    return int(said[1])


def layout_problems(recipe: Recipe, processes: int) -> list[str]:
    """All problems but the one that a fresh checkout has: no data yet."""
    return [str(problem) for problem in recipe.problems(processes) if "data.prefix" not in str(problem)]


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_fits_its_devices(path: Path) -> None:
    recipe, count = read(path), devices(path)
    assert layout_problems(recipe, count) == []
    assert recipe.train.accumulation(count // recipe.parallel.model_parallel) >= 1
    assert recipe.train.sequence_length <= recipe.model_config().max_position_embeddings
    assert recipe.out == f"runs/{path.stem}"
    if path.stem.endswith("p"):
        assert path.stem.endswith(f"-{count}p"), "the name tells the number of devices"


@pytest.mark.parametrize("name", [*PARAMETERS, "llama-30b"])
def test_a_shape_has_its_models_size(name: str) -> None:
    path = find_bundled("models", name, ".json")
    config = LlamaConfig.from_json(path)
    assert count_parameters(config) == PARAMETERS["llama-33b" if name == "llama-30b" else name]
    assert config.head_dim * config.num_attention_heads == config.hidden_size


def test_every_shape_is_checked() -> None:
    assert {path.stem for path in (bundled_directory() / "models").glob("*.json")} == {
        "demo", "llama-30b", *PARAMETERS,
    }  # fmt: skip


# The four of AscendSpeed: what each script ran, in one line each.
SCRIPTS = {
    "llama-7b-zero-8p": "layers=32 tp=1 pp=1 dp=8 micro=8 global=64 steps=500000 decay=320000 lr=1.5e-05 min=1e-06 "
    "float16 scale=256 full sp=False zero=2",
    "llama-13b-ptd-8p": "layers=40 tp=1 pp=8 dp=1 micro=1 global=128 steps=1000 decay=640 lr=1e-06 min=1e-07 "
    "float16 scale=4096 first=3,2,1,0,0,0,0,0 sp=False zero=1",
    "llama-33b-zero-32p": "layers=60 tp=4 pp=4 dp=2 micro=2 global=512 steps=50000 decay=320000 lr=0.00015 min=1e-05 "
    "float16 scale=524288 full sp=True zero=1",
    "llama-65b-ptd-32p": "layers=80 tp=8 pp=4 dp=1 micro=2 global=512 steps=50000 decay=320000 lr=0.00015 min=1e-05 "
    "bfloat16 full sp=True zero=1",
}


@pytest.mark.parametrize("name", SEEDS)
def test_the_values_are_the_scripts(name: str) -> None:
    path = find_bundled("", name, ".toml")
    recipe, train, parallel = read(path), read(path).train, read(path).parallel
    data = devices(path) // parallel.model_parallel
    scale = f" scale={train.initial_loss_scale:.0f}" if train.dtype == "float16" else ""
    recompute = recipe.recompute.mode
    if recompute == "first":
        recompute = "first=" + ",".join(map(str, recipe.recompute.first_layers))
    assert SCRIPTS[name] == (
        f"layers={recipe.model_config().num_hidden_layers} tp={parallel.tensor_parallel} "
        f"pp={parallel.pipeline_parallel} dp={data} micro={train.micro_batch} global={train.global_batch} "
        f"steps={train.steps} decay={recipe.schedule.decay_steps} lr={recipe.schedule.lr:g} "
        f"min={recipe.schedule.min_lr:g} {train.dtype}{scale} {recompute} sp={parallel.sequence_parallel} "
        f"zero={parallel.zero_stage}"
    )
    common = (
        train.sequence_length, train.grad_clip, recipe.optim.weight_decay, recipe.optim.betas, recipe.optim.eps,
        recipe.schedule.shape, recipe.schedule.warmup_fraction, recipe.data.split, recipe.seed, train.eval_every,
        train.eval_batches, recipe.checkpoint.every,
    )  # fmt: skip
    assert common == (2048, 1.0, 0.01, (0.9, 0.999), 1e-8, "cosine", 0.01, "949,50,1", 1234, 1000, 10, 10_000)


def test_33b_at_tensor_parallel_8_is_refused() -> None:
    recipe = read(find_bundled("", "llama-33b-zero-32p", ".toml"), **{"parallel.tensor_parallel": "8"})
    assert any("does not divide the 52 attention heads" in problem for problem in layout_problems(recipe, 32))


# The docs.


def table() -> str:
    """The table of docs/recipes.md, made from the files."""
    rows = [
        "| recipe | devices | layout | micro / global batch | sequence | precision | recomputed |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for path in sorted(RECIPES, key=lambda p: (SEEDS.index(p.stem) if p.stem in SEEDS else len(SEEDS), p.stem)):
        recipe, count = read(path), devices(path)
        parallel, train = recipe.parallel, recipe.train
        data = count // parallel.model_parallel
        parts = [
            f"tensor {parallel.tensor_parallel}{' with sequence' if parallel.sequence_parallel else ''}"
            if parallel.tensor_parallel > 1 else "",
            f"pipeline {parallel.pipeline_parallel}" if parallel.pipeline_parallel > 1 else "",
            f"data {data} (ZeRO-{parallel.zero_stage})" if data > 1 else "",
        ]  # fmt: skip
        recompute = {"first": "first " + " ".join(map(str, recipe.recompute.first_layers)), "full": "every layer"}
        mode = recompute.get(recipe.recompute.mode, recipe.recompute.mode)
        rows.append(
            f"| `{path.stem}` | {count} | {', '.join(filter(None, parts))} | {train.micro_batch} / {train.global_batch}"
            f" | {train.sequence_length:,} | {train.dtype} | {mode} |"
        )
    return "\n".join(rows)


def test_the_docs_table_is_the_files_own() -> None:
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert table() in page, f"docs/recipes.md needs this table:\n{table()}"
