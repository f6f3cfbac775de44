"""What a process holds of the model, and the loss of a step's micro-batches through it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from arriero.distributed.parallel.apply import WeightSource, load_weights
from arriero.distributed.parallel.mesh import Ranks
from arriero.distributed.parallel.microbatch import MicroBatch
from arriero.distributed.parallel.pipeline import Pipeline, sum_tied_gradients
from arriero.distributed.parallel.zero import reshard, set_gradient_sync
from arriero.model.config import LlamaConfig
from arriero.model.llama import Llama
from arriero.observe.step_time import StepClock


@dataclass
class ModelParts:
    """The model's parts on this process, one a pipeline stage, laid out over the processes."""

    config: LlamaConfig
    """The whole model's shape."""
    parts: list[Llama]
    """The parts; without a pipeline there is one."""
    forward: nn.Module
    """The first part, called in the compute dtype."""
    pipeline: Pipeline | None
    """Runs the stages' forward and backward passes; None without pipeline parallelism."""
    zero_stage: int
    """ZeRO's stage, which decides when gradients are summed."""
    ranks: Ranks
    device: torch.device
    clock: StepClock
    """Takes the time of forward and backward passes."""

    def load(self, source: WeightSource) -> None:
        """Fills this process's part of every parameter. Raises UserError for a tensor of another shape."""
        load_weights(self.parts, source, self.ranks)

    def summed_loss(self, micro: list[MicroBatch], *, weight: float, train: bool) -> torch.Tensor:
        """The summed loss of this process's micro-batches, a float64 scalar; zero on all but the last pipeline stage.

        With `train` the gradient of weight x loss is added to the parameters.
        """
        if self.pipeline is not None:
            total = self.pipeline.run(micro, weight=weight, train=train)
        else:
            total = self._accumulate(micro, weight, train=train)
        if train:
            sum_tied_gradients(self.parts, self.config, self.ranks)
        return total

    def _accumulate(self, micro: list[MicroBatch], weight: float, *, train: bool) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        self.parts[0].loss_scale = weight
        for i, m in enumerate(micro):
            loss = self.forward(m.tokens, m.positions, m.mask, labels=m.labels)
            self.clock.mark("forward")
            if train:
                set_gradient_sync(self.parts[0], self.zero_stage, last=i == len(micro) - 1)
                loss.backward()
                self.clock.mark("backward")
            total += loss.detach().sum()
        return total / weight

    def reshard(self) -> None:
        """Frees the gathered parameters that stay after a forward pass without backward under ZeRO."""
        for part in self.parts:
            reshard(part)
