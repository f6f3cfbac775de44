"""The learning rate: a pure function of the step."""

from __future__ import annotations

import math
from dataclasses import fields

from arriero.train.config import ScheduleConfig


def learning_rate(config: ScheduleConfig, step: int, steps: int) -> float:
    """The rate of update `step` (from 0) in a run of `steps`.

    Warm-up reaches `lr` with its last step and never wastes the first one at rate 0: update i of w has lr (i + 1) / w.
    """
    end = config.decay_steps or steps
    warmup = config.warmup_steps or round(config.warmup_fraction * end)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.shape == "constant":
        return config.lr
    start = warmup
    if config.shape == "wsd":
        start = max(warmup, end - round(config.wsd_decay_fraction * end))
    if step < start:
        return config.lr
    progress = min(1.0, (step - start) / (end - start)) if end > start else 1.0
    left = 1 - progress if config.shape != "cosine" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.min_lr + (config.lr - config.min_lr) * left


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
