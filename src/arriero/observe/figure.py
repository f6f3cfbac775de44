"""The figure of a run: training loss, its running mean, and the validations. Drawing imports matplotlib, no sooner."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from operator import mul
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arriero.common.errors import UserError
from arriero.common.files import make_directory, write_atomic
from arriero.common.untrusted import schema_problem
from arriero.observe.metrics import iterate_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, BLUE, ORANGE, RED = (
    "#333333",
    "#2b6cb0",
    "#dd6b20",
    "#c53030",
)  # distinct for colour-blind readers, and in grey print

LOSS_SCHEMA = {"iteration": int, "lm_loss": float}
STEP_SCHEMA = {**LOSS_SCHEMA, "consumed_tokens": int}
_DRAWN_KEYS = (*STEP_SCHEMA, "global_batch", "sequence_length")


def loss_figure(metrics_path: Path, png_path: Path, *, title: str = "") -> None:
    """Draws `metrics.jsonl` to a PNG: train and validation loss over iterations, tokens on the upper axis.

    Raises:
        UserError: the metrics hold no step, or cannot be read.
    """
    steps, checks = [], []
    for record in iterate_metrics(metrics_path, skipped=[]):
        drawn = {key: record[key] for key in _DRAWN_KEYS if key in record}  # a long run has a hundred MB of the others
        if record.get("kind") == "step" and not schema_problem(record, STEP_SCHEMA):
            steps.append(drawn)
        elif (
            record.get("kind") == "validation"
            and not schema_problem(record, LOSS_SCHEMA)
            and math.isfinite(drawn["lm_loss"])
        ):
            checks.append(drawn)
    if not steps:
        raise UserError(f"{metrics_path}: no training step in it", "draw the figure after the first step")
    figure, (axes,) = new_figure(height=4.5)
    _draw_training(axes, steps)
    if checks:
        last = checks[-1]["lm_loss"]
        axes.plot(*_xy(checks), "o-", color=ORANGE, markersize=4.5, label=f"validation, last {last:.4g}")
    axes.set_xlabel("iteration")
    axes.set_ylabel("loss (nats per token)")
    axes.legend(frameon=False)
    if title:
        axes.set_title(title, loc="left", fontsize=11)
    per_step = steps[-1]["consumed_tokens"] / max(1, steps[-1]["iteration"])
    if per_step > 0:
        unit, name = (1e9, "billion") if steps[-1]["consumed_tokens"] >= 1e9 else (1e6, "million")
        upper = axes.secondary_xaxis("top", functions=_tokens_of(steps, unit))
        upper.set_xlabel(f"tokens ({name})", fontsize=9)
        upper.spines["top"].set_visible(False)
    save_figure(figure, png_path)


def _tokens_of(steps: list[dict[str, Any]], unit: float) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """Tokens of an iteration, in units, and back. Where the batch was changed this is no straight line."""
    first, last = steps[0], steps[-1]
    ratio = last["consumed_tokens"] / last["iteration"] / unit
    straight = partial(mul, ratio), partial(mul, 1 / ratio)
    points = [(r["iteration"], r["consumed_tokens"] / unit) for r in steps]
    rises = all(a[0] < b[0] and a[1] < b[1] for a, b in pairwise(points))
    if not rises or all(math.isclose(tokens, ratio * at) for at, tokens in points):
        return straight
    import numpy as np

    # The axis reaches beyond the steps on both sides: there the line goes on as in the first and the last step.
    span = last["iteration"]
    low, high = (r["global_batch"] * r["sequence_length"] / unit for r in (first, last))
    ends = (points[0][0] - span, points[0][1] - low * span), (points[-1][0] + span, points[-1][1] + high * span)
    points = [ends[0], *points, ends[1]]
    at, tokens = (np.array(column, float) for column in zip(*points, strict=True))
    return lambda x: np.interp(x, at, tokens), lambda x: np.interp(x, tokens, at)


def new_figure(*, rows: int = 1, columns: int = 1, width: float = 8, height: float) -> tuple[Figure, list[Axes]]:
    """An empty figure in the common style (inches), its axes row by row; drawn off screen, without global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=144, layout="constrained")
    FigureCanvasAgg(figure)
    grid = list(figure.subplots(rows, columns, sharex=True, squeeze=False).flat)
    for axes in grid:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.tick_params(labelsize=9)
    return figure, grid


def save_figure(figure: Figure, png_path: Path) -> None:
    """Writes the PNG all at once, so that a reader never sees half a picture. Raises OSError or UserError."""
    make_directory(png_path.parent, "name a directory that can be written")
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write_atomic(png_path, picture.getvalue())


def _draw_training(axes: Axes, steps: list[dict[str, Any]]) -> None:
    """The loss of each step thin, its running mean over 2% of the run thick, non-finite steps marked at the foot."""
    good = [r for r in steps if math.isfinite(r["lm_loss"])]
    bad = [r["iteration"] for r in steps if not math.isfinite(r["lm_loss"])]
    if good:
        x, y = _xy(good)
        window = max(1, len(y) // 50)
        last = _running_mean(y, window)[-1]
        axes.plot(x, y, color=BLUE, linewidth=0.8, alpha=0.4 if window > 1 else 1.0)
        axes.plot(x, _running_mean(y, window), color=BLUE, linewidth=1.6, label=f"training, last {last:.4g}")
    if bad:
        foot = axes.get_xaxis_transform()
        label = f"non-finite loss ({len(bad)} steps)"
        axes.plot(bad, [0.02] * len(bad), "x", color=RED, transform=foot, clip_on=False, label=label)


def _xy(records: list[dict[str, Any]]) -> tuple[list[int], list[float]]:
    return [r["iteration"] for r in records], [r["lm_loss"] for r in records]


def _running_mean(values: list[float], window: int) -> list[float]:
    """Mean of the values at most `window` // 2 steps away, so that the curve does not lag behind the loss."""
    half, sums = window // 2, [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    ends = [(max(0, i - half), min(len(values), i + half + 1)) for i in range(len(values))]
    return [(sums[end] - sums[start]) / (end - start) for start, end in ends]
