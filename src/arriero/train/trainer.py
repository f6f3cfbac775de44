"""The state of a run on one process, and what a step does to it.

Nothing in it depends on the layout: a rank takes its part of the batch, the loss is divided by the global number of
valid tokens, gradients are summed, and the norm is that of the whole gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from arriero.checkpoint.directory import step_directory
from arriero.checkpoint.load import CheckpointReader
from arriero.checkpoint.save import Saver
from arriero.checkpoint.shards import TensorShard
from arriero.checkpoint.state import load_state
from arriero.checkpoint.verify import newest_intact_checkpoint
from arriero.common.checkpoint_names import DAMAGED, STATE
from arriero.common.device import synchronize
from arriero.common.errors import UserError
from arriero.common.version import __version__
from arriero.distributed.parallel.apply import WeightSource
from arriero.distributed.parallel.mesh import BATCH
from arriero.distributed.parallel.microbatch import MicroBatch
from arriero.distributed.parallel.shards import local, shards
from arriero.train.config import TrainConfig
from arriero.train.guard import MAX_REWINDS, ReplicatedTensor, SpikeDetector, check_replicas
from arriero.train.loader import MicroBatchLoader
from arriero.train.model_parts import ModelParts
from arriero.train.optim import Optimizer
from arriero.train.position import position_from_state
from arriero.train.precision import LossScale
from arriero.train.recipe import recipe_of_checkpoint
from arriero.train.reporter import StepResult

STATE_FORM = {
    "step": int, "updates": int,
    "loss_scale": {"scale": float, "window": int, "hysteresis": int, "clean": int, "patience": int},
}  # fmt: skip
"""What is read of a checkpoint's state.json."""


@dataclass
class RunRecord:
    """What each checkpoint repeats of its run."""

    texts: dict[str, str]
    """Further files of a checkpoint, by name: config.json, recipe.toml."""
    state: dict[str, Any]
    """Further keys of state.json."""
    digest_inputs: Callable[[], dict[str, str]]
    """Digests data and tokenizer: {} on the processes that do not write them."""

    @cached_property
    def inputs(self) -> dict[str, str]:
        """Digests of data and tokenizer, computed at the first checkpoint."""
        return self.digest_inputs()


