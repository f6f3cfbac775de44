"""`arriero torture`: kills a run at random moments and checks that the resumed run gives the undisturbed run's numbers.

The recipe is trained at reduced width on the CPU, first without kills, then with kills; after each, the same command
line is started again. The SHA-256 of the final weights and moments and the loss of every step must equal those of the
undisturbed run, and a checkpoint of a killed run must give the same numbers under other layouts.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from annotated_types import Interval
from rich.console import Console
from rich.table import Table

from arriero.cli.torture.harness import KILL_KINDS, KillHarness, KillResults
from arriero.cli.torture.outcome import MIDDLE_STEP, Outcome
from arriero.common.errors import EXIT_OK, CheckFailed, UserError
from arriero.common.files import make_directory
from arriero.common.ranges import PathText


@dataclass(frozen=True)
class TortureArgs:
    """Kill a small run again and again; exit code 0 if its final SHA-256 never changed, 1 if it did."""

    recipe: tyro.conf.Positional[Annotated[str, PathText]] = ""
    """Whose model and layout to use, at reduced width; by default a small model on 2 x tensor and 2 x data parallel."""
    processes: Annotated[int, Interval(ge=0, le=4096)] = 0
    """Processes of a run; 0 takes as many as the layout's model-parallel ranks, twice."""
    kills: Annotated[int, Interval(ge=1, le=1_000_000)] = 20
    """How many times something is killed."""
    seed: Annotated[int, Interval(ge=0, lt=2**32)] = 0
    """Decides what is killed, and when."""
    out: Annotated[str, PathText] = ""
    """Where to leave the runs; by default they are removed."""
    json: bool = False
    """Print the result as JSON."""


def run(args: TortureArgs) -> int:
    """Runs the harness and prints its results; returns the exit code."""
    root = Path(args.out or tempfile.mkdtemp(prefix="arriero-torture-"))
    if args.out and root.exists() and any(root.iterdir()):
        raise UserError(f"{root}: is not empty", "name a directory that is new")
    make_directory(root, "name a directory that can be written with --out")
    try:
        harness = KillHarness(root, recipe=args.recipe, processes=args.processes, kills=args.kills, seed=args.seed)
        began = time.monotonic()
        undisturbed = harness.run_undisturbed()
        results = harness.run_with_kills()
        others = harness.resume_under_other_layouts()
        return report(args, undisturbed, results, others, time.monotonic() - began)
    finally:
        if not args.out:
            shutil.rmtree(root, ignore_errors=True)


def report(
    args: TortureArgs, undisturbed: Outcome, results: KillResults, others: dict[str, float], seconds: float
) -> int:
    """Prints the results; raises CheckFailed if a run's outcome differs from the undisturbed run's."""
    from arriero.train.verify_layout import MAX_RELATIVE_DIFFERENCE

    wrong = sum(end != undisturbed for end in results.outcomes)
    same_elsewhere = all(value <= MAX_RELATIVE_DIFFERENCE for value in others.values())
    facts = {
        "kills": dict(results.kills), "resumes": results.resumes, "lost steps": results.lost_steps,
        "runs completed": results.runs, "runs that ended otherwise": wrong, "sha256": undisturbed[0],
        "other layouts": others, "seconds": round(seconds, 1),
    }  # fmt: skip
    if args.json:
        print(json.dumps(facts, indent=1))
    else:
        table = Table("killed", "times", box=None)
        for kind, text in KILL_KINDS.items():
            table.add_row(text, str(results.kills[kind]))
        console = Console(soft_wrap=True)
        console.print(table)
        print(f"{results.kills.total()} kills, {results.resumes} new starts, {results.lost_steps} steps done twice, "
              f"{results.runs} runs completed in {seconds:.0f} s")  # fmt: skip
        for name, value in others.items():
            print(f"resumed from step {MIDDLE_STEP} on {name}: final state within {value:.1e}")
        print(f"final SHA-256 {undisturbed[0]}: {'never changed' if not wrong else f'CHANGED in {wrong} runs'}")
    if wrong or not same_elsewhere:
        limit = f"{MAX_RELATIVE_DIFFERENCE:g}"
        raise CheckFailed(f"{wrong} of {results.runs} runs ended otherwise; other layouts: {others}, limit {limit}")
    return EXIT_OK
