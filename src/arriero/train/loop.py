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
from arriero.train.build import build_trainer
from arriero.train.manual_gc import manual_gc
from arriero.train.recipe import Recipe, recipe_of_checkpoint
from arriero.train.reporter import Reporter, StepResult
from arriero.train.schedule import describe_rate_change
from arriero.train.trainer import Trainer
from arriero.train.watch import StragglerDetector, Watchdog


@dataclass(frozen=True)
class ResumePlan:
    """What a run resumes from, and when it stops early."""

    checkpoints: tuple[Path, ...] = ()
    """Checkpoints to resume from, the newest first; none for a new run."""
    notices: tuple[str, ...] = field(default=())
    """Lines for the log, such as changes since the checkpoint."""
    stop_after: float = 0.0
    """Seconds after which to save and stop; 0 for never."""


def train(recipe: Recipe, ranks: Ranks, *, local_rank: int, device_kind: str, plan: ResumePlan) -> bool:
    """Runs a recipe to its last step, from the start or from a checkpoint; returns whether it got there.

    A signal or `plan.stop_after` ends it after the present step, with a checkpoint.

    Raises:
        UserError: a non-finite step where the policy is to stop, no checkpoint that is whole, or the last one failed.
    """
    trainer = build_trainer(recipe, ranks, local_rank=local_rank, device_kind=device_kind)
    out, settings = Path(recipe.out), recipe.train
    reporter = build_reporter(recipe, trainer)
    profile = Profile(recipe.log.profile, out / "profile", ranks.rank)
    events = Events(out, first=ranks.first, since_start=seconds_since_start(), errors=reporter.trouble)
    watchdog = Watchdog(out, ranks, recipe.watch, reporter.log)
    initialize(trainer, recipe, plan, reporter)
    stragglers = StragglerDetector(ranks, recipe.watch, trainer.device)
    events.note("ready", step=trainer.done)
    saved: list[SaveResult] = []
    stopping = False
    with manual_gc() as collect:
        while trainer.done < settings.steps and not stopping:
            collect(trainer.done)  # here, where every step passes, a skipped one too
            watchdog.start_step(trainer.done + 1)
            with profile.step(trainer.done + 1):
                result = trainer.step(lambda: stop_requested() or timed_out(plan))
            watchdog.end_step()
            reporter.log_step(result)
            data_seconds = result.phases.get("data_wait", 0.0)
            events.note("step", step=result.iteration, seconds=result.seconds, data=data_seconds)
            reporter.log_slowest_rank(result.iteration, stragglers.step(data_seconds), recipe.watch.slow)
            if result.skipped and handle_bad_step(trainer, result, reporter, events, plan):
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
            reporter.log_saves(saved)
    if stopping:
        resume = f"arriero pretrain --resume {escape(recipe.out)}"
        reporter.log(f" stopped after step {trainer.done}; go on with: {resume}")
    if message := profile.finish():
        reporter.log(message)
    watchdog.close()
    events.close()
    if line := goodput_line(out) if ranks.first else "":
        reporter.log(f" time: {line}")
    reporter.finish()
    raise_if_last_save_failed(saved)
    return not stopping


def build_reporter(recipe: Recipe, trainer: Trainer) -> Reporter:
    """What writes the run's log and metrics; on all processes but the first it writes nothing."""
    layers = recipe.recompute.layers(recipe.parallel, trainer.config.num_hidden_layers)
    return Reporter(
        Path(recipe.out), recipe.log, recipe.train, trainer.config, devices=trainer.ranks.world,
        device_name=device_name(trainer.device.type), first=trainer.ranks.first, keep=recipe.recompute.kept,
        recomputed=layers,
    )  # fmt: skip


def validate(trainer: Trainer, reporter: Reporter) -> None:
    """Validates, and reports it."""
    loss = trainer.validate()
    if trainer.validation_batches:
        reporter.log_validation(trainer.done, loss)
    else:
        reporter.log(f" no validation after step {trainer.done}: no label of its batches carries a loss")


