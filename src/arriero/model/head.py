"""The output head and its cross-entropy in one pass, which never holds all logits in float32.

The loss is a scalar, so its gradient is known as soon as the logits are: forward computes it at once, in the logits'
own memory, and backward only hands it out. No more than LOGITS_AT_ONCE logits are held, in the compute dtype, and no
more than the device's share of those in float32.

The loss is a sum over valid tokens, to be divided by the global number of valid tokens. Dividing once, by the count
over all micro-batches and data-parallel ranks, is what makes the loss independent of how a batch was cut; a mean of
means is not.

Shape legend: N tokens, D hidden, V vocabulary, or this process's part of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from arriero.device import softmax_at_once

IGNORED = -100
"""The label of a token that carries no loss."""
LOGITS_AT_ONCE = 2**27
"""Logits of one matmul, 256 MiB in bfloat16: large enough to keep any device busy."""


class VocabularyCut(NamedTuple):
    """How this process's part of the vocabulary lies in the whole.

    Attributes:
        first: the first entry that is held here.
        gather: [...] of this process -> [processes, ...] of all that share the vocabulary.
    """

    first: int
    gather: Callable[[Tensor], Tensor]


def summed_loss(head: nn.Linear, x_BLD: Tensor, labels_BL: Tensor, scale: float = 1.0) -> Tensor:
    """scale x cross-entropy summed over valid tokens, nats, [1], in float32 at least; see `linear_cross_entropy`."""
    return linear_cross_entropy(x_BLD.flatten(0, 1), head.weight, labels_BL.flatten(), scale=scale)


def linear_cross_entropy(
    x_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, *, scale: float = 1.0, cut: VocabularyCut | None = None
) -> Tensor:
    """scale x sum over valid tokens of -log softmax(x weight^T)[label], [1], in float32 at least.

    The factor goes into the gradient before it is rounded to the compute dtype, which float16's range needs.

    Args:
        x_ND: hidden states.
        weight_VD: the head, or this process's rows of it.
        labels_N: int64; IGNORED carries no loss.
        scale: of the loss, such as 1 / valid tokens.
        cut: for a part of the vocabulary. The loss is then the whole one on every process, and the gradient of x is
            this process's summand of it.
    """
    train = torch.is_grad_enabled() and (x_ND.requires_grad or weight_VD.requires_grad)
    out: Tensor = _LinearCrossEntropy.apply(x_ND, weight_VD, labels_N, _How(scale, cut, train))
    return out


class _How(NamedTuple):
    scale: float
    cut: VocabularyCut | None
    train: bool


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, how: _How) -> Tensor:
        wide = torch.float64 if x_ND.dtype == torch.float64 else torch.float32
        total = torch.zeros(1, dtype=wide, device=x_ND.device)
        parts: list[Tensor] = []
        weight_grad: Tensor | None = None
        rows = max(1, LOGITS_AT_ONCE // len(weight_VD))
        for x, labels in zip(x_ND.split(rows), labels_N.split(rows), strict=True):
            logits = torch.mm(x, weight_VD.t())
            few = max(1, softmax_at_once(x.device.type) // len(weight_VD))
            for some, of in zip(logits.split(few), labels.split(few), strict=True):
                total += _loss_and_gradient(some, of, how, wide)
            if how.train:
                parts.append(torch.mm(logits, weight_VD))
                more = torch.mm(logits.t(), x)
                weight_grad = more if weight_grad is None else weight_grad.to(wide).add_(more)
            del logits
        if how.train:
            assert weight_grad is not None
            ctx.save_for_backward(parts[0] if len(parts) == 1 else torch.cat(parts), weight_grad.to(weight_VD.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x_grad, weight_grad = ctx.saved_tensors
        if upstream.device.type != "cpu" or upstream.item() != 1.0:  # to look at it costs a wait elsewhere
            x_grad, weight_grad = (g * upstream.to(g.dtype) for g in (x_grad, weight_grad))
        return x_grad, weight_grad, None, None


def _loss_and_gradient(logits_NV: Tensor, labels_N: Tensor, how: _How, wide: torch.dtype) -> Tensor:
    """scale x the summed loss, []; in training the logits are overwritten by its gradient."""
    scale, cut, _ = how
    valid = labels_N != IGNORED
    labels = labels_N - (cut.first if cut else 0)
    held = valid if cut is None else valid & (labels >= 0) & (labels < logits_NV.shape[1])
    labels = torch.where(held, labels, 0)[:, None]
    top_N = logits_NV.amax(1).to(wide)
    picked_N = logits_NV.gather(1, labels).squeeze(1).to(wide) * held
    p_NV = torch.softmax(logits_NV, 1, dtype=wide)
    sum_N = top_N - p_NV.amax(1).log()  # the logarithm of the sum of exponentials: at the top, p = exp(top) / sum
    factor_N = valid.to(wide) * scale
    if cut is not None:
        sums, chosen = cut.gather(torch.stack((sum_N, picked_N))).unbind(1)
        here_N, sum_N, picked_N = sum_N, sums.logsumexp(0), chosen.sum(0)
        factor_N = factor_N * (here_N - sum_N).exp()
    if how.train:
        p_NV.mul_(factor_N[:, None])
        p_NV.scatter_add_(1, labels, (held.to(wide) * -scale)[:, None])
        logits_NV.copy_(p_NV)
    # Not a product with `valid`: an infinite logit would make 0 x inf of an ignored token.
    return torch.where(valid, sum_N - picked_N, 0.0).sum() * scale
