"""The training loop. It reads from top to bottom; what a step does is in `Trainer.step`.

Nothing in it depends on the layout: a rank takes its part of the batch, the loss is divided by the global number of
valid tokens, gradients are summed, and the norm is that of the whole gradient.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch

from arriero.checkpoint.load import CheckpointReader, load_state
from arriero.checkpoint.save import forget_old, save_checkpoint
from arriero.data.batches import Batch, Batches
from arriero.device import device_name, synchronize, take_device
from arriero.errors import UserError
from arriero.model.init import InitialWeights
from arriero.parallel.apply import build_model, load_weights
from arriero.parallel.mesh import Ranks
from arriero.parallel.zero import cut_again, sum_gradients_now
from arriero.recipe import Recipe, to_toml
from arriero.train.loss import IGNORED, loss_context, summed_loss
from arriero.train.optim import MOMENTS, Optimizer
from arriero.train.precision import LossScale, forward_in, store_dtype
from arriero.train.reporter import Reporter, StepResult, Stopwatch
from arriero.train.schedule import learning_rate
from arriero.weights.huggingface import open_huggingface


class MicroBatch(NamedTuple):
    """What one forward pass takes, on the device; shapes as in data/batches.py, mask [B, 1, L, L] or None."""

    tokens: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor | None
    mask: torch.Tensor | None


def to_device(batch: Batch, device: torch.device) -> MicroBatch:
    """Copies a batch to the device; where attention stays within documents, the mask is made there."""
    tokens, labels = (torch.from_numpy(a).to(device) for a in (batch.tokens, batch.labels))
    if batch.positions is None or batch.documents is None:
        return MicroBatch(tokens, labels, None, None)
    documents, length = torch.from_numpy(batch.documents).to(device), tokens.shape[1]
    same = documents[:, None, :, None] == documents[:, None, None, :]
    mask = same & torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return MicroBatch(tokens, labels, torch.from_numpy(batch.positions).to(device), mask)


def open_batches(recipe: Recipe, split: str) -> Batches:
    """The batches of one split; the validation split is read from its start at every validation."""
    train = recipe.train
    count = train.steps if split == "train" else train.eval_batches
    return Batches(
        recipe.data, sequence_length=train.sequence_length, global_batch=train.global_batch, seed=recipe.seed,
        split=split, samples=count * train.global_batch,
    )  # fmt: skip


class Trainer:
    """The state of a run on one process: model, optimizer, loss scale, step."""

    def __init__(self, recipe: Recipe, ranks: Ranks, *, local_rank: int, device_kind: str) -> None:
        self.recipe, self.ranks, self.kind = recipe, ranks, device_kind
        self.device = take_device(device_kind, local_rank)
        self.config = recipe.model_config()
        self.compute = getattr(torch, recipe.train.dtype)
        self.model = build_model(
            self.config, recipe.parallel, ranks, device=self.device, store=store_dtype(self.compute),
            compute=self.compute,
        )  # fmt: skip
        self.forward = forward_in(self.model, self.compute)
        self.optimizer = Optimizer(self.model, recipe.optim, ranks)
        train = recipe.train
        fp16 = self.compute == torch.float16
        scale = train.initial_loss_scale if fp16 else 1.0
        self.scale = LossScale(scale, train.loss_scale_window, train.loss_scale_hysteresis)
        self.fp16 = fp16
        self.done = 0
        """Steps completed."""
        self.updates = 0
        """Steps whose update was not skipped."""
        self.batches = open_batches(recipe, "train")

    def start(self, checkpoint: Path | None) -> None:
        """Takes weights and state from a checkpoint, or weights from `init`, or draws them."""
        if checkpoint is None:
            init = self.recipe.init
            source = open_huggingface(Path(init)) if init else InitialWeights(self.config, self.recipe.seed)
            load_weights(self.model, source)
            return
        state, reader = load_state(checkpoint), CheckpointReader(checkpoint)
        load_weights(self.model, reader)
        names = self.optimizer.shards.items()
        moments = {m: {n: reader.read(f"{m}.{n}", s.index) for n, s in names} for m in MOMENTS}
        self.done, self.updates = state["step"], state["updates"]
        self.optimizer.load_moments(moments, self.updates)
        self.scale = LossScale(**state["loss_scale"])

    def save(self) -> Path:
        """Writes a checkpoint of the present step."""
        root = Path(self.recipe.out) / "checkpoints"
        texts = {"config.json": json.dumps(self.config.to_json(), indent=1), "recipe.toml": to_toml(self.recipe)}
        state = {"updates": self.updates, "loss_scale": asdict(self.scale)}
        path = save_checkpoint(
            root, self.done, model=self.model, moments=self.optimizer.moments(), state=state, texts=texts,
            ranks=self.ranks,
        )  # fmt: skip
        if self.ranks.first:
            forget_old(root, self.recipe.checkpoint.keep)
        return path

    def micro_batches(self, batches: Batches, step: int) -> list[MicroBatch]:
        """This rank's samples of global batch `step`, cut into micro-batches."""
        train = self.recipe.train
        share = train.global_batch // self.ranks.data
        first = self.ranks.coordinates["data"] * share
        return [
            to_device(batches.batch(step, start, train.micro_batch), self.device)
            for start in range(first, first + share, train.micro_batch)
        ]

    def forward_backward(self, micro: list[MicroBatch], *, train: bool) -> float:
        """The mean loss over the global batch; with `train`, its gradient is left in the parameters."""
        valid = torch.stack([(m.labels != IGNORED).sum() for m in micro]).sum()
        valid = self.ranks.sum(valid.double(), "data")
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for i, m in enumerate(micro):
            with loss_context(self.ranks):
                loss = summed_loss(self.forward(m.tokens, m.positions, m.mask), m.labels)
                if train:
                    sum_gradients_now(self.model, self.recipe.parallel.zero_stage, last=i == len(micro) - 1)
                    (loss * (self.scale.scale / valid).to(loss.dtype)).backward()
            total += loss.detach()
        return (self.ranks.sum(total, "data") / valid).item()

    def step(self) -> StepResult:
        """One optimizer step: batch, loss, gradient, norm, update."""
        train, watch = self.recipe.train, Stopwatch()
        micro = self.micro_batches(self.batches, self.done)
        data_seconds = watch.read()
        loss = self.forward_backward(micro, train=True)
        self.optimizer.take_gradients()
        scale = self.scale.scale
        norm = self.optimizer.gradient_norm().item() / scale
        finite = math.isfinite(norm) and math.isfinite(loss)
        rate = learning_rate(self.recipe.schedule, self.done, train.steps)
        if finite:
            clip = min(1.0, train.grad_clip / (norm + 1e-6)) if train.grad_clip else 1.0
            self.optimizer.step(lr=rate, gradient_scale=clip / scale)
            self.updates += 1
        self.optimizer.clear()
        if self.fp16:
            self.scale.update(finite=finite)
        self.done += 1
        synchronize(self.kind)
        return StepResult(
            step=self.done, loss=loss, grad_norm=norm, learning_rate=rate, loss_scale=scale, skipped=not finite,
            seconds=data_seconds + watch.read(), data_seconds=data_seconds,
        )  # fmt: skip

    @torch.no_grad()
    def validate(self) -> float:
        """The mean loss over the first batches of the validation split, the same ones every time."""
        batches, count = open_batches(self.recipe, "valid"), self.recipe.train.eval_batches
        losses = [self.forward_backward(self.micro_batches(batches, i), train=False) for i in range(count)]
        cut_again(self.model)
        return sum(losses) / count


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
