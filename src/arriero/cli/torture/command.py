"""`arriero torture`: a run is killed again and again, wherever a run can die, and must end as if never touched.

The recipe is trained at reduced width on the CPU, once in peace and then under fire. Whatever is killed is started
again with the same command line. In the end the SHA-256 of weights and moments, and the loss of every step, must be
those of the peaceful run; and a checkpoint of the tortured run must give the same numbers under other layouts.
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

from arriero.cli.torture.outcome import EVERY, STEPS, Outcome
from arriero.cli.torture.rack import KINDS, Rack, Tally
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
    """Runs the torture and prints what came of it."""
    root = Path(args.out or tempfile.mkdtemp(prefix="arriero-torture-"))
    if args.out and root.exists() and any(root.iterdir()):
        raise UserError(f"{root}: is not empty", "name a directory that is new")
    make_directory(root, "name a directory that can be written with --out")
    try:
        rack = Rack(root, recipe=args.recipe, processes=args.processes, kills=args.kills, seed=args.seed)
        began = time.monotonic()
        peace = rack.in_peace()
        tally = rack.under_fire()
        others = rack.under_other_layouts()
        return report(args, peace, tally, others, time.monotonic() - began)
    finally:
        if not args.out:
            shutil.rmtree(root, ignore_errors=True)


def report(args: TortureArgs, peace: Outcome, tally: Tally, others: dict[str, float], seconds: float) -> int:
    """Prints the verdict; raises CheckFailed if a run ended otherwise than in peace."""
    from arriero.train.verify_layout import MAX_RELATIVE_DIFFERENCE

    wrong = sum(end != peace for end in tally.ends)
    same_elsewhere = all(value <= MAX_RELATIVE_DIFFERENCE for value in others.values())
    facts = {
        "kills": dict(tally.kills), "resumes": tally.resumes, "lost steps": tally.lost_steps,
        "runs completed": tally.runs, "runs that ended otherwise": wrong, "sha256": peace[0],
        "other layouts": others, "seconds": round(seconds, 1),
    }  # fmt: skip
    if args.json:
        print(json.dumps(facts, indent=1))
    else:
        table = Table("killed", "times", box=None)
        for kind, text in KINDS.items():
            table.add_row(text, str(tally.kills[kind]))
        console = Console(soft_wrap=True)
        console.print(table)
        print(f"{tally.kills.total()} kills, {tally.resumes} new starts, {tally.lost_steps} steps done twice, "
              f"{tally.runs} runs completed in {seconds:.0f} s")  # fmt: skip
        for name, value in others.items():
            print(f"resumed from step {EVERY * (STEPS // EVERY // 2)} on {name}: final state within {value:.1e}")
        print(f"final SHA-256 {peace[0]}: {'never changed' if not wrong else f'CHANGED in {wrong} runs'}")
    if wrong or not same_elsewhere:
        raise CheckFailed(
            f"{wrong} of {tally.runs} runs ended otherwise; other layouts: {others}, limit {MAX_RELATIVE_DIFFERENCE:g}"
        )
    return EXIT_OK
