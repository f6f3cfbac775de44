"""The output head and its cross-entropy in one pass, which never holds all logits in float32.

The loss is a scalar, so its gradient is known as soon as the logits are: forward computes it at once, in the logits'
own memory, and backward only returns it. How many logits are held at once, in the compute dtype and in float32,
device.py says.

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

from arriero.common.device import logits_chunk_size, softmax_chunk_size
from arriero.model.cpu import product

IGNORE_INDEX = -100
"""The label of a token that carries no loss."""


class VocabularyShard(NamedTuple):
    """This process's shard of the vocabulary.

    Attributes:
        first: the first entry that is held here.
        gather: [...] of this process -> [processes, ...] of all that share the vocabulary.
    """

    first: int
    gather: Callable[[Tensor], Tensor]


def summed_loss(head: nn.Linear, x_BLD: Tensor, labels_BL: Tensor, scale: float = 1.0, **options: Any) -> Tensor:
    """scale x cross-entropy summed over valid tokens, nats, [1], in float32 at least; see `linear_cross_entropy`."""
    return linear_cross_entropy(x_BLD.flatten(0, 1), head.weight, labels_BL.flatten(), scale=scale, **options)


def loss_and_gradient(
    logits_NV: Tensor, labels_N: Tensor, scale: Tensor, cut: VocabularyShard | None, train: bool
) -> Tensor:
    """scale x the summed loss, [], in `scale`'s dtype; in training the logits are overwritten by its gradient."""
    valid = labels_N != IGNORE_INDEX
    labels = labels_N - (cut.first if cut else 0)
    held = valid if cut is None else valid & (labels >= 0) & (labels < logits_NV.shape[1])
    labels = torch.where(held, labels, 0)[:, None]
    top_N = logits_NV.amax(1).to(scale.dtype)
    picked_N = logits_NV.gather(1, labels).squeeze(1).to(scale.dtype) * held
    p_NV = torch.softmax(logits_NV, 1, dtype=scale.dtype)
    sum_N = top_N - p_NV.amax(1).log()  # the logarithm of the sum of exponentials: at the top, p = exp(top) / sum
    factor_N = valid * scale
    if cut is not None:
        sums, chosen = cut.gather(torch.stack((sum_N, picked_N))).unbind(1)
        here_N, sum_N, picked_N = sum_N, sums.logsumexp(0), chosen.sum(0)
        factor_N = factor_N * (here_N - sum_N).exp()
    if train:
        p_NV.mul_(factor_N[:, None])
        p_NV.scatter_add_(1, labels, (held * -scale)[:, None])
        logits_NV.copy_(p_NV)
    # Not a product with `valid`: an infinite logit would make 0 x inf of an ignored token.
    return torch.where(valid, sum_N - picked_N, 0.0).sum() * scale


def linear_cross_entropy(
    x_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, *, scale: float = 1.0, cut: VocabularyShard | None = None,
    chunk: Callable[..., Tensor] = loss_and_gradient,
) -> Tensor:  # fmt: skip
    """scale x sum over valid tokens of -log softmax(x weight^T)[label], [1], in float32 at least.

    The factor goes into the gradient before it is rounded to the compute dtype, which float16's range needs.

    Args:
        x_ND: hidden states.
        weight_VD: the head, or this process's rows of it.
        labels_N: int64; IGNORE_INDEX carries no loss.
        scale: of the loss, such as 1 / valid tokens.
        cut: for a part of the vocabulary. The loss is then the whole one on every process, and the gradient of x is
            this process's summand of it.
        chunk: `loss_and_gradient`, or itself compiled.
    """
    train = torch.is_grad_enabled() and (x_ND.requires_grad or weight_VD.requires_grad)
    out: Tensor = _LinearCrossEntropy.apply(x_ND, weight_VD, labels_N, _LossOptions(scale, cut, train, chunk))
    return out


class _LossOptions(NamedTuple):
    scale: float
    cut: VocabularyShard | None
    train: bool
    chunk: Callable[..., Tensor]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, options: _LossOptions) -> Tensor:
        device, V = x_ND.device, len(weight_VD)
        wide = torch.float64 if x_ND.dtype == torch.float64 else torch.float32
        total = torch.zeros(1, dtype=wide, device=device)
        scale = torch.full((), options.scale, dtype=wide, device=device)  # a number would be compiled in
        parts: list[Tensor] = []
        weight_grad: Tensor | None = None
        rows = even_chunk(len(x_ND), logits_chunk_size(device.type) // V)
        for x, labels in zip(x_ND.split(rows), labels_N.split(rows), strict=True):
            logits = product(x, weight_VD)
            few = even_chunk(len(x), softmax_chunk_size(device.type) // V)
            for some, of in zip(logits.split(few), labels.split(few), strict=True):
                total += options.chunk(some, of, scale, options.cut, options.train)
            if options.train:
                parts.append(product(logits, weight_VD.t()))
                more = product(logits.t(), x.t())
                weight_grad = more if weight_grad is None else weight_grad.to(wide).add_(more)
            del logits
        if options.train:
            assert weight_grad is not None
            ctx.save_for_backward(parts[0] if len(parts) == 1 else torch.cat(parts), weight_grad.to(weight_VD.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x_grad, weight_grad = ctx.saved_tensors
        if upstream.device.type != "cpu" or upstream.item() != 1.0:  # to look at it costs a wait elsewhere
            x_grad, weight_grad = (g * upstream.to(g.dtype) for g in (x_grad, weight_grad))
        return x_grad, weight_grad, None, None


def even_chunk(count: int, most: int) -> int:
    """How many of `count` to take at a time, at most `most`, so that the last part is no smaller than need be."""
    return -(-count // -(-count // max(1, most)))