def timed_out(plan: ResumePlan) -> bool:
    """Whether the time limit of `--stop-after` has passed."""
    return bool(plan.stop_after) and seconds_since_start() > plan.stop_after


def initialize(trainer: Trainer, recipe: Recipe, plan: ResumePlan, reporter: Reporter) -> None:
    """Loads the first checkpoint that is whole, or the weights of a new run, and logs which."""
    checkpoint = None
    if plan.checkpoints:
        checkpoint = newest_intact_checkpoint(
            list(plan.checkpoints), trainer.ranks, log=reporter.log, model=trainer.config
        )
    trainer.load(checkpoint)
    reporter.truncate_metrics_after(trainer.done)
    if recipe.train.float8 != "none" and not has_float8_units(trainer.device.type):
        reporter.log(" float8 is emulated: this device has no units for it; same rounding, and no time is saved")
    for line in (*plan.notices, *(f" note: {notice}" for notice in trainer.config.notices)):
        reporter.log(line)
    if checkpoint is not None:
        log_resume(trainer, recipe, checkpoint, reporter)
    trainer.saver.allocate_buffers(trainer.tensors_to_save())
    trainer.ranks.barrier()  # so that a signal finds all processes in one phase
    set_phase(Phase.TRAINING)


def log_resume(trainer: Trainer, recipe: Recipe, checkpoint: Path, reporter: Reporter) -> None:
    """Logs where the run goes on, and what differs from the run that wrote the checkpoint."""
    train, position = recipe.train, trainer.position
    reporter.log(f" resumed from {escape(checkpoint)} after step {trainer.done}")
    if trainer.done >= train.steps:
        steps = f"step {trainer.done} of train.steps {train.steps}"
        reporter.log(f" the run is complete: {steps}; give a larger --train.steps to go on")
    if position.samples != trainer.done * train.global_batch:
        reporter.log(f" goes on with sample {position.next_sample}, {train.global_batch} a step")
    if trainer.ranks.first:
        before = recipe_of_checkpoint(checkpoint)
        if line := describe_rate_change(
            before.schedule, before.train.steps, recipe.schedule, train.steps, done=trainer.done
        ):
            reporter.log(f" NOTICE: {line}")
    if line := trainer.loader.order_notice(position):
        reporter.log(f" NOTICE: {line}")


def handle_bad_step(
    trainer: Trainer, result: StepResult, reporter: Reporter, events: Events, plan: ResumePlan
) -> bool:  # fmt: skip
    """After a step whose update was skipped: applies the recipe's policy; returns whether the run went back.

    Raises:
        UserError: the policy is to stop, or the run went back too often.
    """
    settings, step = trainer.train, result.iteration
    reason = "no label" if result.unlabelled else "spike" if result.spike else "not finite"
    events.note("skipped", step=step, reason=reason)
    if result.unlabelled:  # nothing is wrong with the numbers: there were none
        reporter.log(f" SKIPPED step {step}: no label of its {settings.global_batch} samples carries a loss")
        return False
    policy = settings.on_spike if result.spike else "skip" if trainer.fp16 else settings.on_nonfinite
    what = f"step {step}: loss {result.lm_loss:g}, gradient norm {result.grad_norm:g}"
    if result.spike:
        what += f": above {trainer.spikes.limit():g}, a spike"
    if policy == "stop":
        trainer.save()
        key = "on_spike" if result.spike else "on_nonfinite"
        raise UserError(what, f"look at the data of step {step}, lower the rate, or set train.{key} skip")
    reporter.log(f" SKIPPED {what}")
    if policy != "rewind":
        return False
    trainer.saver.wait()
    trainer.ranks.barrier()
    trainer.rewind(committed(trainer.saver.root)[::-1] or list(plan.checkpoints), log=reporter.log)
    reporter.truncate_metrics_after(trainer.done)
    events.note("rewind", step=trainer.done)
    return True
