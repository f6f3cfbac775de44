"""`arriero bench` as a user meets it, on real processes."""

from __future__ import annotations

import json
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import toy
from arriero.cli import main as cli
from arriero.cli.bench import sweep
from arriero.cli.bench.command import BenchConfig
from arriero.cli.bench.measure import Measurement, Result, new_measurement
from arriero.common.errors import CheckFailed, UserError
from arriero.common.settings import parse
from arriero.common.toml import file_settings
from arriero.distributed.launch.config import LaunchConfig
from arriero.distributed.parallel.config import RecomputeConfig
from arriero.model.config import LlamaConfig
from arriero.observe.throughput import flops_per_token
from arriero.train.recipe import Recipe
from programs import arriero

pytestmark = pytest.mark.slow

SHORT = ("--iterations", "2", "--warmup", "1")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.write_recipe(tmp_path_factory.mktemp("bench"))


def test_the_table_has_the_seed_s_columns_and_no_run_is_written(recipe: Path, tmp_path: Path) -> None:
    before = sorted(recipe.parent.rglob("*"))
    printed = arriero("bench", recipe, *SHORT, "--log.peak-tflops", "0.1", "--recompute.mode", "full", cwd=tmp_path)
    head, rule, row = printed.splitlines()[:3]
    seed = "| device | model | iterations | samples/s/p | tokens/s/p | s/step | TFLOPs | MFU |"
    assert head == seed + " MFU, attention in full | HFU | peak memory, GB | first step, s |"
    assert head.count("|") == rule.count("|") == row.count("|")
    assert "| model | 2 |" in row
    for formula in ("6 x matmul parameters + 6 L d s", "TFLOPs / 0.1 (given as log.peak_tflops)", "12 L d s", "HFU:"):
        assert formula in printed
    assert sorted(recipe.parent.rglob("*")) == before
    assert list(tmp_path.iterdir()) == []


def test_figures_follow_from_each_other_on_two_processes(recipe: Path) -> None:
    words = ("--parallel.tensor-parallel", "2", "--data.prefix", "nowhere", "--data.attention", "document", "--json")
    row = Result(**json.loads(arriero("bench", recipe, *SHORT, *words)))
    assert row.processes == 2
    assert row.layout == "tensor 2"
    assert row.data == "random tokens (nowhere is not here)"
    assert row.samples_per_second_per_device == pytest.approx(8 / row.seconds_per_step / 2)
    assert row.tokens_per_second_per_device == pytest.approx(32 * row.samples_per_second_per_device)
    assert row.mfu == pytest.approx(row.tflops / row.peak_tflops)
    assert "float32 matmul measured here" in row.peak_source
    config = LlamaConfig.from_json(recipe.parent / "model")
    least, most = (flops_per_token(config, n) * row.tokens_per_second_per_device / 1e12 for n in (0, 32))
    assert least < row.tflops < most  # documents are shorter than the sample
    assert row.hfu is None
    assert 5 < row.last_loss < 6.2  # ln 259 is 5.56


def test_the_matmul_peak(tmp_path: Path) -> None:
    printed = arriero("bench", "--peak", cwd=tmp_path)
    assert "| dtype | TFLOP/s | fastest matmul | data sheet |" in printed
    assert "- float32 on this device: --log.peak_tflops 0." in printed
    assert list(tmp_path.iterdir()) == []


