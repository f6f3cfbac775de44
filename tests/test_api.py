"""The Python API: what docs/python.md shows, and what it promises about imports and types."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import arriero
import toy
from arriero.distributed.launch import worker


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> arriero.Run:
    recipe = arriero.load_recipe(toy.write_recipe(tmp_path_factory.mktemp("api")), {"checkpoint.every": 3})
    return arriero.pretrain(recipe)


def test_importing_it_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'numpy', 'pyarrow', 'tyro', 'matplotlib', 'tokenizers'}"
    code = f"import arriero, sys; dir(arriero); arriero.UserError; sys.exit(str({heavy} & set(sys.modules) or ''))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""


def test_every_public_name_is_there_with_a_docstring() -> None:
    for name in arriero.__all__:
        assert getattr(arriero, name).__doc__, name
        assert name in dir(arriero)
    with pytest.raises(AttributeError, match="no attribute 'pretrian'"):
        arriero.pretrian  # type: ignore[attr-defined]  # noqa: B018


def test_the_package_says_that_it_is_typed() -> None:
    assert (Path(arriero.__file__).parent / "py.typed").is_file()


def test_a_recipe_is_loaded_changed_and_checked(tmp_path: Path) -> None:
    recipe = arriero.load_recipe("llama-13b-ptd-8p", {"data.prefix": "mine", "optim.betas": (0.9, 0.99)})
    assert (recipe.parallel.pipeline_parallel, recipe.optim.betas, recipe.data.prefix) == (8, (0.9, 0.99), "mine")
    changed = arriero.change_recipe(recipe, {"train.steps": 7, "train.compile": True})
    assert (changed.train.steps, changed.train.compile, recipe.train.compile) == (7, True, False)
    assert changed == arriero.change_recipe(changed, {})
    with pytest.raises(arriero.UserError, match=r"unknown key 'train.stesp'(.|\n)*did you mean 'train.steps'"):
        arriero.change_recipe(recipe, {"train.stesp": 7})


def test_a_run_goes_on_in_another_layout(run: arriero.Run) -> None:
    assert run.complete
    assert [path.name for path in run.checkpoints()] == ["step-00000003", "step-00000006"]
    with pytest.raises(arriero.UserError, match="already holds a run"):
        arriero.pretrain(arriero.load_recipe(run.path / "recipe.toml"))
    longer = arriero.resume(run.path, {"train.steps": 8, "out": str(run.path) + "-2"}, processes=2)
    assert longer.complete
    assert longer.metrics()["iteration"].to_pylist() == [7, 8]
    assert run.metrics()["iteration"].to_pylist() == [1, 2, 3, 4, 5, 6]


def test_how_a_run_ended_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = arriero.load_recipe("demo", {"out": str(tmp_path)})
    monkeypatch.setattr(worker._Clock, "start", -1e9)
    monkeypatch.setattr("arriero.train.run.pretrain", lambda *_: 75)
    assert not arriero.pretrain(recipe).complete
    monkeypatch.setattr("arriero.train.run.pretrain", lambda *_: 1)
    with pytest.raises(arriero.CheckFailed, match="a process of the run failed"):
        arriero.pretrain(recipe)
    assert worker._Clock.start > -1e9, "a run's time counts from its own start, not from that of the notebook"


def test_metrics_are_columns(run: arriero.Run) -> None:
    table = arriero.read_metrics(run.path)
    assert table["lm_loss"].to_numpy().shape == (6,)
    assert arriero.read_metrics(run.path / "metrics.jsonl").equals(table)
    assert arriero.read_metrics(run.path, "validation").num_rows == 0


def test_runs_are_compared(run: arriero.Run) -> None:
    verdict = arriero.compare(run.path, run.path, max_rel=0)
    assert verdict.passed
    assert [x.quantity for x in verdict.agreements] == ["lm_loss", "grad_norm"]


def test_an_export_holds_the_tensors_of_the_run(run: arriero.Run, tmp_path: Path) -> None:
    done = arriero.export(run.path, tmp_path / "hf")
    assert done.largest_logit_difference == 0
    ours, theirs = arriero.open_model(run.path).reader, arriero.open_model(tmp_path / "hf").reader
    assert sorted(ours.names()) == sorted(theirs.names())
    name = "model.layers.1.mlp.down_proj.weight"
    assert ours.shape(name) == (32, 64)
    assert ours.read(name).equal(theirs.read(name))


def test_text_is_prepared(tmp_path: Path) -> None:
    from arriero.data.demo_corpus import train_tokenizer

    lines = [f"line {i} of a text" for i in range(400)]
    (tmp_path / "text.txt").write_text("\n".join(lines))
    train_tokenizer(lines, tmp_path / "tokenizer", 280)
    prefix = arriero.prepare(tmp_path / "text.txt", out=tmp_path / "set", tokenizer=tmp_path / "tokenizer")
    assert prefix == f"{tmp_path}/set_text_document"
    assert Path(f"{prefix}.bin").is_file()
    records = [{"instruction": "Add.", "input": f"{i} + {i}", "output": f"{i + i}"} for i in range(9)]
    (tmp_path / "records.jsonl").write_text("\n".join(map(json.dumps, records)))
    out = tmp_path / "sft"
    named = arriero.prepare(tmp_path / "records.jsonl", out=out, tokenizer=tmp_path / "tokenizer", format="alpaca-sft")
    assert named == str(out), "an instruction set is named by the part before _packed"
    with pytest.raises(arriero.UserError, match="no such file"):
        arriero.prepare(tmp_path / "none.txt", out=tmp_path / "set", tokenizer=tmp_path / "tokenizer")


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """The blocks of docs/python.md, one after another, as cells of a notebook are run."""
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[1] / "docs" / "python.md").read_text(encoding="utf-8")
    names: dict[str, object] = {}
    for block in re.findall(r"^```python\n(.*?)^```", page, re.M | re.S):
        exec(block, names)
    printed = capfd.readouterr().out
    assert "did you mean 'train.steps'?" in printed
    assert "hf torch.Size([64, 64]) torch.bfloat16 21" in printed


def test_the_page_names_every_function() -> None:
    page = (Path(__file__).parents[1] / "docs" / "python.md").read_text(encoding="utf-8")
    for name in set(arriero.__all__) - {"__version__", "Recipe"}:
        assert name in page
