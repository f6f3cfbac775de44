"""`arriero compare A B`: do two runs have the same loss and gradient norm?"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from annotated_types import Interval
from rich.console import Console
from rich.table import Table
from tyro.conf import Positional, arg

from arriero.cli.compare.report import FIGURE, HTML, MARKDOWN, as_json, rows, sentences, write_report
from arriero.common.errors import EXIT_CHECK_FAILED, EXIT_OK
from arriero.common.text import escape
from arriero.observe.compare import DEFAULT_QUANTITIES, Comparison, compare_runs
from arriero.observe.curves.curve import canonical_name
from arriero.observe.curves.read import read_curves


@dataclass(frozen=True)
class CompareArgs:
    """Compare two runs step by step: exit code 0 if they agree, 1 if not, 2 if they cannot be compared."""

    a: Annotated[Positional[Path], arg(metavar="A")]
    """The reference: a run, or a log of another system (docs/compare.md lists those that are read)."""
    b: Annotated[Positional[Path], arg(metavar="B")]
    """The run to compare with it, in any of the same forms."""
    max_rel: Annotated[float, Interval(ge=0, le=1e6)] = 0.02
    """The greatest relative error |b - a| / |a| allowed at any common iteration; 0 asks for equality bit for bit."""
    quantity: tuple[str, ...] = ()
    """What to compare, such as lm_loss grad_norm validation_loss; unset: loss, and gradient norm where both have it."""
    logging_steps: Annotated[int, Interval(ge=0, le=1_000_000_000)] = 0
    """Steps between two lines of a log whose lines name no step, as Hugging Face's Trainer prints them."""
    out: Path | None = None
    """A directory for the figure (compare.png) and the report (compare.md, compare.html)."""
    json: bool = False
    """Print the result as JSON."""


def run(args: CompareArgs) -> int:
    """Reads, compares, prints, and writes the report where one is asked for; returns the exit code."""
    wanted = {*DEFAULT_QUANTITIES, *map(canonical_name, args.quantity)}
    a, b = read_curves(args.a, wanted), read_curves(args.b, wanted)
    verdict = compare_runs(a, b, quantities=args.quantity, max_rel=args.max_rel, logging_steps=args.logging_steps)
    if args.out is not None:
        write_report(verdict, args.out)
    if args.json:
        print(json.dumps(as_json(verdict), indent=2))
    else:
        _print(verdict, args)
    return EXIT_OK if verdict.passed else EXIT_CHECK_FAILED


def _print(verdict: Comparison, args: CompareArgs) -> None:
    console = Console(highlight=False, soft_wrap=True, markup=False)
    console.print(f"A (reference)  {escape(verdict.a.path)}\nB              {escape(verdict.b.path)}\n")
    header, *body = rows(verdict)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for i, name in enumerate(header):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    for row in body:
        table.add_row(*row)
    console.print(table)
    if found := sentences(verdict):
        console.print()
    for sentence in found:
        console.print(f"- {sentence}", soft_wrap=False)
    if args.out is not None:
        console.print(
            f"\nreport: {escape(args.out / MARKDOWN)}, {escape(args.out / HTML)}\nfigure: {escape(args.out / FIGURE)}"
        )
    style = "bold green" if verdict.passed else "bold red"
    console.print(f"\n{'pass' if verdict.passed else 'FAIL'}", style=style, end="")
    hint = "" if args.out is not None else " (--out DIR writes a figure and a report)"
    console.print(hint)
