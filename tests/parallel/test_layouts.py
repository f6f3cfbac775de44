"""Whatever the layout, the run is the same run: real gloo processes against one process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import toy

from arriero.checkpoint.load import CheckpointReader

RUNNER = Path(__file__).with_name("run_layouts.py")
LAYOUTS = {  # name -> (processes, settings)
    **{f"zero-{z} data 2": (2, {"parallel.zero_stage": z}) for z in (1, 2, 3)},
    "tensor 2": (2, {"parallel.tensor_parallel": 2}),
    **{
        f"zero-{z} data 2 x tensor 2": (4, {"parallel.zero_stage": z, "parallel.tensor_parallel": 2}) for z in (1, 2, 3)
    },
}
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied, biased": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
}


def case(root: Path, name: str, shape: str, dtype: str, **settings: Any) -> dict[str, Any]:
    base = {
        "model": str(root / shape / "config.json"), "out": str(root / "runs" / name), "seed": 7,
        "data.prefix": str(root / "data" / "toy_text_document"), "data.split": "90,10,0",
        "train.steps": 5, "train.sequence_length": 32, "train.global_batch": 8, "train.micro_batch": 2,
        "train.dtype": dtype, "train.eval_batches": 1, "schedule.lr": 1e-2, "schedule.min_lr": 1e-3,
        "schedule.warmup_steps": 2,
    }  # fmt: skip
    return {"name": name, "settings": base | {key.replace("__", "."): value for key, value in settings.items()}}


def launch(root: Path, processes: int, cases: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    results, job = root / f"results-{processes}.jsonl", root / f"job-{processes}.json"
    results.unlink(missing_ok=True)
    job.write_text(json.dumps({"processes": processes, "cases": cases, "results": str(results)}))
    done = subprocess.run(
        [sys.executable, str(RUNNER), str(job)], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return {r["name"]: r for r in map(json.loads, results.read_text().splitlines())}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Any]]]:
    """All cases: one launch for each number of processes."""
    root = tmp_path_factory.mktemp("layouts")
    toy.write_data(root / "data")
    cases: dict[int, list[dict[str, Any]]] = {1: [], 2: [], 4: []}
    for shape, changes in SHAPES.items():
        toy.write_config(root / shape, **changes)
        for dtype in ("float64", "float32"):
            cases[1].append(case(root, f"one, {shape}, {dtype}", shape, dtype))
            for layout, (processes, settings) in LAYOUTS.items():
                cases[processes].append(case(root, f"{layout}, {shape}, {dtype}", shape, dtype, **settings))
    for dtype in ("bfloat16", "float16"):
        cases[1].append(case(root, f"one, {dtype}", "plain", dtype))
        for layout in ("zero-2 data 2", "tensor 2", "zero-3 data 2 x tensor 2"):
            processes, settings = LAYOUTS[layout]
            cases[processes].append(case(root, f"{layout}, {dtype}", "plain", dtype, **settings))
    overflow = {"train.initial_loss_scale": 2.0**40, "train.loss_scale_hysteresis": 1}
    cases[1].append(case(root, "one, overflow", "plain", "float16", **overflow))
    cases[2].append(case(root, "data 2, overflow", "plain", "float16", **overflow))
    results = launch(root, 1, cases[1])
    # Resume a one-process checkpoint under each layout, and a 2 x 2 one in one process.
    for layout, (processes, settings) in LAYOUTS.items():
        again = case(root, f"resumed, {layout}", "plain", "float64", **settings)
        cases[processes].append(again | {"resume": str(root / "runs/one, plain, float64/checkpoints/step-00000003")})
    results |= launch(root, 2, cases[2])
    results |= launch(root, 4, cases[4])
    back = case(root, "resumed, one", "plain", "float64")
    source = root / "runs/zero-3 data 2 x tensor 2, plain, float64/checkpoints/step-00000003"
    results |= launch(root, 1, [back | {"resume": str(source)}])
    return root, results


def largest_difference(root: Path, name: str, reference: str) -> float:
    """Largest relative L2 difference over all weights and moments after step 5."""
    one, other = (CheckpointReader(root / "runs" / n / "checkpoints" / "step-00000005") for n in (reference, name))
    assert one.keys() == other.keys()
    worst = 0.0
    for key in one.keys():  # noqa: SIM118 - a reader, not a dict
        a, b = one.read(key).double(), other.read(key).double()
        worst = max(worst, ((a - b).norm() / a.norm().clamp_min(1e-12)).item())
    return worst


def close(a: list[float], b: list[float], limit: float) -> bool:
    return len(a) == len(b) and all(abs(x - y) <= limit * abs(y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("dtype", "limit"), [("float64", 1e-10), ("float32", 1e-5)])
def test_layout_equals_one_process(runs: Any, layout: str, shape: str, dtype: str, limit: float) -> None:
    root, results = runs
    one, other = results[f"one, {shape}, {dtype}"], results[f"{layout}, {shape}, {dtype}"]
    assert one["loss"][-1] < one["loss"][0]  # it learns: equal noise would prove nothing
    assert close(other["loss"], one["loss"], limit)
    assert close(other["grad_norm"], one["grad_norm"], limit)
    assert close([other["valid"]], [one["valid"]], limit)
    if dtype == "float64":  # in float32 AdamW divides rounding noise by rounding noise where a gradient is near zero
        assert largest_difference(root, f"{layout}, {shape}, {dtype}", f"one, {shape}, {dtype}") < limit


@pytest.mark.parametrize("layout", ["zero-2 data 2", "tensor 2", "zero-3 data 2 x tensor 2"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_is_near(runs: Any, layout: str, dtype: str) -> None:
    _, results = runs
    assert close(results[f"{layout}, {dtype}"]["loss"], results[f"one, {dtype}"]["loss"], 2e-3)
    assert close(results[f"one, {dtype}"]["loss"], results["one, plain, float32"]["loss"], 5e-3)


def test_overflow_is_skipped_alike(runs: Any) -> None:
    """A scale that overflows is halved until it fits, and the skipped steps change no weight."""
    _, results = runs
    one, two = results["one, overflow"], results["data 2, overflow"]
    assert one["scale"] == two["scale"]
    assert one["skipped"] == two["skipped"]
    assert one["scale"][:2] == [2.0**40, 2.0**39]
    assert one["skipped"][0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_resume_under_another_layout(runs: Any, layout: str) -> None:
    root, results = runs
    assert close(results[f"resumed, {layout}"]["loss"], results["one, plain, float64"]["loss"][3:], 1e-10)
    assert largest_difference(root, f"resumed, {layout}", "one, plain, float64") < 1e-10


def test_resume_on_one_process(runs: Any) -> None:
    root, results = runs
    assert close(results["resumed, one"]["loss"], results["one, plain, float64"]["loss"][3:], 1e-10)
    assert largest_difference(root, "resumed, one", "one, plain, float64") < 1e-10
