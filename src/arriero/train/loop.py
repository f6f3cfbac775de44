"""The training loop: it reads from top to bottom. What a step does is in trainer.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from arriero.checkpoint.load import newest_that_verifies
from arriero.checkpoint.save import Saved, last_word
from arriero.device import device_name
from arriero.errors import UserError
from arriero.observe.profile import Profile
from arriero.parallel.mesh import Ranks
from arriero.process import seconds_since_start, stop_wanted
from arriero.recipe import Recipe
from arriero.train.reporter import Reporter
from arriero.train.trainer import Trainer


@dataclass(frozen=True)
class Continuation:
    """Where a start of a run begins, and when it ends early."""

    checkpoints: tuple[Path, ...] = ()
    """From which to go on, the best first; none to begin."""
    notices: tuple[str, ...] = field(default=())
    """Lines for the log, such as what has changed since the checkpoint."""
    stop_after: float = 0.0
    """Seconds after which to save and stop; 0 for never."""


def train(recipe: Recipe, ranks: Ranks, *, local_rank: int, device_kind: str, start: Continuation) -> bool:
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
    checkpoint = None
    if start.checkpoints:
        checkpoint = newest_that_verifies(list(start.checkpoints), ranks, say=reporter.say)
    trainer.start(checkpoint)
    reporter.resume_after(trainer.done)
    for line in start.notices:
        reporter.say(line)
    if checkpoint is not None:
        reporter.say(f" resumed from {checkpoint} after step {trainer.done}")
    trainer.saver.reserve(trainer.parts_to_save())
    saved: list[Saved] = []
    stopping = False
    while trainer.done < settings.steps and not stopping:
        with profile.step(trainer.done + 1):
            result = trainer.step()
        reporter.step(result)
        last = trainer.done == settings.steps
        if result.skipped and settings.on_nonfinite == "stop" and not trainer.fp16:
            trainer.save()
            fix = f"look at the data of step {trainer.done}, lower the rate, or set train.on_nonfinite skip"
            raise UserError(f"step {trainer.done}: loss {result.loss}, gradient norm {result.grad_norm}", fix)
        if settings.eval_every and (trainer.done % settings.eval_every == 0 or last):
            reporter.validation(trainer.done, trainer.validate())
        timed_out = bool(start.stop_after) and seconds_since_start() > start.stop_after
        stopping = ranks.any(stop_wanted() or timed_out) and not last
        every = recipe.checkpoint.every
        if last or stopping or (every and trainer.done % every == 0):
            trainer.save(wait=last or stopping)
        saved = trainer.saver.results()
        reporter.saved(saved)
    if stopping:
        reporter.say(f" stopped after step {trainer.done}; go on with: arriero pretrain --resume {recipe.out}")
    if told := profile.finish():
        reporter.say(told)
    reporter.finish()
    last_word(saved)
    return not stopping
