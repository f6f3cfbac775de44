"""The optimizer over the local parts of the parameters, and the global gradient norm; AdamW (arXiv:1711.05101).

An update is elementwise, so each process runs it on plain local tensors whatever the layout; only the norm is summed
over processes. Another optimizer is a subclass of `Optimizer` in the table `OPTIMIZERS` (train/config.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from arriero.common.device import fused_adamw_takes_grad_scale
from arriero.distributed.parallel.mesh import Ranks
from arriero.distributed.parallel.shards import Shard, local, local_gradient, shards
from arriero.model.llama import Llama
from arriero.train.config import OPTIMIZERS, OptimConfig


class ParameterGroup(NamedTuple):
    """A row of the table of parameter groups."""

    contains: Callable[[str, tuple[int, ...]], bool]
    """Whether a parameter, by its name and whole shape, belongs to the group."""
    lr: float = 1.0
    """Times the learning rate."""
    weight_decay: float = 1.0
    """Times `optim.weight_decay`."""


MATRICES = ParameterGroup(lambda name, shape: len(shape) > 1)
VECTORS = ParameterGroup(lambda name, shape: len(shape) == 1, weight_decay=0.0)


class Update(NamedTuple):
    """What an update reads and changes: the parameters of one group with their gradients, in the same order."""

    parameters: list[Tensor]
    gradients: list[Tensor]
    states: dict[str, list[Tensor]]
    """State name -> one tensor a parameter."""
    lr: float
    weight_decay: float
    number: Tensor
    """Updates made, this one included, a float32 scalar."""
    divisor: Tensor | None
    """What the gradients are still to be divided by; None where they are, always unless `divides_gradients`."""


class Optimizer:
    """An optimizer over what this process holds of the model, keyed by path in it; `load` comes first.

    A subclass names its states and gives `update`. States have the shape of their parameter, begin at zero, and are
    saved in checkpoints as STATE.PARAMETER.
    """

    state_names: ClassVar[tuple[str, ...]] = ()
    """Tensors that are kept for each parameter."""
    groups: ClassVar[tuple[ParameterGroup, ...]] = (MATRICES, VECTORS)
    """A parameter belongs to the first group that contains it."""
    divides_gradients: ClassVar[bool] = False
    """Whether `update` divides the gradients itself where the device's kernel can."""

    def update(self, u: Update) -> None:
        """Changes parameters and states in place, without gradients being recorded."""
        raise NotImplementedError

    def __init__(self, parts: list[Llama], config: OptimConfig, ranks: Ranks) -> None:
        self.ranks, self.config = ranks, config
        self.shards: dict[str, Shard] = {}
        self._parameters: dict[str, nn.Parameter] = {}
        for name, (shard, parameter) in shards(parts, ranks).items():
            if 0 in shard.local_shape:
                continue  # uneven sharding: this process has no element of it
            self.shards[name] = shard
            self._parameters[name] = parameter
        self.gradients: dict[str, Tensor] = {}
        self.masters: dict[str, Tensor] = {}
        """The values that are updated: the parameters' own memory, or with `offload` copies on the CPU."""
        self._states: dict[str, dict[str, Tensor]] = {state: {} for state in self.state_names}
        self._updates = torch.zeros(())

    def load(self, states: Mapping[str, Mapping[str, Tensor]] | None, updates: int) -> None:
        """Reads the loaded parameters' values and sets the states; all memory is allocated here, not in the first step.

        Args:
            states: as `states()` returned them; None for zeros.
            updates: how many have been made.
        """
        for name, parameter in self._parameters.items():
            value = local(parameter).detach()
            if not self.config.offload:
                self.masters[name] = value
            elif name in self.masters:
                self.masters[name].copy_(value)
            else:
                self.masters[name] = value.to("cpu", copy=True)
        for state, by_name in self._states.items():
            for name, master in self.masters.items():
                if states is None:
                    by_name[name] = by_name[name].zero_() if name in by_name else torch.zeros_like(master)
                else:
                    by_name[name] = states[state][name].to(dtype=master.dtype, device=master.device)
        self._updates = torch.tensor(float(updates), device=self.device)

    @property
    def device(self) -> torch.device:
        """Where the update is computed."""
        return next(iter(self.masters.values())).device

    def collect_gradients(self) -> None:
        """Collects the parameters' local gradients; with `offload` they are copied to the CPU."""
        self.gradients = {}
        for name, parameter in self._parameters.items():
            if not self.config.offload:
                self.masters[name] = local(parameter).detach()  # FSDP may have reallocated it
            gradient = local_gradient(parameter)
            if gradient is not None:
                self.gradients[name] = gradient.to(self.masters[name].device)

    def gradient_norm(self) -> Tensor:
        """The L2 norm of the whole gradient, a float64 scalar on every process, each element counted once."""
        counted = [(g, self.shards[n]) for n, g in self.gradients.items() if not self.shards[n].copy]
        by_tensor = _sum_of_squares([g for g, s in counted if "tensor" in s.sharded_over], self.device)
        others = _sum_of_squares([g for g, s in counted if "tensor" not in s.sharded_over], self.device)
        # ZeRO shards every parameter and the pipeline every model: these sums include all of them.
        return self.ranks.sum(others + self.ranks.sum(by_tensor, "tensor"), "zero", "pipeline").sqrt()

    @torch.no_grad()
    def step(self, *, lr: float, divisor: float) -> None:
        """Updates the parameters at rate `lr` with the gradients over `divisor`; the gradients are overwritten."""
        scale = None
        if divisor != 1.0:
            if self.divides_gradients and fused_adamw_takes_grad_scale(self.device.type) and self._updates_in_float32():
                scale = torch.tensor(divisor, dtype=torch.float32, device=self.device)
            else:
                torch._foreach_mul_(list(self.gradients.values()), 1.0 / divisor)
        self._updates += 1
        remaining = list(self.gradients)
        for group in self.groups:
            names = [n for n in remaining if group.contains(self.shards[n].name, self.shards[n].shape)]
            remaining = [n for n in remaining if n not in set(names)]
            if names:
                self.update(self._of_group(names, lr * group.lr, self.config.weight_decay * group.weight_decay, scale))
        if self.config.offload:
            for name, parameter in self._parameters.items():
                local(parameter).detach().copy_(self.masters[name])

    def _updates_in_float32(self) -> bool:
        """Whether the kernel's divisor, a float32, is as exact as the gradients: not in a float64 proof."""
        return all(gradient.dtype == torch.float32 for gradient in self.gradients.values())

    def _of_group(self, names: list[str], lr: float, weight_decay: float, divisor: Tensor | None) -> Update:
        states = {state: [by_name[n] for n in names] for state, by_name in self._states.items()}
        masters, gradients = [self.masters[n] for n in names], [self.gradients[n] for n in names]
        return Update(masters, gradients, states, lr, weight_decay, self._updates, divisor)

    def clear(self) -> None:
        """Drops all gradients."""
        self.gradients = {}
        for parameter in self._parameters.values():
            parameter.grad = None

    def states(self) -> dict[str, dict[str, Tensor]]:
        """State name -> parameter name -> local part."""
        return self._states


