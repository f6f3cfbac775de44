"""The training loop: it reads from top to bottom. What a step does is in trainer.py."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

from arriero.checkpoint.find import committed
from arriero.checkpoint.save import SaveResult, raise_if_last_save_failed
from arriero.checkpoint.verify import newest_intact_checkpoint
from arriero.common.device import device_name, has_float8_units
from arriero.common.errors import UserError
from arriero.common.signals import Phase, set_phase, stop_requested
from arriero.common.text import escape
from arriero.distributed.launch.worker import seconds_since_start
from arriero.distributed.parallel.mesh import Ranks
from arriero.observe.events import Events, goodput_line
from arriero.observe.profile import Profile
from arriero.train.garbage import manual_gc
from arriero.train.recipe import Recipe
from arriero.train.reporter import Reporter, StepResult
from arriero.train.schedule import describe_rate_change
from arriero.train.trainer import Trainer, recipe_of
from arriero.train.watch import StragglerDetector, Watchdog


@dataclass(frozen=True)
class ResumePlan:
    """Where a start of a run begins, and when it ends early."""

    checkpoints: tuple[Path, ...] = ()
    """From which to go on, the best first; none to begin."""
    notices: tuple[str, ...] = field(default=())
    """Lines for the log, such as what has changed since the checkpoint."""
    stop_after: float = 0.0
    """Seconds after which to save and stop; 0 for never."""


def train(recipe: Recipe, ranks: Ranks, *, local_rank: int, device_kind: str, start: ResumePlan) -> bool:
    """Runs a recipe to its last step, from the start or from a checkpoint; returns whether it got there.

    A signal or `start.stop_after` ends it after the present step, with a checkpoint.

    Raises:
        UserError: a non-finite step where the recipe says to stop, no checkpoint that is whole, or the last one failed.
    """
    trainer = Trainer(recipe, ranks, local_rank=local_rank, device_kind=device_kind)
    out, settings = Path(recipe.out), recipe.train
    reporter = Reporter(
        out, recipe.log, settings, trainer.config, devices=ranks.world, device_name=device_name(device_kind),
        first=ranks.first, keep=recipe.recompute.kept,
        recomputed=recipe.recompute.layers(recipe.parallel, trainer.config.num_hidden_layers),
    )  # fmt: skip
    profile = Profile(recipe.log.profile, out / "profile", ranks.rank)
    events = Events(out, first=ranks.first, since_start=seconds_since_start(), errors=reporter.trouble)
    watchdog = Watchdog(out, ranks, recipe.watch, reporter.say)
    initialize(trainer, start, reporter)
    comparison = StragglerDetector(ranks, recipe.watch, trainer.device)
    events.note("ready", step=trainer.done)
    saved: list[SaveResult] = []
    stopping = False
    with manual_gc() as collect:
        while trainer.done < settings.steps and not stopping:
            collect(trainer.done)  # here, where every step passes, one that is left out too
            watchdog.start_step(trainer.done + 1)
            with profile.step(trainer.done + 1):
                result = trainer.step(lambda: stop_requested() or timed_out(start))
            watchdog.done()
            reporter.step(result)
            events.note("step", step=result.step, seconds=result.seconds, data=result.phases.get("data_wait", 0.0))
            reporter.slowest(result.step, comparison.step(result.phases.get("data_wait", 0.0)), recipe.watch.slow)
            if result.skipped and handle_bad_step(trainer, result, reporter, events, start):
                continue
            last = trainer.done == settings.steps
            if settings.check_replicas_every and trainer.done % settings.check_replicas_every == 0:
                trainer.check_replicas()
            if settings.eval_every and (trainer.done % settings.eval_every == 0 or last):
                validate(trainer, reporter)
            stopping = result.stop and not last
            every = recipe.checkpoint.every
            if last or stopping or (every and trainer.done % every == 0):
                began = time.perf_counter()
                trainer.save(wait=last or stopping)
                events.note("saved", step=trainer.done, seconds=time.perf_counter() - began)
            saved = trainer.saver.results()
            set_phase(Phase.SAVED if (last or stopping) and saved and not saved[-1].problem else Phase.TRAINING)
            reporter.saved(saved)
    if stopping:
        reporter.say(f" stopped after step {trainer.done}; go on with: arriero pretrain --resume {escape(recipe.out)}")
    if told := profile.finish():
        reporter.say(told)
    watchdog.close()
    events.close()
    if line := goodput_line(out) if ranks.first else "":
        reporter.say(f" time: {line}")
    reporter.finish()
    raise_if_last_save_failed(saved)
    return not stopping


def validate(trainer: Trainer, reporter: Reporter) -> None:
    """Validates, and reports it."""
    loss = trainer.validate()
    if trainer.validation_batches:
        reporter.validation(trainer.done, loss)
    else:
        reporter.say(f" no validation after step {trainer.done}: no label of its batches carries a loss")


def timed_out(start: ResumePlan) -> bool:
    """Whether the time that `--stop-after` gives is over."""
    return bool(start.stop_after) and seconds_since_start() > start.stop_after


def initialize(trainer: Trainer, start: ResumePlan, reporter: Reporter) -> None:
    """Loads the first checkpoint that is whole, or draws the weights, and tells which."""
    checkpoint = None
    if start.checkpoints:
        checkpoint = newest_intact_checkpoint(
            list(start.checkpoints), trainer.ranks, log=reporter.say, model=trainer.config
        )
    trainer.start(checkpoint)
    reporter.resume_after(trainer.done)
    if trainer.recipe.train.float8 != "none" and not has_float8_units(trainer.kind):
        reporter.say(" float8 is emulated: this device has no units for it; same rounding, and no time is saved")
    for line in (*start.notices, *(f" note: {notice}" for notice in trainer.config.notices)):
        reporter.say(line)
    if checkpoint is not None:
        reporter.say(f" resumed from {escape(checkpoint)} after step {trainer.done}")
        if trainer.done >= trainer.recipe.train.steps:
            told = f"step {trainer.done} of train.steps {trainer.recipe.train.steps}"
            reporter.say(f" the run is complete: {told}; give a larger --train.steps to go on")
        if trainer.position.samples != trainer.done * trainer.recipe.train.global_batch:
            reporter.say(f" goes on with sample {trainer.position.place}, {trainer.recipe.train.global_batch} a step")
        if trainer.ranks.first and (line := schedule_change(checkpoint, trainer)):
            reporter.say(f" NOTICE: {line}")
        if line := trainer.order_notice():
            reporter.say(f" NOTICE: {line}")
    trainer.saver.allocate_buffers(trainer.tensors_to_save())
    trainer.ranks.barrier()  # so that a signal finds all processes in one phase
    set_phase(Phase.TRAINING)


def schedule_change(checkpoint: Path, trainer: Trainer) -> str:
    """How the learning rate departs from the curve of the run that wrote the checkpoint; empty if it does not."""
    then, now = recipe_of(checkpoint), trainer.recipe
    return describe_rate_change(then.schedule, then.train.steps, now.schedule, now.train.steps, done=trainer.done)


def handle_bad_step(
    trainer: Trainer, result: StepResult, reporter: Reporter, events: Events, start: ResumePlan
) -> bool:
    """After a step whose update was left out: does what the recipe says; whether the run went back.

    Raises:
        UserError: it says to stop, or going back is of no use.
    """
    settings, step = trainer.recipe.train, result.step
    reason = "no label" if result.unlabelled else "spike" if result.spike else "not finite"
    events.note("skipped", step=step, reason=reason)
    if result.unlabelled:  # nothing is wrong with the numbers: there were none
        reporter.say(f" SKIPPED step {step}: no label of its {settings.global_batch} samples carries a loss")
        return False
    policy = settings.on_spike if result.spike else "skip" if trainer.fp16 else settings.on_nonfinite
    what = f"step {step}: loss {result.loss:g}, gradient norm {result.grad_norm:g}"
    if result.spike:
        what += f": above {trainer.spikes.limit():g}, a spike"
    if policy == "stop":
        trainer.save()
        key = "on_spike" if result.spike else "on_nonfinite"
        raise UserError(what, f"look at the data of step {step}, lower the rate, or set train.{key} skip")
    reporter.say(f" SKIPPED {what}")
    if policy != "rewind":
        return False
    trainer.saver.wait()
    trainer.ranks.barrier()
    trainer.rewind(committed(trainer.saver.root)[::-1] or list(start.checkpoints), say=reporter.say)
    reporter.resume_after(trainer.done)
    events.note("rewind", step=trainer.done)
    return True
