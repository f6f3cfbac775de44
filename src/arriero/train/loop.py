"""The training loop: it reads from top to bottom. What a step does is in trainer.py."""

from __future__ import annotations

from pathlib import Path

from arriero.device import device_name
from arriero.errors import UserError
from arriero.parallel.mesh import Ranks
from arriero.recipe import Recipe
from arriero.train.reporter import Reporter
from arriero.train.trainer import Trainer


def train(recipe: Recipe, ranks: Ranks, *, local_rank: int, device_kind: str, checkpoint: Path | None) -> None:
    """Runs a recipe to its last step, from the start or from `checkpoint`.

    Raises:
        UserError: a non-finite step where the recipe says to stop.
    """
    trainer = Trainer(recipe, ranks, local_rank=local_rank, device_kind=device_kind)
    trainer.start(checkpoint)
    out, settings = Path(recipe.out), recipe.train
    reporter = Reporter(
        out, recipe.log, settings, trainer.config, devices=ranks.world, device_name=device_name(device_kind),
        first=ranks.first,
    )  # fmt: skip
    if checkpoint is not None:
        reporter.resume_after(trainer.done)
        reporter.say(f" resumed from {checkpoint} after step {trainer.done}")
    while trainer.done < settings.steps:
        result = trainer.step()
        reporter.step(result)
        last = trainer.done == settings.steps
        if result.skipped and settings.on_nonfinite == "stop" and not trainer.fp16:
            trainer.save()
            fix = f"look at the data of step {trainer.done}, lower the rate, or set train.on_nonfinite skip"
            raise UserError(f"step {trainer.done}: loss {result.loss}, gradient norm {result.grad_norm}", fix)
        if settings.eval_every and (trainer.done % settings.eval_every == 0 or last):
            reporter.validation(trainer.done, trainer.validate())
        every = recipe.checkpoint.every
        if last or (every and trainer.done % every == 0):
            path = trainer.save()
            reporter.say(f" saved checkpoint: {path}")
    reporter.finish()