class AdamW(Optimizer):
    """AdamW by torch's fused kernel, called directly: torch.optim imports the compiler, which takes seconds."""

    state_names = ("exp_avg", "exp_avg_sq")
    divides_gradients = True

    def update(self, u: Update) -> None:
        """One fused update of a group."""
        beta1, beta2 = self.config.betas
        torch._fused_adamw_(
            u.parameters, u.gradients, u.states["exp_avg"], u.states["exp_avg_sq"], [],
            [u.number] * len(u.parameters), lr=u.lr, beta1=beta1, beta2=beta2, weight_decay=u.weight_decay,
            eps=self.config.eps, amsgrad=False, maximize=False, grad_scale=u.divisor, found_inf=None,
        )  # fmt: skip


def build_optimizer(parts: list[Llama], config: OptimConfig, ranks: Ranks) -> Optimizer:
    """The optimizer that `optim.name` names, over these parts of the model."""
    optimizer: Optimizer = OPTIMIZERS.get(config.name)(parts, config, ranks)
    return optimizer


def _sum_of_squares(gradients: list[Tensor], device: torch.device) -> Tensor:
    total = torch.zeros((), dtype=torch.float64, device=device)
    return total + torch.stack(torch._foreach_norm(gradients)).double().square().sum() if gradients else total