class Trainer:
    """Model, optimizer, loss scale and position of one process; build.py makes one from a recipe.

    Args:
        model: this process's parts of the model.
        optimizer: over their parameters.
        learning_rate: of an update, by its number from 0.
        loss_scale: float16's; constant 1 otherwise.
        spikes: finds losses that stand out.
        loader: the batches.
        saver: writes checkpoints.
        initial_weights: opens the weights of a new run.
        record: what each checkpoint repeats of the run.
        train: batch sizes, clipping, policies.
        log_every: steps between printed lines; in those the phases are timed on an accelerator.
    """

    def __init__(
        self, *, model: ModelParts, optimizer: Optimizer, learning_rate: Callable[[int], float], loss_scale: LossScale,
        spikes: SpikeDetector, loader: MicroBatchLoader, saver: Saver, initial_weights: Callable[[], WeightSource],
        record: RunRecord, train: TrainConfig, log_every: int = 1,
    ) -> None:  # fmt: skip
        self.model, self.optimizer, self.loader, self.saver = model, optimizer, loader, saver
        self.config, self.parts, self.ranks, self.device = model.config, model.parts, model.ranks, model.device
        self.clock, self.train, self.log_every = model.clock, train, log_every
        self.learning_rate, self.scale, self.spikes = learning_rate, loss_scale, spikes
        self._initial_weights, self._record = initial_weights, record
        self.fp16 = train.dtype == "float16"
        self.position = loader.initial_position()
        """What was read so far: steps, samples, tokens."""
        self.updates = 0
        """Steps whose update was not skipped."""
        self.rewinds = 0
        self.attended_length = 0.0
        """Sum of squared document lengths over their sum, of the last batch: the mean context of a token."""
        self.validation_batches = 0
        """Batches of the last validation that had a label."""
        self.labels = 1
        """Labels of the last global batch that carry a loss."""

    @property
    def done(self) -> int:
        """Steps completed."""
        return self.position.step

    def load(self, checkpoint: Path | None) -> None:
        """Takes weights and state from a checkpoint, or without one the weights of a new run."""
        if checkpoint is None:
            self.model.load(self._initial_weights())
            self.optimizer.load(None, updates=0)
            return
        state, reader = load_state(checkpoint, STATE_FORM), CheckpointReader(checkpoint)
        self.model.load(reader)
        own = self.optimizer.shards.items()
        states = {
            n: {path: reader.read(f"{n}.{s.name}", s.index) for path, s in own} for n in self.optimizer.state_names
        }
        recipe, where = partial(recipe_of_checkpoint, checkpoint), str(checkpoint / STATE)
        self.position = self.loader.resume_at(position_from_state(state, recipe=recipe, where=where, fix=DAMAGED))
        self.updates = state["updates"]
        self.optimizer.load(states, self.updates)
        self.scale = LossScale(**state["loss_scale"])
        self.spikes.recent = state.get("recent_losses", [])

    def rewind(self, checkpoints: list[Path], *, log: Callable[[str], None]) -> None:
        """Goes back to the newest of these checkpoints that is whole, or to the start of the run where there are none,
        and leaves out the samples that were read since.

        Raises:
            UserError: none is whole, or this was done too often.
        """
        end, skipped = self.position.next_sample, self.position.skipped
        self.rewinds += 1
        if self.rewinds > MAX_REWINDS:
            raise UserError(f"rewound {MAX_REWINDS} times: it is not the data", "lower the rate, or look at the model")
        checkpoint = (
            newest_intact_checkpoint(checkpoints, self.ranks, log=log, model=self.config) if checkpoints else None
        )
        self.loader.close()
        if checkpoint is None:
            self.position, self.updates = self.loader.initial_position(), 0
            self.spikes.recent = []
        self.load(checkpoint)
        self.position.skipped = skipped
        first, last = skipped.skip_range(self.position.samples, end)
        log(f" REWOUND to step {self.done} ({checkpoint or 'the start'}); samples {first} to {last} are left out now")

    def tensors_to_save(self) -> dict[str, TensorShard]:
        """The weights and states that this process writes, by global name."""
        found: dict[str, TensorShard] = {}
        states = self.optimizer.states()
        for path, (shard, parameter) in shards(self.parts, self.ranks).items():
            if not shard.written_by(self.ranks) or 0 in shard.local_shape:
                continue
            found[shard.name] = TensorShard(local(parameter).detach(), shard.shape, shard.offset)
            for state_name, by_path in states.items():
                found[f"{state_name}.{shard.name}"] = TensorShard(by_path[path], shard.shape, shard.offset)
        return found

    def save(self, *, wait: bool = True) -> Path:
        """Writes a checkpoint of the present step; without `wait`, while training goes on.

        It holds all that later steps depend on: samples and their order are functions of the seed, a batch of the
        position, the learning rate of the step, and no random number is drawn after the initial weights.
        """
        with self.clock.whole("checkpoint"):
            state = {
                "updates": self.updates, "loss_scale": asdict(self.scale), "inputs": self._record.inputs,
                **self.position.to_state(), "versions": {"arriero": __version__, "torch": torch.__version__},
                **self._record.state,
            }  # fmt: skip
            if self.spikes.recent:
                state["recent_losses"] = self.spikes.recent
            self.saver.save(self.done, self.tensors_to_save(), state=state, texts=self._record.texts)
            if wait:
                self.saver.wait()
        return step_directory(self.saver.root, self.done)

    def next_batch(self) -> list[MicroBatch]:
        """The micro-batches of the coming step."""
        return self.loader.next(self.position)

    def close(self) -> None:
        """Ends the loader's thread."""
        self.loader.close()

    def forward_backward(self, micro: list[MicroBatch], *, train: bool) -> torch.Tensor:
        """The mean loss over the global batch, a float64 scalar on the device; with `train`, the parameters' gradients
        are those of it times the loss scale.

        Where no label carries a loss there is no mean: it is NaN, on all processes, and nothing is computed.
        """
        counts = torch.tensor([sum(m.valid for m in micro), sum(m.squares for m in micro)], dtype=torch.float64)
        valid, squares = self.ranks.sum(counts, *BATCH).tolist()
        self.labels = int(valid)
        self.attended_length = squares / self.ranks.context / (self.train.global_batch * self.train.sequence_length)
        self.clock.mark("communication")
        if not self.labels:
            return torch.full((), math.nan, dtype=torch.float64, device=self.device)
        total = self.model.summed_loss(micro, weight=self.scale.scale / valid, train=train)
        loss = self.ranks.sum(total, "pipeline", *BATCH) / valid
        self.clock.mark("communication")
        return loss

    def step(self, stop: Callable[[], bool] = lambda: False) -> StepResult:
        """One optimizer step: batch, loss, gradient, norm, update. `stop` is whether this process was asked to end the
        run; the processes agree on it where they agree on the step."""
        train = self.train
        timed = (self.done + 1) % self.log_every == 0
        self.clock.begin(shown=timed)
        micro = self.next_batch()
        self.clock.mark("data_wait")
        mean = self.forward_backward(micro, train=True)
        scale = self.scale.scale
        if self.labels:
            self.optimizer.collect_gradients()
            # The one wait for the device in a step: whether it is accepted depends on these two.
            loss, norm = torch.stack((mean, self.optimizer.gradient_norm().to(mean.device) / scale)).tolist()
            finite, accepted, stopping = self._agree_on_step(loss, norm, stop=stop())
        else:
            loss, norm, finite, accepted = math.nan, 0.0, True, False
            (stopping,) = self.ranks.any(stop())
        rate = self.learning_rate(self.done)
        if accepted:
            clip = min(1.0, train.grad_clip / (norm + 1e-6)) if train.grad_clip else 1.0
            self.optimizer.step(lr=rate, divisor=scale / clip)
            self.updates += 1
        self.optimizer.clear()
        if self.fp16 and self.labels:
            self.scale.update(finite=finite)
        self.position.advance(train.global_batch, train.sequence_length)
        self.clock.mark("optimizer")
        if timed:
            synchronize(self.device.type)  # the marks' times can be read once all of them have passed
        return StepResult(
            iteration=self.done, consumed_samples=self.position.samples, consumed_tokens=self.position.tokens,
            lm_loss=loss, grad_norm=norm,
            learning_rate=rate, loss_scale=scale, skipped=not accepted, stop=stopping,
            spike=finite and not accepted and self.labels > 0, unlabelled=not self.labels,
            seconds=self.clock.since_begin(), phases=self.clock.take(), attended_length=self.attended_length,
        )  # fmt: skip

    def _agree_on_step(self, loss: float, norm: float, *, stop: bool) -> tuple[bool, bool, bool]:
        """Whether all processes found loss and gradient finite, whether all of them accept the step, and whether any
        was asked to stop.

        Loss and norm are sums over most processes already; over the copies of a gradient they are not.
        """
        finite = math.isfinite(norm) and math.isfinite(loss)
        detect = self.train.on_spike != "ignore"
        spike = finite and detect and loss > self.spikes.limit()
        nonfinite, spikes, stopping = self.ranks.any(not finite, spike, stop)
        if not nonfinite and not spikes and detect:
            self.spikes.add(loss)
        return not nonfinite, not nonfinite and not spikes, stopping

    def check_replicas(self) -> None:
        """Compares replicated weights and optimizer states between processes. Raises CheckFailed on all processes."""
        states, state = self.optimizer.states(), []
        for path, (shard, parameter) in shards(self.parts, self.ranks).items():
            over = tuple(n for n, size in self.ranks.sizes.items() if size > 1 and n not in shard.sharded_over)
            if over and 0 not in shard.local_shape:
                state.append(ReplicatedTensor(shard.name, local(parameter), over))
                state += [
                    ReplicatedTensor(f"{state_name}.{shard.name}", of[path], over) for state_name, of in states.items()
                ]
        check_replicas(state, self.ranks, self.done)

    @torch.no_grad()
    def validate(self) -> float:
        """The mean loss over the first batches of the validation split, the same ones every time.

        Batches without a label that carries a loss are left out of it; NaN if no batch has one.
        """
        losses = []
        with self.clock.whole("validation"):
            for number in range(self.train.eval_batches):
                loss = self.forward_backward(self.loader.validation(number), train=False)
                losses += [loss.item()] if self.labels else []
            self.model.reshard()
        self.validation_batches = len(losses)
        return sum(losses) / len(losses) if losses else math.nan
