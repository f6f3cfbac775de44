"""Context parallelism: the processes of a group share each sequence's positions.

all-gather: every process gathers all keys and values and attends with its own queries (Llama 3, arXiv:2407.21783,
3.3.2). Under a causal mask late positions cost more, so a sequence is cut into 2c pieces and process r takes pieces r
and 2c - 1 - r. Ulysses (arXiv:2309.14509): an all-to-all exchanges positions for heads before attention, and back.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed import _functional_collectives as collectives

from arriero.distributed.parallel.config import ParallelConfig
from arriero.distributed.parallel.mesh import Ranks
from arriero.model import ops
from arriero.model.llama import Llama


def positions_of(rank: int, config: ParallelConfig, length: int) -> Tensor:
    """The positions, int64 [length / c], that context rank `rank` holds."""
    degree, everything = config.context_parallel, torch.arange(length)
    if config.context_method == "ulysses":
        return everything.chunk(degree)[rank]
    pieces = everything.chunk(2 * degree)
    return torch.cat((pieces[rank], pieces[2 * degree - 1 - rank])) if degree > 1 else everything


# torch 2.13 renamed it, and warns under the old name
all_gather = getattr(collectives, "all_gather_single_autograd", None) or collectives.all_gather_tensor_autograd


def apply_context_parallel(model: Llama, config: ParallelConfig, ranks: Ranks, length: int) -> None:
    """Replaces each layer's attention by one over the whole sequence, in place."""
    assert ranks.context_group is not None
    kind = AllGatherAttention if config.context_method == "all-gather" else UlyssesAttention
    for layer in model.model.layers.values():
        layer.self_attn.attend = kind(config, ranks, length)  # type: ignore[union-attr]


class AllGatherAttention:
    """This process's queries against the keys and values of all."""

    def __init__(self, config: ParallelConfig, ranks: Ranks, length: int) -> None:
        self.group: ProcessGroup = ranks.context_group  # type: ignore[assignment]
        held = torch.cat([positions_of(r, config, length) for r in range(config.context_parallel)])
        self.natural = held.argsort()  # where position i lies in what is gathered
        mine = positions_of(ranks.context_rank, config, length)
        self.causal = (mine[:, None] >= torch.arange(length))[None, None]

    def _move(self, device: torch.device) -> None:
        """Brings order and mask to the device, once."""
        if self.causal.device != device:
            self.natural, self.causal = self.natural.to(device), self.causal.to(device)

    def __call__(self, q_BLHK: Tensor, k_BLGK: Tensor, v_BLGK: Tensor, mask: Tensor | None = None) -> Tensor:
        """As ops.causal_attention; `mask` is [B, 1, L / c, L]."""
        self._move(q_BLHK.device)
        both = torch.stack((k_BLGK, v_BLGK)).transpose(0, 2).contiguous()  # [L / c, B, 2, G, K]
        gathered = all_gather(both, 0, self.group)
        keys, values = gathered[self.natural].transpose(0, 2).unbind(0)
        return ops.causal_attention(q_BLHK, keys, values, self.causal if mask is None else mask)


class UlyssesAttention:
    """All positions of this process's part of the heads."""

    def __init__(self, config: ParallelConfig, ranks: Ranks, length: int) -> None:
        self.group: ProcessGroup = ranks.context_group  # type: ignore[assignment]
        self.degree = config.context_parallel

    def __call__(self, q_BLHK: Tensor, k_BLGK: Tensor, v_BLGK: Tensor, mask: Tensor | None = None) -> Tensor:
        """As ops.causal_attention; `mask` is [B, 1, L, L]."""
        q, k, v = (self._heads_for_positions(x) for x in (q_BLHK, k_BLGK, v_BLGK))
        return self._positions_for_heads(ops.causal_attention(q, k, v, mask))

    def _heads_for_positions(self, x_BLHK: Tensor) -> Tensor:
        """[B, L / c, H, K] -> [B, L, H / c, K]."""
        B, part, H, K = x_BLHK.shape
        send = x_BLHK.reshape(B, part, self.degree, H // self.degree, K).permute(2, 1, 0, 3, 4).contiguous()
        received = self._exchange(send)  # [c, L / c, B, H / c, K], the first two in order of position
        return received.flatten(0, 1).transpose(0, 1)

    def _positions_for_heads(self, x_BLHK: Tensor) -> Tensor:
        """[B, L, H / c, K] -> [B, L / c, H, K]."""
        B, L, part, K = x_BLHK.shape
        send = x_BLHK.transpose(0, 1).reshape(self.degree, L // self.degree, B, part, K).contiguous()
        received = self._exchange(send)  # [c, L / c, B, H / c, K], the first in order of head
        return received.permute(2, 1, 0, 3, 4).reshape(B, L // self.degree, self.degree * part, K)

    def _exchange(self, send: Tensor) -> Tensor:
        out: Tensor = collectives.all_to_all_single_autograd(send, None, None, self.group)
        return out.view(send.shape)
