"""The state of a run on one process, and what a step does to it.

Nothing in it depends on the layout: a rank takes its part of the batch, the loss is divided by the global number of
valid tokens, gradients are summed, and the norm is that of the whole gradient.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path

import torch

from arriero.checkpoint.directory import step_directory
from arriero.checkpoint.formats.huggingface import open_huggingface
from arriero.checkpoint.load import CheckpointReader
from arriero.checkpoint.save import Saver
from arriero.checkpoint.shards import TensorShard
from arriero.checkpoint.state import load_state
from arriero.checkpoint.verify import newest_intact_checkpoint
from arriero.common.checkpoint_names import DAMAGED, STATE
from arriero.common.device import select_device, synchronize
from arriero.common.errors import UserError
from arriero.common.settings import parse
from arriero.common.toml import file_settings, to_toml
from arriero.common.version import __version__
from arriero.data.batches import Batches
from arriero.data.prefetch import Prefetch
from arriero.distributed.parallel.apply import build_model_parts, load_weights
from arriero.distributed.parallel.mesh import BATCH, Ranks
from arriero.distributed.parallel.microbatch import MicroBatch, micro_batch
from arriero.distributed.parallel.pipeline import Pipeline, sum_tied_gradients
from arriero.distributed.parallel.shards import local, shards
from arriero.distributed.parallel.zero import reshard, set_gradient_sync, time_collectives
from arriero.model.init import InitialWeights
from arriero.observe.step_time import StepClock
from arriero.train.facts import input_digests
from arriero.train.guard import MAX_REWINDS, ReplicatedTensor, SpikeDetector, check_replicas
from arriero.train.optim import MOMENTS, Optimizer
from arriero.train.position import Position, position_from_state
from arriero.train.precision import LossScale, in_compute_dtype, store_dtype
from arriero.train.recipe import Recipe
from arriero.train.reporter import StepResult
from arriero.train.schedule import learning_rate


def open_batches(
    recipe: Recipe, split: str, position: Position | None = None, *, vocab_size: int | None = None
) -> Batches:
    """The batches of one split; the validation split is read from its start at every validation.

    The number of samples matters to `data.order = "megatron"` alone, and is Megatron's: what a run of this recipe draws
    in all, or what the order was made for when the run that is at `position` began. With `vocab_size` ids that the
    model has no row for are refused as they are read.
    """
    train, at = recipe.train, position or Position()
    validations = train.steps // train.eval_every + 1 if train.eval_every else 1
    count = (train.steps if split == "train" else validations * train.eval_batches) * train.global_batch
    return Batches(
        recipe.data, sequence_length=train.sequence_length, global_batch=train.global_batch, seed=recipe.seed,
        split=split, samples=at.ordered if at.ordered and split == "train" else count, vocab_size=vocab_size,
    )  # fmt: skip


def recipe_of(checkpoint: Path) -> Recipe:
    """The recipe of the run that wrote a checkpoint. Raises UserError where it cannot be read."""
    return parse(Recipe, file_settings(checkpoint / "recipe.toml"), prog="arriero pretrain")


STATE_FORM = {
    "step": int, "updates": int,
    "loss_scale": {"scale": float, "window": int, "hysteresis": int, "clean": int, "patience": int},
}  # fmt: skip
"""What is read of a checkpoint's state.json."""


