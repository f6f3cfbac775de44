"""Whatever the layout, the run is the same run: real gloo processes against one process."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
from cases import LAYOUTS, SOME, case, launch

import toy
from arriero.checkpoint.load import CheckpointReader
from arriero.distributed.parallel.config import ParallelConfig, RecomputeConfig

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
VARIANTS: dict[str, dict[str, Any]] = {  # what is trained, and the layouts that are tried with it
    "float64": {},
    "float32": {"dtype": "float32"},
    "tied, biased": {"shape": "tied"},
    "documents": {"data__attention": "document"},  # masks, positions that start over, labels without loss
    "padded answers": {"data__prefix": "SFT"},  # padding, and prompts without loss
}
TRIED = {
    "float64": tuple(LAYOUTS),
    "float32": (*SOME, "hybrid: 2 copies of 2", "pipeline 2, DualPipeV"),  # float64 proves the table; one of each kind
    "tied, biased": (*SOME, "pipeline 2, DualPipeV", "pipeline 2 DualPipeV x tensor 2", "zero-1, data 2 x tensor 2"),
    "documents": SOME,
    "padded answers": SOME,
}
UNLABELLED = ("zero-3, data 2", "tensor 2, sequence", "pipeline 2, 1F1B", "pipeline 2, DualPipeV",
              "pipeline 2 x context 2 x tensor 2")  # fmt: skip
LOW = ("zero-3, data 2", "tensor 2", "pipeline 2, 1F1B", "pipeline 2 x zero-3 data 2")


@pytest.fixture(scope="module")
def runs() -> Iterator[tuple[Path, dict[str, dict[str, Any]]]]:
    """All cases, one launch for each number of processes."""
    root = Path(tempfile.mkdtemp(prefix="arriero-layouts-", dir=shared_memory()))
    try:
        yield root, run_all(root)
    finally:
        shutil.rmtree(root)


def run_all(root: Path) -> dict[str, dict[str, Any]]:
    toy.write_data(root / "data")
    toy.write_instructions(root / "data")
    few = {"data__prefix": str(toy.write_few_labels(root / "data"))}
    toy.write_config(root / "plain", num_hidden_layers=4)
    toy.write_config(root / "tied", num_hidden_layers=4, tie_word_embeddings=True, attention_bias=True, mlp_bias=True)
    cases: dict[int, list[dict[str, Any]]] = {1: [], 2: [], 4: [], 8: []}
    for variant, changes in VARIANTS.items():
        given = {k: str(root / "data" / "toy") if v == "SFT" else v for k, v in changes.items()}
        cases[1].append(case(root, f"one, {variant}", **given))
        for layout in TRIED[variant]:
            processes, settings = LAYOUTS[layout]
            cases[processes].append(case(root, f"{layout}; {variant}", **given, **settings))
    for dtype in ("bfloat16", "float16"):
        cases[1].append(case(root, f"one, {dtype}", dtype=dtype))
        for layout in LOW:
            cases[LAYOUTS[layout][0]].append(case(root, f"{layout}; {dtype}", dtype=dtype, **LAYOUTS[layout][1]))
    overflow = {"dtype": "float16", "train__initial_loss_scale": 2.0**40, "train__loss_scale_hysteresis": 1}
    cases[1].append(case(root, "one, overflow", **overflow))
    cases[2].append(case(root, "data 2; overflow", **overflow))
    cases[2].append(case(root, "pipeline 2; overflow", **overflow, **LAYOUTS["pipeline 2, 1F1B"][1]))
    for layout in UNLABELLED:
        cases[LAYOUTS[layout][0]].append(case(root, f"{layout}; few labels", **few, **LAYOUTS[layout][1]))
    cases[1].append(case(root, "one, few labels", **few))
    results = launch(root, 1, cases[1])
    # Resume a checkpoint of one process under each of some layouts, and one of each in one process.
    for layout in SOME:
        processes, settings = LAYOUTS[layout]
        checkpoint = str(root / "runs/one, float64/checkpoints/step-00000003")
        cases[processes].append(case(root, f"resumed; {layout}", **settings) | {"resume": checkpoint})
    for processes in (2, 4, 8):
        results |= launch(root, processes, cases[processes])
    back = [
        case(root, f"back; {layout}") | {"resume": str(root / f"runs/{layout}; float64/checkpoints/step-00000003")}
        for layout in SOME
    ]
    return results | launch(root, 1, back)


def shared_memory() -> str | None:
    """A directory in memory, where hundreds of small checkpoints cost no disk; else the usual temporary one."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


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


