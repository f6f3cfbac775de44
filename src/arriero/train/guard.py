"""Numerics guard: detects loss spikes, and replicated tensors that differ between processes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from arriero.common.errors import CheckFailed
from arriero.common.text import format_ranks
from arriero.distributed.parallel.mesh import DIMENSIONS, Ranks

LOSS_WINDOW, MIN_LOSSES = 100, 20
"""A spike is detected against the last LOSS_WINDOW losses, once there are MIN_LOSSES."""
MAX_REWINDS = 10


@dataclass
class SpikeDetector:
    """Detects a loss spike: a loss above the running median by more than `factor` robust standard deviations
    (1.4826 times the median absolute deviation, at least a hundredth of the median)."""

    factor: float
    recent: list[float] = field(default_factory=list)
    """The last losses without a spike, saved in checkpoints."""

    def limit(self) -> float:
        """The largest loss that is no spike; infinite while too few losses are known."""
        if len(self.recent) < MIN_LOSSES:
            return math.inf
        middle = statistics.median(self.recent)
        deviation = 1.4826 * statistics.median(abs(loss - middle) for loss in self.recent)
        return middle + self.factor * max(deviation, 0.01 * abs(middle))

    def add(self, loss: float) -> None:
        """Adds the loss of an accepted step."""
        self.recent = [*self.recent[1 - LOSS_WINDOW :], loss]


@dataclass(frozen=True)
class ReplicatedTensor:
    """A tensor, and the mesh dimensions over which it is replicated."""

    name: str
    value: Tensor
    over: tuple[str, ...]


def check_replicas(state: Iterable[ReplicatedTensor], ranks: Ranks, step: int) -> None:
    """Compares replicated tensors between processes by a sum over their bits, which one flipped bit changes.

    Raises:
        CheckFailed: on every process; names the processes that differ from most, and the tensors.
    """
    import torch.distributed as dist

    tensors = list(state)
    outliers = ""
    for name in DIMENSIONS:
        mine = [one for one in tensors if name in one.over]
        if ranks.mesh is None or ranks.sizes[name] == 1 or not mine:
            continue
        group = ranks.mesh.get_group(name)
        sums = bit_sums([one.value for one in mine]).to(ranks.mesh.device_type)
        both = torch.stack([sums, -sums])  # the greatest of each: greatest and least
        dist.all_reduce(both, op=dist.ReduceOp.MAX, group=group)
        if torch.equal(both[0], -both[1]):
            continue
        gathered = [torch.empty_like(sums) for _ in range(ranks.sizes[name])]
        dist.all_gather(gathered, sums, group=group)
        outliers = _describe_outliers(
            [one.tolist() for one in gathered], [one.name for one in mine], dist.get_process_group_ranks(group)
        )
    lines = list(dict.fromkeys(line for line in ranks.gather_texts(outliers) if line)) if ranks.mesh is not None else []
    if lines:
        raise CheckFailed(f"after step {step} copies of one state differ: {'; '.join(lines)}; the run has stopped")


def _describe_outliers(rows: list[list[int]], names: list[str], members: list[int]) -> str:
    """Which ranks differ from the majority, and in which tensor; all of them where there is none."""
    kinds: dict[tuple[int, ...], list[int]] = {}
    for member, row in zip(members, rows, strict=True):
        kinds.setdefault(tuple(row), []).append(member)
    by_size = sorted(kinds.items(), key=lambda item: -len(item[1]))
    common, most = by_size[0]
    outliers = []
    for sums, found in by_size[1:]:
        wrong = [name for name, a, b in zip(names, sums, common, strict=True) if a != b]
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        relation = "and" if len(found) == len(most) else "from"
        outliers.append(f"{format_ranks(found)} {relation} {format_ranks(most)} in {wrong[0]}{more}")
    return "; ".join(outliers)


def bit_sums(tensors: list[Tensor]) -> Tensor:
    """For each tensor the sum of its bytes taken as whole numbers, int64 (it may wrap around): one number a tensor."""
    sizes = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = [t.detach().contiguous().view(-1).view(sizes[t.element_size()]).sum(dtype=torch.int64) for t in tensors]
    return torch.stack(sums)
