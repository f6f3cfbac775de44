"""What a comparison looks like: a table for the terminal, JSON, a figure, and a report in Markdown and HTML."""

from __future__ import annotations

import base64
import html
import math
import os
import shlex
from pathlib import Path
from typing import Any

from arriero.compare.judge import Agreement, Verdict
from arriero.observe.figure import BLUE, INK, ORANGE, RED, new_figure, save_figure

FIGURE, MARKDOWN, HTML = "compare.png", "compare.md", "compare.html"


def rows(verdict: Verdict) -> list[list[str]]:
    """The result as a table: a statistic a row, a quantity a column, a header first."""
    found = [_statistics(x) for x in verdict.agreements]
    names = list(found[0])
    return [["", *(x.quantity for x in verdict.agreements)], *([name, *(f[name] for f in found)] for name in names)]


def sentences(verdict: Verdict) -> list[str]:
    """Why it failed, then the notes, one sentence each."""
    lines = []
    for x in verdict.agreements:
        beyond = [i for i, error in zip(x.iterations, x.relative, strict=True) if error > x.limit]
        count = len(x.iterations) + len(x.one_sided) + len(x.both_non_finite)
        for found, what in (
            (beyond, "beyond the limit"),
            (x.one_sided, "finite in one run only"),
            (x.both_non_finite, "not finite in either, so left out of the errors"),
        ):
            if found:
                lines.append(f"{x.quantity}: {len(found)} of {count} steps {what}, the first at {found[0]}.")
        if not x.iterations:
            lines.append(f"{x.quantity}: no step where both are finite, so nothing was compared.")
    if not verdict.passed and all(x.passed for x in verdict.agreements if x.quantity == "lm_loss"):
        lines.append("To judge the loss alone: --quantity lm_loss")
    return lines + verdict.notes


def as_json(verdict: Verdict) -> dict[str, Any]:
    """The result for a machine; infinite errors are null."""
    return {
        "passed": verdict.passed,
        "a": str(verdict.a.path),
        "b": str(verdict.b.path),
        "quantities": {x.quantity: _as_json(x) for x in verdict.agreements},
        "notes": verdict.notes,
    }


