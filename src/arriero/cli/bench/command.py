"""The verb `bench`: a recipe's speed on this machine, the matmul peak, or the best settings; no run is written."""

from __future__ import annotations

import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from annotated_types import Interval

from arriero.cli.arguments import print_sections, recipe_sections, split_command, wants_help
from arriero.cli.bench.measure import new_measurement, run_measurement
from arriero.cli.bench.peak import Peak, matmul_peak
from arriero.cli.bench.sweep import check_target, sweep, sweep_table, write_best
from arriero.cli.bench.table import as_json, peak_table, result_table
from arriero.common.device import device_description, device_type, matmul_dtypes, select_device
from arriero.common.errors import EXIT_CHECK_FAILED, EXIT_OK, UserError, join_problems
from arriero.common.ranges import PathText, flag, range_problems
from arriero.common.settings import Setting, parse
from arriero.common.text import escape_message
from arriero.common.toml import file_settings
from arriero.distributed.launch.config import LaunchConfig, resolve_launch_env
from arriero.distributed.launch.launcher import ProcessFailed, run_processes
from arriero.distributed.launch.rank_info import RankInfo, is_launched_externally
from arriero.train.preflight import step_problems
from arriero.train.recipe import Recipe, find_bundled
from arriero.train.run import process_count


@dataclass(frozen=True)
class BenchConfig:
    """What is measured."""

    iterations: Annotated[int, Interval(ge=1, le=1_000_000)] = 10
    """Steps that are timed."""
    warmup: Annotated[int, Interval(ge=1, le=1_000_000)] = 3
    """Steps before them, which fill caches."""
    peak: bool = False
    """Measure the fastest matrix multiplication of each dtype instead; takes no recipe."""
    sweep: bool = False
    """Try micro batches, recomputation and compilation, and name the best."""
    write: Annotated[str, PathText] = ""
    """sweep only: write the recipe with the best settings to this TOML file."""
    memory_limit: Annotated[float, Interval(ge=0, le=1e6)] = 0.0
    """GB that one process may hold, on the CPU; 0: none, and in a sweep what is available."""
    json: bool = False
    """Print JSON instead of Markdown."""

    def problems(self) -> list[UserError]:
        """All that is impossible about it."""
        found = range_problems(self, flag)
        if self.write and not self.sweep:
            found.append(UserError("--write has no effect without --sweep", "add --sweep"))
        if self.peak and (self.sweep or self.memory_limit):
            found.append(UserError("--peak goes with neither --sweep nor --memory-limit", "run them one by one"))
        return found


@dataclass(frozen=True)
class BenchArgs:
    """`arriero bench RECIPE [--key.sub value ...]`, or `arriero bench --peak`."""

    OWNERS: ClassVar = (BenchConfig, LaunchConfig, Recipe)
    """The dataclasses whose fields are flags of this verb."""
    config: BenchConfig
    launch: LaunchConfig
    recipe: str
    """The recipe's name; may be empty."""
    settings: list[Setting]
    """The recipe's keys of the command line."""

    @classmethod
    def from_words(cls, words: list[str]) -> BenchArgs:
        """Reads the words after `bench`; --help prints the flags, or one section of them, and raises SystemExit."""
        if not wants_help(words):
            return read_command(words)
        sections = {"bench": BenchConfig, "launch": LaunchConfig, **recipe_sections()}
        print_sections(words, usage="arriero bench [RECIPE]", sections=sections, complete=(BenchConfig, LaunchConfig))
        print(
            "Every key of a recipe may be given as in arriero pretrain. Random weights are trained, and no run is kept."
        )
        raise SystemExit(EXIT_OK)


def run(args: BenchArgs) -> int:
    """Measures the device's matmul peak, or a recipe; returns the exit code."""
    try:
        if args.config.peak:
            return bench_peak(args.config, args.launch, args.settings)
        return bench(args.config, args.launch, args.recipe, args.settings)
    except ProcessFailed as error:
        print(escape_message(f"arriero: {error}"), file=sys.stderr)
        return EXIT_CHECK_FAILED


