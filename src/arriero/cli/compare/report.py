"""What a comparison looks like: a table for the terminal, JSON, a figure, and a report in Markdown and HTML."""

from __future__ import annotations

import base64
import html
import math
import re
import shlex
import warnings
from pathlib import Path
from typing import Any

from arriero.common.errors import UserError
from arriero.common.files import make_directory, os_error_text, write_atomic
from arriero.common.text import escape
from arriero.observe.compare import Comparison, QuantityComparison
from arriero.observe.figure import BLUE, INK, ORANGE, RED, new_figure, save_figure

FIGURE, MARKDOWN, HTML = "compare.png", "compare.md", "compare.html"


def rows(verdict: Comparison) -> list[list[str]]:
    """The result as a table: a statistic a row, a quantity a column, a header first."""
    found = [_statistics(x) for x in verdict.agreements]
    names = list(found[0])
    return [["", *(x.quantity for x in verdict.agreements)], *([name, *(f[name] for f in found)] for name in names)]


def sentences(verdict: Comparison) -> list[str]:
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
        lines.append("To compare the loss alone: --quantity lm_loss")
    return lines + verdict.notes


def as_json(verdict: Comparison) -> dict[str, Any]:
    """The result for a machine; infinite errors are null."""
    return {
        "passed": verdict.passed,
        "a": str(verdict.a.path),
        "b": str(verdict.b.path),
        "read_as": {"a": verdict.a.kind, "b": verdict.b.kind},
        "quantities": {x.quantity: _as_json(x) for x in verdict.agreements},
        "notes": verdict.notes,
    }


def write_report(verdict: Comparison, directory: Path) -> None:
    """Writes the figure, the Markdown and the HTML page (one file, the figure inside) to `directory`.

    Raises:
        UserError: the directory or a file in it cannot be written.
    """
    fix = "name a directory that can be written with --out"
    make_directory(directory, fix)
    try:
        _draw(verdict, directory / FIGURE)
        write_atomic(directory / MARKDOWN, _markdown(verdict))
        write_atomic(directory / HTML, _html(verdict, (directory / FIGURE).read_bytes()))
    except OSError as error:
        raise UserError(f"{escape(directory)}: the report cannot be written ({os_error_text(error)})", fix) from None


_PLAIN = re.compile(r"[A-Za-z/](?:[A-Za-z0-9 ./,:%()+-]|(?<=[A-Za-z0-9])_(?=[A-Za-z0-9]))*")


def markdown(text: object) -> str:
    """Foreign text inside Markdown, on one line; punctuation is put behind a backslash where any could be markup."""
    line = escape(text, 2000)
    if _PLAIN.fullmatch(line) and "www." not in line and "://" not in line:
        return line
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", line)


def shell(path: Path) -> str:
    """A path as one word of a command for bash: `$'...'` where it holds characters that are not shown as they are."""
    text = str(path)
    if text.startswith("-"):
        text = f"./{text}"
    if escape(text, max_length=len(text)) == text:
        return shlex.quote(text)
    raw = text.encode("utf-8", "surrogateescape")
    return "$'" + "".join(chr(b) if 32 <= b < 127 and b not in b"\\'" else f"\\x{b:02x}" for b in raw) + "'"


def _statistics(x: QuantityComparison) -> dict[str, str]:
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


def _as_json(x: QuantityComparison) -> dict[str, Any]:
    empty = not x.iterations
    return {
        "passed": x.passed,
        "max_rel_limit": x.limit,
        "steps": len(x.iterations),
        "mean_absolute": None if empty else _finite(_mean(x.absolute)),
        "max_absolute": None if empty else _finite(max(x.absolute)),
        "mean_relative": None if empty else _finite(_mean(x.relative)),
        "max_relative": None if empty else _finite(max(x.relative)),
        "max_relative_at": None if empty or not max(x.relative) else x.iterations[x.worst(1)[0]],
        "finite_in_one_only": x.one_sided,
        "non_finite_in_both": x.both_non_finite,
    }


def _mean(values: list[float]) -> float:
    try:
        return math.fsum(values) / len(values)
    except OverflowError:
        return math.inf


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _drawn(values: list[float]) -> list[float]:
    """Without what no axis can hold."""
    return [value if abs(value) < 1e100 else math.nan for value in values]