def write_report(verdict: Verdict, directory: Path) -> None:
    """Writes the figure, the Markdown and the HTML page (one file, the figure inside) to `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    save_figure(_figure(verdict), directory / FIGURE)
    _write(directory / MARKDOWN, _markdown(verdict))
    _write(directory / HTML, _html(verdict, (directory / FIGURE).read_bytes()))


def _statistics(x: Agreement) -> dict[str, str]:
    empty = not x.iterations
    worst = "-" if empty else str(x.iterations[x.worst(1)[0]])
    return {
        "steps compared": str(len(x.iterations)),
        "absolute error, mean": "-" if empty else f"{_mean(x.absolute):.3g}",
        "absolute error, max": "-" if empty else f"{max(x.absolute):.3g}",
        "relative error, mean": "-" if empty else f"{_mean(x.relative):.3g}",
        "relative error, max": "-" if empty else f"{max(x.relative):.3g}",
        "  at iteration": worst if empty or max(x.relative) else "-",
        "limit": f"{x.limit:g}",
        "verdict": "pass" if x.passed else "FAIL",
    }


def _as_json(x: Agreement) -> dict[str, Any]:
    empty = not x.iterations
    return {
        "passed": x.passed,
        "max_rel_limit": x.limit,
        "steps": len(x.iterations),
        "mean_absolute": None if empty else _mean(x.absolute),
        "max_absolute": None if empty else max(x.absolute),
        "mean_relative": None if empty or math.isinf(_mean(x.relative)) else _mean(x.relative),
        "max_relative": None if empty or math.isinf(max(x.relative)) else max(x.relative),
        "max_relative_at": None if empty or not max(x.relative) else x.iterations[x.worst(1)[0]],
        "finite_in_one_only": x.one_sided,
        "non_finite_in_both": x.both_non_finite,
    }


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def _drawn(values: list[float]) -> list[float]:
    """Without what no axis can hold."""
    return [value if abs(value) < 1e100 else math.nan for value in values]


def _figure(verdict: Verdict) -> Any:
    """A row for each quantity: the two curves at the left, the relative error and its limit at the right."""
    figure, axes = new_figure(rows=len(verdict.agreements), columns=2, width=11, height=3.4 * len(verdict.agreements))
    a, b = _labels(verdict)
    for i, x in enumerate(verdict.agreements):
        left, right = axes[2 * i], axes[2 * i + 1]
        dot = "." if len(x.iterations) <= 50 else None
        left.plot(x.iterations, _drawn(x.a), color=BLUE, linewidth=2.4, alpha=0.55, label=f"A: {a}", marker=dot)
        left.plot(x.iterations, _drawn(x.b), color=ORANGE, linewidth=1.1, label=f"B: {b}", marker=dot)
        left.set_ylabel(x.quantity)
        shown = [(i, e) for i, e in zip(x.iterations, x.relative, strict=True) if 0 < e < math.inf]
        if shown:
            equal = x.relative.count(0.0)  # a logarithmic axis has no place for them
            label = f"{equal} equal steps are not drawn" if equal else None
            right.semilogy(*zip(*shown, strict=True), color=INK, linewidth=0.9, marker=dot, label=label)
        else:
            text = "identical at every step" if x.passed else "no step to compare"
            right.text(0.5, 0.5, text, ha="center", va="center", transform=right.transAxes, fontsize=11, color=INK)
        if x.limit > 0:
            right.axhline(x.limit, color=RED, linewidth=1.2, linestyle="--", label=f"limit {x.limit:g}")
        if right.get_legend_handles_labels()[0]:
            right.legend(frameon=False, fontsize=9)
        if x.one_sided:
            foot, label = left.get_xaxis_transform(), f"finite in one only ({len(x.one_sided)})"
            left.plot(x.one_sided, [0.02] * len(x.one_sided), "x", color=RED, transform=foot, label=label)
        left.legend(frameon=False, fontsize=9)
        right.set_ylabel("relative error")
        errors = f"mean {_mean(x.relative):.2g}, max {max(x.relative):.2g}: " if x.iterations else ""
        right.set_title(f"|B - A| / |A|, {errors}{'pass' if x.passed else 'FAIL'}", loc="left", fontsize=10)
    for bottom in axes[-2:]:
        bottom.set_xlabel("iteration")
    return figure


def _labels(verdict: Verdict) -> tuple[str, str]:
    """The shortest ends of the two paths that tell them apart."""
    a, b = ((x.path.parent if x.path.name == "metrics.jsonl" else x.path) for x in (verdict.a, verdict.b))
    for depth in range(1, max(len(a.parts), len(b.parts)) + 1):
        short = [str(Path(*path.parts[-depth:])) for path in (a, b)]
        if short[0] != short[1]:
            return short[0], short[1]
    return a.name, b.name


def _markdown(verdict: Verdict) -> str:
    header, *body = rows(verdict)
    lines = [
        f"# Comparison: {'pass' if verdict.passed else 'FAIL'}",
        "",
        f"- A (reference): `{verdict.a.path}`",
        f"- B: `{verdict.b.path}`",
        "",
        "| " + " | ".join(header) + " |",
        "| --- |" + " ---: |" * (len(header) - 1),
        *("| " + " | ".join(cell.strip() for cell in row) + " |" for row in body),
        "",
        *(f"- {sentence}" for sentence in sentences(verdict)),
        "",
        f"![A and B, and their relative error]({FIGURE})",
        "",
    ]
    for x in verdict.agreements:
        lines += [f"## {x.quantity}: the steps furthest apart", "", "| iteration | A | B | relative error |"]
        lines += ["| ---: | ---: | ---: | ---: |"]
        lines += [f"| {x.iterations[i]} | {x.a[i]:.8g} | {x.b[i]:.8g} | {x.relative[i]:.3g} |" for i in x.worst(5)]
        lines += [""]
    again = " ".join(shlex.quote(str(p)) for p in (verdict.a.path, verdict.b.path))
    limit = verdict.agreements[0].limit
    named = " ".join(x.quantity for x in verdict.agreements)
    lines += [
        "Relative error is |B - A| / |A| at the same iteration; a run passes if it is within the limit at every one.",
        "To see it again:",
        "",
        f"    arriero compare {again} --max-rel {limit:g} --quantity {named}",
        "",
    ]
    return "\n".join(lines)


def _html(verdict: Verdict, png: bytes) -> str:
    header, *body = rows(verdict)
    cells = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>\n" for row in body)
    titles = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    notes = "".join(f"<li>{html.escape(sentence)}</li>\n" for sentence in sentences(verdict))
    word = "pass" if verdict.passed else "FAIL"
    a, b = (html.escape(str(curves.path)) for curves in (verdict.a, verdict.b))
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Comparison: {word}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: {INK}; }}
td, th {{ padding: .2rem 1rem; text-align: right; }} td:first-child {{ text-align: left; }} img {{ max-width: 100%; }}
</style>
<h1>Comparison: {word}</h1>
<p>A (reference): <code>{a}</code><br>B: <code>{b}</code></p>
<table><tr>{titles}</tr>
{cells}</table>
<ul>{notes}</ul>
<img alt="A and B, and their relative error" src="data:image/png;base64,{base64.b64encode(png).decode()}">
</html>
"""


def _write(path: Path, text: str) -> None:
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)
