"""AdamW (arXiv:1711.05101) on the local parts of the parameters, and the global gradient norm.

The update is elementwise, so each process runs it on plain local tensors whatever the layout; only the norm is summed
over processes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from arriero.errors import UserError
from arriero.model.llama import Llama
from arriero.parallel.mesh import Ranks
from arriero.parallel.shards import Shard, local, local_gradient, shards

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class OptimConfig:
    """AdamW's constants."""

    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the first and the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices; norms and biases are exempt."""
    offload: bool = False
    """Keep moments and masters in the CPU's memory and update there: slower, and room for a larger model."""

    def problems(self) -> list[UserError]:
        """All that is impossible about it."""
        found = []
        if not all(0 <= beta < 1 for beta in self.betas):
            found.append(UserError(f"optim.betas is {self.betas}", "give two numbers from 0 to below 1"))
        if self.eps <= 0 or self.weight_decay < 0:
            found.append(UserError("optim.eps must be positive and optim.weight_decay not negative", "mend the value"))
        return found


class Optimizer:
    """AdamW over what this process holds of the model, keyed by path in it."""

    def __init__(self, parts: list[Llama], config: OptimConfig, ranks: Ranks) -> None:
        self.ranks, self.offload = ranks, config.offload
        self.shards: dict[str, Shard] = {}
        self._parameters: dict[str, nn.Parameter] = {}
        self._locals: dict[str, nn.Parameter] = {}
        for name, (shard, parameter) in shards(parts, ranks).items():
            if 0 in shard.local_shape:
                continue  # an uneven cut left this process nothing of it
            self.shards[name] = shard
            self._parameters[name] = parameter
            held = local(parameter).detach()
            self._locals[name] = nn.Parameter(held.to("cpu", copy=True) if self.offload else held)
        self.device = next(iter(self._locals.values())).device
        decayed = [p for n, p in self._locals.items() if len(self.shards[n].shape) > 1]
        exempt = [p for n, p in self._locals.items() if len(self.shards[n].shape) == 1]
        groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": exempt, "weight_decay": 0.0}]
        self.adamw = torch.optim.AdamW(
            [g for g in groups if g["params"]], lr=0.0, betas=config.betas, eps=config.eps, fused=True
        )

    def take_gradients(self) -> None:
        """Points the local parameters at the values and gradients that the model holds now, or fetches gradients."""
        for name, parameter in self._parameters.items():
            ours, gradient = self._locals[name], local_gradient(parameter)
            if self.offload:
                ours.grad = None if gradient is None else gradient.to("cpu")
            else:
                ours.data = local(parameter).detach()
                ours.grad = gradient

    def gradient_norm(self) -> Tensor:
        """The L2 norm of the whole gradient, a float64 scalar on every process, each element counted once."""
        counted = [(p.grad, self.shards[n]) for n, p in self._locals.items() if not self.shards[n].copy]
        by_tensor = _sum_of_squares([g for g, s in counted if g is not None and "tensor" in s.cut_over], self.device)
        others = _sum_of_squares([g for g, s in counted if g is not None and "tensor" not in s.cut_over], self.device)
        # ZeRO cuts every parameter and the pipeline every model: these sums are over all of them.
        return self.ranks.sum(others + self.ranks.sum(by_tensor, "tensor"), "zero", "pipeline").sqrt()

    def step(self, *, lr: float, gradient_scale: float) -> None:
        """Multiplies the gradients by `gradient_scale` and updates the parameters at rate `lr`."""
        gradients = [p.grad for p in self._locals.values() if p.grad is not None]
        if gradient_scale != 1.0:
            torch._foreach_mul_(gradients, gradient_scale)
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        if self.offload:
            for name, parameter in self._parameters.items():
                local(parameter).detach().copy_(self._locals[name].detach())

    def take_values(self) -> None:
        """Takes over the parameters' values, once they are loaded."""
        for name, parameter in self._parameters.items():
            self._locals[name].data.copy_(local(parameter).detach())

    def clear(self) -> None:
        """Forgets all gradients."""
        for name, parameter in self._parameters.items():
            parameter.grad = None
            self._locals[name].grad = None

    def moments(self) -> dict[str, dict[str, Tensor]]:
        """{exp_avg, exp_avg_sq} -> parameter name -> local part; zeros before the first step."""
        state = self.adamw.state
        return {
            moment: {n: state[p][moment] if p in state else torch.zeros_like(p) for n, p in self._locals.items()}
            for moment in MOMENTS
        }

    def load_moments(self, moments: dict[str, dict[str, Tensor]], updates: int) -> None:
        """Takes over moments as `moments` gives them, after `updates` updates."""
        for name, parameter in self._locals.items():
            step = torch.tensor(float(updates), device=parameter.device)
            values = {m: moments[m][name].to(parameter.dtype).to(parameter.device) for m in MOMENTS}
            self.adamw.state[parameter] = {"step": step, **values}


def _sum_of_squares(gradients: list[Tensor], device: torch.device) -> Tensor:
    total = torch.zeros((), dtype=torch.float64, device=device)
    return total + torch.stack(torch._foreach_norm(gradients)).double().square().sum() if gradients else total
