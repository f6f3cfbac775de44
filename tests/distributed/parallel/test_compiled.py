"""Compiled layers: one compilation for all of them, and the run stays the same run."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cases import case, launch, pipe, settings

import toy
from arriero.cli import main as cli
from arriero.distributed.parallel.config import ParallelConfig
from arriero.distributed.parallel.limits import compile_layout_problems
from arriero.train import preflight
from arriero.train.preflight import compile_machine_problems

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "one, documents": (1, {"data__attention": "document"}),
    "one, bfloat16": (1, {"dtype": "bfloat16"}),
    "one, bfloat16, recompute first": (1, {"dtype": "bfloat16", **settings(mode="first", first_layers=[2])}),
    "one, recompute selective": (1, settings(mode="selective")),
    "zero-3, recompute full": (2, settings(zero_stage=3, mode="full")),
    "tensor 2, sequence": (2, settings(tensor_parallel=2, sequence_parallel=True)),
    "pipeline 2": (2, pipe(2)),
}
COMPILATIONS = {"one, bfloat16, recompute first": 6, "tensor 2, sequence": 2, "pipeline 2": 2}
"""A layer's training pass and its pass without gradients, twice that where there are two kinds of layers; likewise the
logits' softmax, but not where the vocabulary is cut, nor on the first stage, which counts here."""


@pytest.fixture(scope="module")
def runs() -> Iterator[dict[str, dict[str, Any]]]:
    root = Path(tempfile.mkdtemp(prefix="arriero-compiled-"))
    toy.write_data(root / "data")
    toy.write_config(root / "plain", num_hidden_layers=4)
    found: dict[str, dict[str, Any]] = {}
    try:
        for processes in (1, 2):
            cases = []
            for name, (wanted, given) in CASES.items():
                if wanted == processes:
                    cases.append(case(root, name, **given, train__steps=3))
                    cases.append(case(root, f"{name}; compiled", **given, train__compile=True, train__steps=3))
            found |= launch(root, processes, cases)
        yield found
    finally:
        shutil.rmtree(root)


@pytest.mark.parametrize("name", CASES)
def test_the_same_run_from_one_compilation(runs: dict[str, dict[str, Any]], name: str) -> None:
    plain, got = runs[name], runs[f"{name}; compiled"]
    tolerance = 2e-2 if "bfloat16" in name else 1e-10  # fused operators round to bfloat16 less often
    for what in ("loss", "grad_norm", "valid"):
        assert got[what] == pytest.approx(plain[what], rel=tolerance), what
    assert plain["compilations"] == 0
    assert got["compilations"] == COMPILATIONS.get(name, 4)


@pytest.mark.parametrize("schedule", ["InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV", "1F1B"])
def test_a_backward_pass_in_halves_is_refused(schedule: Any) -> None:
    problems = compile_layout_problems(ParallelConfig(pipeline_parallel=2, pipeline_schedule=schedule))
    assert [f"train.compile does not work with parallel.pipeline_schedule {schedule}"] * (schedule != "1F1B") == [
        p.problem for p in problems
    ]


def test_without_a_compiler_the_run_is_refused_before_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = toy.write_recipe(tmp_path)
    monkeypatch.setenv("CXX", "no-such-compiler")
    words = [str(recipe), "--train.compile", "true", "--device", "cpu"]
    for verb in (["pretrain", *words], ["bench", *words], ["pretrain", *words, "--verify-layout"]):
        assert cli.dispatch(verb) == 2
        assert "train.compile needs a C++ compiler (install g++" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_what_each_device_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "not been tried" in compile_machine_problems("npu")[0].problem
    monkeypatch.setattr(preflight.shutil, "which", lambda name: None)
    monkeypatch.setattr(preflight.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(preflight.sysconfig, "get_path", lambda name: "/nowhere")
    (problem,) = compile_machine_problems("cuda")
    assert all(what in problem.problem for what in ("a C compiler", "Python's headers", "Triton"))


def test_doctor_names_the_compiler(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.dispatch(["doctor", "--json"]) == 0
    (finding,) = [f for f in json.loads(capsys.readouterr().out)["findings"] if f["name"] == "compiler"]
    assert finding["status"] == "ok"
    assert finding["found"].endswith(", for train.compile")