class Trainer:
    """Model, optimizer, loss scale and step of one process."""

    def __init__(self, recipe: Recipe, ranks: Ranks, *, local_rank: int, device_kind: str) -> None:
        self.recipe, self.ranks, self.kind = recipe, ranks, device_kind
        self.device = select_device(device_kind, local_rank)
        self.config = recipe.model_config()
        self.compute = getattr(torch, recipe.train.dtype)
        train = recipe.train
        self.parts = build_model_parts(
            self.config, recipe.parallel, recipe.recompute, ranks, length=train.sequence_length, device=self.device,
            store=store_dtype(self.compute), compute=self.compute, float8=train.float8, compiled=train.compile,
        )  # fmt: skip
        forwards = [in_compute_dtype(part, self.compute) for part in self.parts]
        self.forward = forwards[0]
        self.pipeline = None
        if recipe.parallel.pipeline_parallel > 1:
            self.pipeline = Pipeline(
                self.parts, forwards, config=recipe.parallel, ranks=ranks, device=self.device,
                micro_batches=train.accumulation(ranks.data), rows=train.micro_batch, length=train.sequence_length,
                compute=self.compute,
            )  # fmt: skip
        self.clock = StepClock(device_kind)
        if self.pipeline is not None:
            self.pipeline.watch(self.clock.timed)
        if device_kind == "cpu":  # elsewhere they run beside the computation, and their own time says little
            for part in self.parts:
                time_collectives(part, partial(self.clock.inside, "communication"))
        self.optimizer = Optimizer(self.parts, recipe.optim, ranks)
        self.fp16 = self.compute == torch.float16
        scale = train.initial_loss_scale if self.fp16 else 1.0
        self.scale = LossScale(scale, train.loss_scale_window, train.loss_scale_hysteresis)
        self.position = self._initial_position()
        """What was read so far: steps, samples, tokens."""
        self.updates = 0
        """Steps whose update was not skipped."""
        self.batches = self._open("train")
        self.spikes = SpikeDetector(train.spike_factor)
        self.rewinds = 0
        self.saver = Saver(Path(recipe.out) / "checkpoints", recipe.checkpoint, ranks)
        self.attended = 0.0
        """Sum of squared document lengths over their sum, of the last batch: how far attention reached."""
        self.validation_batches = 0
        """Batches of the last validation that had a label."""
        self.labels = 1
        """Labels of the last global batch that carry a loss."""
        self._prefetch: Prefetch[list[MicroBatch]] | None = None

    @property
    def done(self) -> int:
        """Steps completed."""
        return self.position.step

    def _initial_position(self) -> Position:
        train = self.recipe.train
        return Position(ordered=train.steps * train.global_batch if self.recipe.data.order == "megatron" else 0)

    def start(self, checkpoint: Path | None) -> None:
        """Takes weights and state from a checkpoint, or weights from `init`, or draws them."""
        if checkpoint is None:
            init = self.recipe.init
            source = open_huggingface(Path(init)) if init else InitialWeights(self.config, self.recipe.seed)
            load_weights(self.parts, source, self.ranks)
            self.optimizer.start(None, updates=0)
            return
        state, reader = load_state(checkpoint, STATE_FORM), CheckpointReader(checkpoint)
        load_weights(self.parts, reader, self.ranks)
        held = self.optimizer.shards.items()
        moments = {m: {path: reader.read(f"{m}.{s.name}", s.index) for path, s in held} for m in MOMENTS}
        where = str(checkpoint / STATE)
        self._set_position(position_from_state(state, recipe=lambda: recipe_of(checkpoint), where=where, fix=DAMAGED))
        self.updates = state["updates"]
        self.optimizer.start(moments, self.updates)
        self.scale = LossScale(**state["loss_scale"])
        self.spikes.recent = state.get("recent_losses", [])

    def _open(self, split: str) -> Batches:
        return open_batches(self.recipe, split, self.position, vocab_size=self.config.vocab_size)

    @cached_property
    def _validation(self) -> Batches:
        return self._open("valid")

    def _set_position(self, position: Position) -> None:
        """The next step is the one after `position`."""
        planned = self._initial_position().ordered
        self.position = replace(position, ordered=(position.ordered or planned) if planned else 0)
        if self.position.ordered != planned:  # the run began with another length: its order stays
            self.batches = self._open("train")

    def order_notice(self) -> str:
        """What is to be known of the order where the run has become longer than it was when it began; often empty."""
        train, made_for = self.recipe.train, self.position.ordered
        wanted = self.position.samples + (train.steps - self.done) * train.global_batch
        if not made_for or wanted <= made_for:
            return ""
        return (
            f"data.order megatron: the order stays as it was made for {made_for} samples when the run began; the run "
            f"now reads {wanted}, and starts the order over where it ends (Megatron-LM would make another order, and "
            "read some samples again and others never)"
        )

    def rewind(self, checkpoints: list[Path], *, say: Callable[[str], None]) -> None:
        """Goes back to the newest of these checkpoints that is whole, or to the start of the run where there are none,
        and leaves out the samples that were read since.

        Raises:
            UserError: none is whole, or this was done too often.
        """
        end, skipped = self.position.place, self.position.skipped
        self.rewinds += 1
        if self.rewinds > MAX_REWINDS:
            raise UserError(f"rewound {MAX_REWINDS} times: it is not the data", "lower the rate, or look at the model")
        verified = partial(newest_intact_checkpoint, log=say, model=self.config)
        checkpoint = verified(checkpoints, self.ranks) if checkpoints else None
        if self._prefetch is not None:
            self._prefetch.close()
            self._prefetch = None
        if checkpoint is None:
            self.position, self.updates = self._initial_position(), 0
            self.spikes.recent = []
        self.start(checkpoint)
        self.position.skipped = skipped
        first, last = skipped.skip_range(self.position.samples, end)
        say(f" REWOUND to step {self.done} ({checkpoint or 'the start'}); samples {first} to {last} are left out now")

    @cached_property
    def _inputs(self) -> dict[str, str]:
        """Digests of data and tokenizer, for the checkpoints: they are read once, by the process that writes them."""
        return input_digests(self.recipe) if self.ranks.first else {}

    def tensors_to_save(self) -> dict[str, TensorShard]:
        """The weights and moments that this process writes, by global name."""
        found: dict[str, TensorShard] = {}
        moments = self.optimizer.moments()
        for path, (shard, parameter) in shards(self.parts, self.ranks).items():
            if not shard.written_by(self.ranks) or 0 in shard.local_shape:
                continue
            found[shard.name] = TensorShard(local(parameter).detach(), shard.shape, shard.offset)
            for moment, by_path in moments.items():
                found[f"{moment}.{shard.name}"] = TensorShard(by_path[path], shard.shape, shard.offset)
        return found

    def save(self, *, wait: bool = True) -> Path:
        """Writes a checkpoint of the present step, or has it written while training goes on.

        Nothing else decides what follows: samples and their order are functions of the seed, a batch of the position,
        the learning rate of the step, and no random number is drawn after the initial weights.
        """
        with self.clock.whole("checkpoint"):
            return self._save(wait=wait)

    def _save(self, *, wait: bool) -> Path:
        kept = {"recent_losses": self.spikes.recent}
        texts = {"config.json": json.dumps(self.config.to_json(), indent=1), "recipe.toml": to_toml(self.recipe)}
        state = {
            "updates": self.updates, "loss_scale": asdict(self.scale), "seed": self.recipe.seed,
            "inputs": self._inputs, **self.position.to_state(),
            "versions": {"arriero": __version__, "torch": torch.__version__}, "processes": self.ranks.world,
            **{key: value for key, value in kept.items() if value},
        }  # fmt: skip
        self.saver.save(self.done, self.tensors_to_save(), state=state, texts=texts)
        if wait:
            self.saver.wait()
        return step_directory(self.saver.root, self.done)

    def micro_batches(self, batches: Batches, place: int) -> list[MicroBatch]:
        """This rank's samples of the global batch that begins at sample `place`, cut into micro-batches."""
        train = self.recipe.train
        share = train.global_batch // self.ranks.data
        first = place + self.ranks.data_rank * share
        return [
            micro_batch(
                *batches.samples(start, train.micro_batch), config=self.recipe.parallel, ranks=self.ranks,
                device=self.device,
            )
            for start in range(first, first + share, train.micro_batch)
        ]  # fmt: skip

    def next_batch(self) -> list[MicroBatch]:
        """The micro-batches of the coming step, made ahead on another thread."""
        if self._prefetch is None:
            step_starts = self.position.step_starts(self.recipe.train.steps, self.recipe.train.global_batch)
            self._prefetch = Prefetch(partial(self.micro_batches, self.batches), step_starts)
        return next(self._prefetch)

    def close(self) -> None:
        """Ends the thread that makes batches, which would keep this trainer and its memory alive."""
        if self._prefetch is not None:
            self._prefetch.close()

    def forward_backward(self, micro: list[MicroBatch], *, train: bool) -> torch.Tensor:
        """The mean loss over the global batch, a float64 scalar on the device; with `train`, its gradient is left in
        the parameters.

        Where no label carries a loss there is no mean: it is NaN, on all processes, and nothing is computed.
        """
        counts = torch.tensor([sum(m.valid for m in micro), sum(m.squares for m in micro)], dtype=torch.float64)
        valid, squares = self.ranks.sum(counts, *BATCH).tolist()
        self.labels = int(valid)
        tokens = self.recipe.train.global_batch * self.recipe.train.sequence_length
        self.attended = squares / self.ranks.context / tokens
        self.clock.mark("communication")
        if not self.labels:
            return torch.full((), math.nan, dtype=torch.float64, device=self.device)
        weight = self.scale.scale / valid
        if self.pipeline is not None:
            total = self.pipeline.run(micro, weight=weight, train=train)
        else:
            total = self._accumulate(micro, weight, train=train)
        if train:
            sum_tied_gradients(self.parts, self.config, self.ranks)
        loss = self.ranks.sum(total, "pipeline", *BATCH) / valid
        self.clock.mark("communication")
        return loss

    def _accumulate(self, micro: list[MicroBatch], weight: float, *, train: bool) -> torch.Tensor:
        """The summed loss of this rank's micro-batches, float64; with `train`, gradients of weight x loss are added."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        self.parts[0].loss_scale = weight
        for i, m in enumerate(micro):
            loss = self.forward(m.tokens, m.positions, m.mask, labels=m.labels)
            self.clock.mark("forward")
            if train:
                set_gradient_sync(self.parts[0], self.recipe.parallel.zero_stage, last=i == len(micro) - 1)
                loss.backward()
                self.clock.mark("backward")
            total += loss.detach().sum()
        return total / weight

    def step(self, stop: Callable[[], bool] = lambda: False) -> StepResult:
        """One optimizer step: batch, loss, gradient, norm, update. `stop` says whether this process was asked to end
        the run; they agree on it where they agree on the step."""
        train = self.recipe.train
        shown = (self.done + 1) % self.recipe.log.every == 0
        self.clock.begin(shown=shown)
        micro = self.next_batch()
        self.clock.mark("data_wait")
        mean = self.forward_backward(micro, train=True)
        scale = self.scale.scale
        if self.labels:
            self.optimizer.collect_gradients()
            # The one wait for the device in a step: whether it is accepted hangs on these two.
            loss, norm = torch.stack((mean, self.optimizer.gradient_norm().to(mean.device) / scale)).tolist()
            finite, accepted, stopping = self._agree_on_step(loss, norm, stop=stop())
        else:
            loss, norm, finite, accepted = math.nan, 0.0, True, False
            (stopping,) = self.ranks.any(stop())
        rate = learning_rate(self.recipe.schedule, self.done, train.steps)
        if accepted:
            clip = min(1.0, train.grad_clip / (norm + 1e-6)) if train.grad_clip else 1.0
            self.optimizer.step(lr=rate, divisor=scale / clip)
            self.updates += 1
        self.optimizer.clear()
        if self.fp16 and self.labels:
            self.scale.update(finite=finite)
        self.position.advance(train.global_batch, train.sequence_length)
        self.clock.mark("optimizer")
        if shown:
            synchronize(self.kind)  # the marks' times can be read once all of them have passed
        return StepResult(
            step=self.done, samples=self.position.samples, tokens=self.position.tokens, loss=loss, grad_norm=norm,
            learning_rate=rate, loss_scale=scale, skipped=not accepted, stop=stopping,
            spike=finite and not accepted and self.labels > 0, unlabelled=not self.labels,
            seconds=self.clock.since_begin(), phases=self.clock.take(), attended=self.attended,
        )  # fmt: skip

    def _agree_on_step(self, loss: float, norm: float, *, stop: bool) -> tuple[bool, bool, bool]:
        """Whether all processes found loss and gradient finite, whether all of them accept the step, and whether any
        was asked to stop.

        Loss and norm are sums over most processes already; over the copies of a gradient they are not.
        """
        finite = math.isfinite(norm) and math.isfinite(loss)
        spike = finite and self.recipe.train.on_spike != "ignore" and loss > self.spikes.limit()
        nonfinite, spikes, stopping = self.ranks.any(not finite, spike, stop)
        if not nonfinite and not spikes and self.recipe.train.on_spike != "ignore":
            self.spikes.add(loss)
        return not nonfinite, not nonfinite and not spikes, stopping

    def check_replicas(self) -> None:
        """Compares what several processes hold alike, weights and moments. Raises CheckFailed on all processes."""
        moments, state = self.optimizer.moments(), []
        for path, (shard, parameter) in shards(self.parts, self.ranks).items():
            over = tuple(n for n, size in self.ranks.sizes.items() if size > 1 and n not in shard.sharded_over)
            if over and 0 not in shard.local_shape:
                state.append(ReplicatedTensor(shard.name, local(parameter), over))
                state += [ReplicatedTensor(f"{moment}.{shard.name}", of[path], over) for moment, of in moments.items()]
        check_replicas(state, self.ranks, self.done)

    @torch.no_grad()
    def validate(self) -> float:
        """The mean loss over the first batches of the validation split, the same ones every time.

        Batches without a label that carries a loss are left out of it; NaN if no batch has one.
        """
        with self.clock.whole("validation"):
            return self._validate()

    def _validate(self) -> float:
        batches, train = self._validation, self.recipe.train
        step_starts, losses = range(0, train.eval_batches * train.global_batch, train.global_batch), []
        for place in step_starts:
            loss = self.forward_backward(self.micro_batches(batches, place), train=False)
            losses += [loss.item()] if self.labels else []
        for part in self.parts:
            reshard(part)
        self.validation_batches = len(losses)
        return sum(losses) / len(losses) if losses else math.nan