def read_command(words: list[str]) -> BenchArgs:
    """Bench's own flags, the launch's, the recipe's name and the recipe's keys, from the words after `bench`."""
    named, (own, launched), rest = split_command(words, BenchConfig, LaunchConfig)
    config = parse(BenchConfig, own, prog="arriero bench")
    launch = parse(LaunchConfig, launched, prog="arriero bench")
    problems = config.problems()
    if config.peak and (named or any(s.key != "device" for s in rest)):
        problems.append(UserError("--peak measures the device, not a recipe", "leave the recipe and its keys out"))
    elif not config.peak and not named and not rest:
        problems.append(UserError("no recipe named", "arriero bench RECIPE, such as: arriero bench llama-7b-zero-8p"))
    if problems:
        raise join_problems(problems)
    return BenchArgs(config, launch, named, rest)


def bench(config: BenchConfig, launch: LaunchConfig, named: str, settings: list[Setting]) -> int:
    """Measures a recipe, or the settings around it."""
    before = file_settings(find_bundled("", named, ".toml")) if named else []
    recipe = parse(Recipe, before + settings, prog="arriero bench")
    launch = resolve_launch_env(launch, os.environ)
    kind = device_type(recipe.device)
    local_processes = process_count(recipe, launch, kind)
    check(config, recipe, local_processes * max(1, launch.nodes), kind, local_processes)
    if config.sweep:
        if is_launched_externally() or launch.nodes > 1:
            raise UserError("--sweep starts its own processes, on one machine", "start it without torchrun or --nodes")
        check_target(config.write)
    with tempfile.TemporaryDirectory(prefix="arriero-bench-") as root:
        first = new_measurement(
            recipe, kind, Path(root), iterations=config.iterations, warmup=config.warmup,
            memory_limit=config.memory_limit,
        )  # fmt: skip
        if config.sweep:
            results = sweep(first, local_processes, launch)
            print(as_json(results) if config.json else sweep_table(results))
            write_best(recipe, results, config.write)
            return EXIT_OK
        result = run_measurement(first, local_processes, launch)
    if result is not None:
        print(as_json(result) if config.json else result_table(result))
    return EXIT_OK


def check(config: BenchConfig, recipe: Recipe, processes: int, kind: str, local_processes: int) -> None:
    """Refuses what cannot work before anything is started. Data, tokenizer and `out` may be missing.

    Raises:
        UserError: all that is wrong.
    """
    local = 1 if is_launched_externally() else local_processes
    problems = step_problems(recipe, processes, kind=kind, local_processes=local, check_memory=not config.sweep)
    if config.memory_limit and kind != "cpu":
        problems.append(UserError("--memory-limit has no effect on an accelerator: its memory is the limit", "drop it"))
    if problems:
        raise join_problems(problems)


@dataclass(frozen=True)
class PeakRequest:
    """What every process of `--peak` receives."""

    device_kind: str
    json: bool


def bench_peak(config: BenchConfig, launch: LaunchConfig, settings: list[Setting]) -> int:
    """Measures matmuls; with --nproc-per-node, in several processes at once, of which the first one's are printed."""
    recipe = parse(Recipe, settings, prog="arriero bench")
    launch = resolve_launch_env(launch, os.environ)
    kind = device_type(recipe.device)
    if is_launched_externally() or launch.nodes > 1:
        raise UserError("--peak is about one machine", "start it without torchrun or --nodes")
    local_processes = process_count(recipe, launch, kind) if launch.nproc_per_node else 1
    print(run_processes(measure_peak, PeakRequest(kind, config.json), local_processes, launch=launch)[0])
    return EXIT_OK


def measure_peak(job: PeakRequest) -> str:
    """What each process does; returns the text to print."""
    info = RankInfo.from_environment()
    device = select_device(job.device_kind, info.local_rank)
    peaks: list[Peak] = [matmul_peak(device, dtype) for dtype in matmul_dtypes(job.device_kind)]
    return as_json(peaks) if job.json else peak_table(device_description(job.device_kind), peaks)