REFUSED = {
    "nothing": ([], "no recipe named"),
    "missing recipe": (["nowhere.toml"], "no such file"),
    "unknown key": (["RECIPE", "--train.stesp", "3"], "did you mean 'train.steps'"),
    "no iterations": (["RECIPE", "--iterations", "0"], "--iterations is 0"),
    "not a number": (["RECIPE", "--iterations", "many"], "--iterations"),
    "layout": (["RECIPE", "--parallel.tensor-parallel", "3"], "use one of 1, 2"),
    "write without sweep": (["RECIPE", "--write", "best.toml"], "--write has no effect without --sweep"),
    "write over a file": (["RECIPE", "--sweep", "--write", "RECIPE"], "the file exists"),
    "write nowhere": (["RECIPE", "--sweep", "--write", "no/where.toml"], "no such directory"),
    "peak of a recipe": (["RECIPE", "--peak"], "--peak measures the device"),
    "peak and sweep": (["--peak", "--sweep"], "goes with neither"),
    "device": (["RECIPE", "--device", "npu"], "not available"),
    "memory": (["RECIPE", "--memory-limit", "-1"], "--memory-limit is -1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_one_message(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    words, message = REFUSED[name]
    monkeypatch.chdir(tmp_path)
    assert cli.dispatch(["bench", *[str(recipe) if w == "RECIPE" else w for w in words]]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.out == ""
    assert list(tmp_path.iterdir()) == []


def test_all_flag_problems_are_told_together() -> None:
    problems = BenchConfig(iterations=0, warmup=0, write="x", peak=True, memory_limit=1).problems()
    assert [p.problem.split()[0] for p in problems] == ["--iterations", "--warmup", "--write", "--peak"]


def test_out_of_memory_is_a_message_in_a_bench_and_a_result_in_a_sweep(recipe: Path, tmp_path: Path) -> None:
    printed = arriero("bench", recipe, *SHORT, "--memory-limit", "0.05", code=2, cwd=tmp_path)
    assert "out of memory: a process held" in printed
    assert "train.micro_batch" in printed
    words = ("--sweep", "--write", "best.toml", "--memory-limit", "0.05")
    printed = arriero("bench", recipe, *SHORT, *words, code=1, cwd=tmp_path)
    assert "no setting fits into memory" in printed
    assert list(tmp_path.iterdir()) == []


def test_a_compiled_bench_says_so(recipe: Path) -> None:
    printed = arriero("bench", recipe, *SHORT, "--train.compile", "true")
    assert "recompute none, layers compiled;" in printed
    assert "first step: with the compilation and all else" in printed


def made_up(measurement: Measurement, rate: float) -> Result:
    train = measurement.recipe.train
    return Result(
        device="d", model="m", layout="one process", processes=1, dtype=train.dtype, micro_batch=train.micro_batch,
        global_batch=train.global_batch, sequence_length=train.sequence_length,
        recompute=measurement.recipe.recompute.mode,
        data="random tokens", iterations=1, seconds_per_step=1.0, samples_per_second_per_device=1.0,
        tokens_per_second_per_device=rate, tflops=1.0, mfu=0.5, mfu_full=0.5, hfu=None, peak_tflops=2.0,
        peak_source="measured", first_step_seconds=1.0, peak_memory_gb=1.0, last_loss=5.0,
    )  # fmt: skip


def test_a_sweep_stops_at_what_does_not_fit_and_writes_the_fastest(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Larger micro-batches are faster and fit only with recomputation, which costs a tenth."""
    tried: list[tuple[int, str]] = []
    compiled: list[tuple[int, str]] = []

    def run_measurement(measurement: Measurement, processes: int, launch: Any) -> Result:
        micro, mode = measurement.recipe.train.micro_batch, measurement.recipe.recompute.mode
        (compiled if measurement.recipe.train.compile else tried).append((micro, mode))
        if micro > {"none": 2, "selective": 4, "full": 8}[mode]:
            raise UserError("out of memory", "lower it")
        gain = 1.5 if measurement.recipe.train.compile else 1.0
        return made_up(measurement, gain * micro * {"none": 1.0, "selective": 0.95, "full": 0.9}[mode])

    monkeypatch.setattr(sweep, "run_measurement", run_measurement)
    whole = parse(Recipe, file_settings(recipe), prog="test")
    first = new_measurement(whole, "cpu", tmp_path, iterations=1, warmup=1)
    found = sweep.sweep(first, 1, LaunchConfig())
    assert [pair for pair in tried if pair[1] == "none"] == [(1, "none"), (2, "none"), (4, "none")]
    assert [t.reason for t in found if t.recompute.mode == "none"] == ["", "", "out of memory", ""]
    assert compiled == [(2, "none"), (4, "selective"), (4, "selective"), (8, "full")]  # the fastest of each policy
    target = tmp_path / "best.toml"
    sweep.write_best(whole, found, str(target))
    assert target.read_text().startswith(
        "# By arriero bench --sweep on d: 8 samples at a time, recompute full, compiled"
    )
    written = parse(Recipe, file_settings(target), prog="test")
    assert written == replace(
        whole, train=replace(whole.train, micro_batch=8, compile=True), recompute=RecomputeConfig("full")
    )  # nothing else is changed, and what the trials changed for themselves is not in it
    assert tomllib.loads(target.read_text())["out"] == whole.out
    table = sweep.sweep_table(found)
    assert "| 8 | full | yes | 11 |" in table
    assert "| 4 | none | no | - | - | - | - | out of memory |" in table


def test_a_sweep_in_which_nothing_fits() -> None:
    with pytest.raises(CheckFailed, match="no setting fits"):
        sweep.best([sweep.SweepResult(1, RecomputeConfig(), None, "out of memory")])


def test_micro_batches_divide_the_share() -> None:
    assert sweep.micro_batches(12) == [1, 2, 4, 12]
    assert sweep.micro_batches(1) == [1]
