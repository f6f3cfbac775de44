"""The learning rate: a pure function of the step.

Warm-up is common to all schedules; what follows is a function of the table `SCHEDULES` (train/config.py), by the name
in `schedule.shape`. It returns the rate of update `step`, given where warm-up and decay end:

    def rate(config: ScheduleConfig, step: int, warmup: int, end: int) -> float
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields

from arriero.train.config import SCHEDULES, ScheduleConfig


def learning_rate(config: ScheduleConfig, step: int, steps: int) -> float:
    """The rate of update `step` (from 0) in a run of `steps`.

    Warm-up reaches `lr` with its last step and never wastes the first one at rate 0: update i of w has lr (i + 1) / w.
    """
    end = config.decay_steps or steps
    warmup = config.warmup_steps or round(config.warmup_fraction * end)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    return SCHEDULES.get(config.shape)(config, step, warmup, end)


def constant(config: ScheduleConfig, step: int, warmup: int, end: int) -> float:
    """`lr` to the end."""
    return config.lr


def cosine(config: ScheduleConfig, step: int, warmup: int, end: int) -> float:
    """Half a cosine from `lr` to `min_lr`."""
    return decayed(config, step, warmup, end, lambda progress: 0.5 * (1 + math.cos(math.pi * progress)))


def linear(config: ScheduleConfig, step: int, warmup: int, end: int) -> float:
    """A straight line from `lr` to `min_lr`."""
    return decayed(config, step, warmup, end, lambda progress: 1 - progress)


def wsd(config: ScheduleConfig, step: int, warmup: int, end: int) -> float:
    """Warm-up, stable, decay (arXiv:2404.06395): constant, then linear over the last `wsd_decay_fraction`."""
    start = max(warmup, end - round(config.wsd_decay_fraction * end))
    return linear(config, step, start, end)


def decayed(config: ScheduleConfig, step: int, start: int, end: int, curve: Callable[[float], float]) -> float:
    """`lr` until `start`, then min_lr + (lr - min_lr) curve(progress), where progress goes from 0 to 1 at `end`."""
    if step < start:
        return config.lr
    progress = min(1.0, (step - start) / (end - start)) if end > start else 1.0
    return config.min_lr + (config.lr - config.min_lr) * curve(progress)


def describe_rate_change(then: ScheduleConfig, before: int, now: ScheduleConfig, steps: int, *, done: int) -> str:
    """One line on how the learning rate of a resumed run departs from the curve that the run had; empty if it does not.

    Args:
        then, before: the schedule and the number of steps of the run that wrote the checkpoint.
        now, steps: those of the run that goes on.
        done: steps completed.
    """
    last = max(done + 1, min(before, steps))
    sampled = sorted({*range(done, last, max(1, (last - done) // 1000)), last - 1})
    at = next((i for i in sampled if learning_rate(now, i, steps) != learning_rate(then, i, before)), None)
    if at is None:
        return ""
    changed = [f.name for f in fields(then) if getattr(then, f.name) != getattr(now, f.name)]
    ends = ""
    if not then.decay_steps and not now.decay_steps and before != steps:
        changed.append("decay_steps")
        ends = f"; the decay ends with step {steps}, and ended with step {before}"
    old, new = learning_rate(then, at, before), learning_rate(now, at, steps)
    moves = f"to {new:.3E} in step {at + 1}, where it would have been {old:.3E}"
    if at == done and done:
        moves = f"from {learning_rate(then, done - 1, before):.3E} in step {done} {moves}"
    keep = " ".join(f"--schedule.{name} {getattr(then, name) or before * (name == 'decay_steps')}" for name in changed)
    allow = " --allow-change schedule.decay_steps" if "decay_steps" in changed and not then.decay_steps else ""
    return f"the learning rate moves {moves}{ends}; the old curve stays with {keep}{allow}"