def _draw(verdict: Comparison, path: Path) -> None:
    import matplotlib

    with matplotlib.rc_context({"agg.path.chunksize": 10_000}), warnings.catch_warnings():  # long curves in pieces
        warnings.simplefilter("ignore")  # characters that the font lacks, numbers that no axis can hold
        save_figure(_figure(verdict), path)


def _label(text: str) -> str:
    """Text for a figure: no formula between dollar signs, no control characters, not wider than the picture."""
    return escape(text, 60).replace("\\", "/").replace("$", r"\$")


def _figure(verdict: Comparison) -> Any:
    """A row for each quantity: the two curves at the left, the relative error and its limit at the right."""
    figure, axes = new_figure(rows=len(verdict.agreements), columns=2, width=11, height=3.4 * len(verdict.agreements))
    a, b = map(_label, _labels(verdict))
    for i, x in enumerate(verdict.agreements):
        left, right = axes[2 * i], axes[2 * i + 1]
        dot = "." if len(x.iterations) <= 50 else None
        left.plot(x.iterations, _drawn(x.a), color=BLUE, linewidth=2.4, alpha=0.55, label=f"A: {a}", marker=dot)
        left.plot(x.iterations, _drawn(x.b), color=ORANGE, linewidth=1.1, label=f"B: {b}", marker=dot)
        left.set_ylabel(_label(x.quantity))
        drawn = [(i, e) for i, e in zip(x.iterations, x.relative, strict=True) if 1e-100 < e < 1e100]
        if drawn:
            equal = x.relative.count(0.0)  # a logarithmic axis has no place for them
            label = f"{equal} equal steps are not drawn" if equal else None
            right.semilogy(*zip(*drawn, strict=True), color=INK, linewidth=0.9, marker=dot, label=label)
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


def _labels(verdict: Comparison) -> tuple[str, str]:
    """The shortest ends of the two paths that differ."""
    a, b = ((x.path.parent if x.path.name == "metrics.jsonl" else x.path) for x in (verdict.a, verdict.b))
    for depth in range(1, max(len(a.parts), len(b.parts)) + 1):
        short = [str(Path(*path.parts[-depth:])) for path in (a, b)]
        if short[0] != short[1]:
            return short[0], short[1]
    return a.name, b.name


def _markdown(verdict: Comparison) -> str:
    header, *body = rows(verdict)
    lines = [
        f"# Comparison: {'pass' if verdict.passed else 'FAIL'}",
        "",
        f"- A (reference): {markdown(verdict.a.path)}, read as {markdown(verdict.a.kind)}",
        f"- B: {markdown(verdict.b.path)}, read as {markdown(verdict.b.kind)}",
        "",
        "| " + " | ".join(map(markdown, header)) + " |",
        "| --- |" + " ---: |" * (len(header) - 1),
        *("| " + " | ".join(cell.strip() for cell in row) + " |" for row in body),
        "",
        *(f"- {markdown(sentence)}" for sentence in sentences(verdict)),
        "",
        f"![A and B, and their relative error]({FIGURE})",
        "",
    ]
    for x in verdict.agreements:
        lines += [f"## {markdown(x.quantity)}: the steps furthest apart", "", "| iteration | A | B | relative error |"]
        lines += ["| ---: | ---: | ---: | ---: |"]
        lines += [f"| {x.iterations[i]} | {x.a[i]:.8g} | {x.b[i]:.8g} | {x.relative[i]:.3g} |" for i in x.worst(5)]
        lines += [""]
    again = f"{shell(verdict.a.path)} {shell(verdict.b.path)}"
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


def _html(verdict: Comparison, png: bytes) -> str:
    header, *body = rows(verdict)
    cells = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>\n" for row in body)
    titles = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    notes = "".join(f"<li>{html.escape(sentence)}</li>\n" for sentence in sentences(verdict))
    word = "pass" if verdict.passed else "FAIL"
    a, b = (
        f"<code>{html.escape(escape(c.path))}</code>, read as {html.escape(c.kind)}" for c in (verdict.a, verdict.b)
    )
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Comparison: {word}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: {INK}; }}
td, th {{ padding: .2rem 1rem; text-align: right; }} td:first-child {{ text-align: left; }} img {{ max-width: 100%; }}
</style>
<h1>Comparison: {word}</h1>
<p>A (reference): {a}<br>B: {b}</p>
<table><tr>{titles}</tr>
{cells}</table>
<ul>{notes}</ul>
<img alt="A and B, and their relative error" src="data:image/png;base64,{base64.b64encode(png).decode()}">
</html>
"""