def test_the_table_has_every_choice_of_a_recipe() -> None:
    """Each value of each field that names alternatives, and each degree beyond one."""
    chosen = [given for _, given in LAYOUTS.values()]
    for table, config in (("parallel", ParallelConfig()), ("recompute", RecomputeConfig())):
        for field, hint in get_type_hints(type(config)).items():
            if get_origin(hint) is Literal:
                tried = {given.get(f"{table}.{field}", getattr(config, field)) for given in chosen}
                assert tried == set(get_args(hint)), field
    for degree in ("tensor_parallel", "context_parallel", "pipeline_parallel", "zero_group"):
        assert any(given.get(f"parallel.{degree}", 1) > 1 for given in chosen), degree
    assert {processes for processes, _ in LAYOUTS.values()} == {2, 4, 8}


@pytest.mark.parametrize(("variant", "layout"), [(v, layout) for v in VARIANTS for layout in TRIED[v]])
def test_layout_equals_one_process(runs: Any, variant: str, layout: str) -> None:
    root, results = runs
    limit = 1e-5 if variant == "float32" else 1e-10
    one, other = results[f"one, {variant}"], results[f"{layout}; {variant}"]
    assert one["loss"][-1] < one["loss"][0]  # it learns: equal noise would prove nothing
    assert close(other["loss"], one["loss"], limit)
    assert close(other["grad_norm"], one["grad_norm"], limit)
    assert close([other["valid"]], [one["valid"]], limit)
    if variant != "float32":  # in float32 AdamW divides rounding noise by rounding noise where a gradient is near zero
        assert largest_difference(root, f"{layout}; {variant}", f"one, {variant}") < limit


def test_variants_differ_from_each_other(runs: Any) -> None:
    """Masks, padding and shapes matter: otherwise their proofs would be copies of the first."""
    _, results = runs
    losses = [results[f"one, {variant}"]["loss"][0] for variant in VARIANTS if variant != "float32"]
    assert len(set(losses)) == len(losses)


def test_no_object_is_pickled_between_processes_in_any_layout(runs: Any) -> None:
    """torch's pipeline would send its shapes so, and whoever plays a process of the run could run code in another."""
    _, results = runs
    assert len(results) > len(LAYOUTS)
    assert {name: result["pickles"] for name, result in results.items() if any(result["pickles"])} == {}


@pytest.mark.parametrize("layout", LOW)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_is_near(runs: Any, layout: str, dtype: str) -> None:
    _, results = runs
    assert close(results[f"{layout}; {dtype}"]["loss"], results[f"one, {dtype}"]["loss"], 2e-3)
    assert close(results[f"one, {dtype}"]["loss"], results["one, float32"]["loss"], 5e-3)


def test_overflow_is_skipped_alike(runs: Any) -> None:
    """A scale that overflows is halved until it fits, and every rank skips the same steps."""
    _, results = runs
    one = results["one, overflow"]
    assert one["scale"][:2] == [2.0**40, 2.0**39]
    assert one["skipped"][0]
    for other in (results["data 2; overflow"], results["pipeline 2; overflow"]):
        assert (other["scale"], other["skipped"]) == (one["scale"], one["skipped"])


@pytest.mark.parametrize("layout", UNLABELLED)
def test_steps_without_a_label_are_left_out_alike(runs: Any, layout: str) -> None:
    """A global batch in which no label carries a loss, and a validation in which none does."""
    root, results = runs
    one, other = results["one, few labels"], results[f"{layout}; few labels"]
    assert 0 < sum(one["skipped"]) < 5
    assert other["skipped"] == one["skipped"]
    assert [math.isnan(loss) for loss in one["loss"]] == one["skipped"]
    assert all(math.isnan(r["valid"]) for r in (one, other))
    taken = [i for i, skipped in enumerate(one["skipped"]) if not skipped]
    assert close([other["loss"][i] for i in taken], [one["loss"][i] for i in taken], 1e-10)
    assert largest_difference(root, f"{layout}; few labels", "one, few labels") < 1e-10


@pytest.mark.parametrize("layout", SOME)
def test_resume_under_another_layout(runs: Any, layout: str) -> None:
    root, results = runs
    for name in (f"resumed; {layout}", f"back; {layout}"):
        assert close(results[name]["loss"], results["one, float64"]["loss"][3:], 1e-10)
        assert largest_difference(root, name, "one, float64") < 1e-10
