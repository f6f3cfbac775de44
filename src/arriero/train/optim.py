"""AdamW (arXiv:1711.05101) on the local parts of the parameters, and the global gradient norm.

The update is elementwise, so each process runs it on plain local tensors whatever the layout; only the norm is summed
over processes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from arriero.common.device import fused_adamw_takes_grad_scale
from arriero.distributed.parallel.mesh import Ranks
from arriero.distributed.parallel.shards import Shard, local, local_gradient, shards
from arriero.model.llama import Llama
from arriero.train.config import OptimConfig

MOMENTS = ("exp_avg", "exp_avg_sq")


class Optimizer:
    """AdamW over what this process holds of the model, keyed by path in it; `start` comes first.

    torch's own kernel is called as it is: torch.optim's objects import the compiler, which takes seconds.
    """

    def __init__(self, parts: list[Llama], config: OptimConfig, ranks: Ranks) -> None:
        self.ranks, self.config = ranks, config
        self.shards: dict[str, Shard] = {}
        self._parameters: dict[str, nn.Parameter] = {}
        for name, (shard, parameter) in shards(parts, ranks).items():
            if 0 in shard.local_shape:
                continue  # an uneven cut left this process nothing of it
            self.shards[name] = shard
            self._parameters[name] = parameter
        self.gradients: dict[str, Tensor] = {}
        self.masters: dict[str, Tensor] = {}
        """The values that are updated: the parameters' own memory, or with `offload` copies on the CPU."""
        self._moments: dict[str, dict[str, Tensor]] = {moment: {} for moment in MOMENTS}
        self._updates = torch.zeros(())

    def start(self, moments: Mapping[str, Mapping[str, Tensor]] | None, updates: int) -> None:
        """Takes over the parameters' values, once they are loaded, and begins after `updates` updates.

        All memory is taken here, so that the first step is as quick as the others.

        Args:
            moments: as `moments()` gave them; None for zeros.
            updates: how many have been made.
        """
        for name, parameter in self._parameters.items():
            held = local(parameter).detach()
            if not self.config.offload:
                self.masters[name] = held
            elif name in self.masters:
                self.masters[name].copy_(held)
            else:
                self.masters[name] = held.to("cpu", copy=True)
        for moment, by_name in self._moments.items():
            for name, master in self.masters.items():
                if moments is None:
                    by_name[name] = by_name[name].zero_() if name in by_name else torch.zeros_like(master)
                else:
                    by_name[name] = moments[moment][name].to(dtype=master.dtype, device=master.device)
        self._updates = torch.tensor(float(updates), device=self.device)

    @property
    def device(self) -> torch.device:
        """Where the update is computed."""
        return next(iter(self.masters.values())).device

    def collect_gradients(self) -> None:
        """Takes the gradients that the model holds now; with `offload` they are fetched."""
        self.gradients = {}
        for name, parameter in self._parameters.items():
            if not self.config.offload:
                self.masters[name] = local(parameter).detach()  # FSDP may have put it elsewhere
            gradient = local_gradient(parameter)
            if gradient is not None:
                self.gradients[name] = gradient.to(self.masters[name].device)

    def gradient_norm(self) -> Tensor:
        """The L2 norm of the whole gradient, a float64 scalar on every process, each element counted once."""
        counted = [(g, self.shards[n]) for n, g in self.gradients.items() if not self.shards[n].copy]
        by_tensor = _sum_of_squares([g for g, s in counted if "tensor" in s.sharded_over], self.device)
        others = _sum_of_squares([g for g, s in counted if "tensor" not in s.sharded_over], self.device)
        # ZeRO cuts every parameter and the pipeline every model: these sums are over all of them.
        return self.ranks.sum(others + self.ranks.sum(by_tensor, "tensor"), "zero", "pipeline").sqrt()

    @torch.no_grad()
    def step(self, *, lr: float, divisor: float) -> None:
        """Updates the parameters at rate `lr` with the gradients over `divisor`; the gradients are lost thereby."""
        scale = None
        if divisor != 1.0:
            if fused_adamw_takes_grad_scale(self.device.type) and self._updates_in_float32():
                scale = torch.tensor(divisor, dtype=torch.float32, device=self.device)
            else:
                torch._foreach_mul_(list(self.gradients.values()), 1.0 / divisor)
        self._updates += 1
        decayed = [n for n in self.gradients if len(self.shards[n].shape) > 1]
        exempt = [n for n in self.gradients if len(self.shards[n].shape) == 1]
        self._update(decayed, lr, self.config.weight_decay, scale)
        self._update(exempt, lr, 0.0, scale)
        if self.config.offload:
            for name, parameter in self._parameters.items():
                local(parameter).detach().copy_(self.masters[name])

    def _updates_in_float32(self) -> bool:
        """Whether the kernel's divisor, a float32, is as exact as the gradients: not in a float64 proof."""
        return all(gradient.dtype == torch.float32 for gradient in self.gradients.values())

    def _update(self, names: list[str], lr: float, weight_decay: float, divisor: Tensor | None) -> None:
        if not names:
            return
        first, second = (self._moments[moment] for moment in MOMENTS)
        torch._fused_adamw_(
            [self.masters[n] for n in names], [self.gradients[n] for n in names], [first[n] for n in names],
            [second[n] for n in names], [], [self._updates] * len(names), lr=lr, beta1=self.config.betas[0],
            beta2=self.config.betas[1], weight_decay=weight_decay, eps=self.config.eps, amsgrad=False, maximize=False,
            grad_scale=divisor, found_inf=None,
        )  # fmt: skip

    def clear(self) -> None:
        """Forgets all gradients."""
        self.gradients = {}
        for parameter in self._parameters.values():
            parameter.grad = None

    def moments(self) -> dict[str, dict[str, Tensor]]:
        """{exp_avg, exp_avg_sq} -> parameter name -> local part."""
        return self._moments


def _sum_of_squares(gradients: list[Tensor], device: torch.device) -> Tensor:
    total = torch.zeros((), dtype=torch.float64, device=device)
    return total + torch.stack(torch._foreach_norm(gradients)).double().square().sum() if gradients else total
