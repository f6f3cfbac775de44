"""The best micro batch, recomputation and compilation for a recipe within memory, by trying them."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

from arriero.cli.bench.measure import Measurement, Result, ran_out_of_memory, run_measurement
from arriero.cli.bench.table import markdown, percent
from arriero.common.device import available_memory
from arriero.common.errors import CheckFailed, UserError
from arriero.common.files import write_atomic
from arriero.common.text import escape
from arriero.common.toml import to_toml
from arriero.distributed.launch.config import LaunchConfig
from arriero.distributed.parallel.config import RecomputeConfig
from arriero.distributed.parallel.limits import compile_layout_problems
from arriero.train.preflight import compile_machine_problems
from arriero.train.recipe import Recipe

POLICIES = (
    RecomputeConfig(), RecomputeConfig("selective"), RecomputeConfig("selective", keep=("attention",)),
    RecomputeConfig("full"),
)  # fmt: skip
"""From most memory to least. No larger micro batch is tried after one that does not fit."""


@dataclass(frozen=True)
class SweepResult:
    """One setting and its measurement."""

    micro_batch: int
    recompute: RecomputeConfig
    result: Result | None
    """None where it did not fit."""
    reason: str = ""
    """Why there is no result."""
    compiled: bool = False
    """Whether the layers were compiled."""

    @property
    def policy(self) -> str:
        """The recomputation in a word or two."""
        kept = f", keeps {' and '.join(self.recompute.keep)}" if self.recompute.mode == "selective" else ""
        return self.recompute.mode + kept


def sweep(measurement: Measurement, processes: int, launch: LaunchConfig) -> list[SweepResult]:
    """Runs every setting that is possible with the recipe's layout and batch, the global batch staying what it is.

    Compilation is tried last, at the fastest micro batch of each policy: it is slow, and its gain depends little on the
    micro batch. Where it cannot work, it is left out.
    """
    recipe = measurement.recipe
    if not measurement.memory_limit and measurement.device_kind == "cpu":
        measurement = replace(measurement, memory_limit=0.9 * available_memory() / processes / 1e9)
    data = max(1, processes // recipe.parallel.model_parallel)
    sizes = micro_batches(recipe.train.global_batch // data)
    found: list[SweepResult] = []

    def run(candidate: Recipe) -> SweepResult:
        known = next((t.result for t in found if t.result is not None), None)
        peak = (known.peak_tflops, known.peak_source) if known is not None else measurement.peak
        tried = try_setting(replace(measurement, recipe=candidate, peak=peak), processes, launch)
        found.append(tried)
        print(_name(tried), file=sys.stderr, flush=True)
        return tried

    for policy in (p for p in POLICIES if not p.problems(recipe.parallel)):
        for size in sizes:
            candidate = with_settings(recipe, size, policy)
            if candidate.layout_problems(processes):
                continue
            if run(candidate).result is None:
                break
    if not compile_machine_problems(measurement.device_kind) and not compile_layout_problems(recipe.parallel):
        for tried in fastest_of_each_policy(found):
            run(with_settings(recipe, tried.micro_batch, tried.recompute, compiled=True))
    return found


def fastest_of_each_policy(tried: list[SweepResult]) -> list[SweepResult]:
    """The fastest of each policy that fitted into memory."""
    policies = dict.fromkeys(t.recompute for t in tried if t.result is not None)
    return [best([t for t in tried if t.recompute == policy]) for policy in policies]


def micro_batches(share: int) -> list[int]:
    """The powers of two, and the whole share, that divide a data rank's share of the global batch; small to large."""
    return [n for n in range(1, share + 1) if share % n == 0 and (n & (n - 1) == 0 or n == share)]


def with_settings(recipe: Recipe, micro_batch: int, recompute: RecomputeConfig, *, compiled: bool = False) -> Recipe:
    """The recipe with these settings."""
    train = replace(recipe.train, micro_batch=micro_batch, compile=compiled)
    return replace(recipe, train=train, recompute=recompute)


def try_setting(measurement: Measurement, processes: int, launch: LaunchConfig) -> SweepResult:
    """Measures one setting; running out of memory is a result."""
    train = measurement.recipe.train
    setting = SweepResult(train.micro_batch, measurement.recipe.recompute, None, compiled=train.compile)
    try:
        return replace(setting, result=run_measurement(measurement, processes, launch))
    except UserError as error:
        if not (ran_out_of_memory(measurement) or "out of memory" in error.problem):
            raise
        return replace(setting, reason=error.problem)


def best(tried: list[SweepResult]) -> SweepResult:
    """The fastest.

    Raises:
        CheckFailed: nothing fitted.
    """
    fitting = [t for t in tried if t.result is not None]
    if not fitting:
        raise CheckFailed("no setting fits into memory: use more processes, or cut the model (parallel.*)")
    return max(fitting, key=lambda t: t.result.tokens_per_second_per_device if t.result else 0.0)


def sweep_table(tried: list[SweepResult]) -> str:
    """Every setting in a row, and the best below."""
    rows = []
    for t in tried:
        figures = ["-", "-", "-", "-", t.reason]
        if r := t.result:
            rate = f"{r.tokens_per_second_per_device:.0f}"
            figures = [rate, percent(r.mfu), f"{r.peak_memory_gb:.2f}", f"{r.first_step_seconds:.2f}", ""]
        rows.append([str(t.micro_batch), t.policy, "yes" if t.compiled else "no", *figures])
    headers = ["micro batch", "recompute", "compile", "tokens/s/p", "MFU", "peak memory, GB", "first step, s", ""]
    return f"{markdown(headers, rows)}\n\nbest: {_name(best(tried))}"


def check_target(path: str) -> None:
    """Refuses a file that is there already, before hours are spent.

    Raises:
        UserError: the file exists, or its directory does not.
    """
    if not path:
        return
    if Path(path).exists():
        raise UserError(f"--write {path}: the file exists", "name another file")
    if not Path(path).absolute().parent.is_dir():
        raise UserError(f"--write {path}: no such directory", "make it first")


def write_best(recipe: Recipe, tried: list[SweepResult], path: str) -> None:
    """Writes the recipe as it was given, with the best settings, if a path is named."""
    if not path:
        return
    found = best(tried)
    assert found.result is not None
    text = to_toml(with_settings(recipe, found.micro_batch, found.recompute, compiled=found.compiled))
    why = f"# By arriero bench --sweep on {found.result.device}: {_name(found)}.\n"
    write_atomic(Path(path), why + text)
    print(f"wrote {escape(path)}", file=sys.stderr)


def _name(tried: SweepResult) -> str:
    r = tried.result
    outcome = tried.reason if r is None else f"{r.tokens_per_second_per_device:.0f} tokens/s/p"
    compiled = ", compiled" if tried.compiled else ""
    return f"{tried.micro_batch} samples at a time, recompute {tried.policy}{compiled}, {outcome}"
