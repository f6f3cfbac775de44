"""The loss: a sum over this rank's valid tokens, to be divided by the global number of valid tokens.

Dividing once, by the count over all micro-batches and data-parallel ranks, is what makes the loss independent of how a
batch was cut; a mean of means is not.
"""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor

from arriero.parallel.mesh import Ranks
from arriero.parallel.shards import is_dtensor

IGNORED = -100  # the label of a token that carries no loss


def summed_loss(logits_BLV: Tensor, labels_BL: Tensor) -> Tensor:
    """Cross-entropy summed over valid tokens, nats, in float32 at least.

    The logits may be cut over the vocabulary (a DTensor): then call it, and its backward, inside `loss_context`.
    """
    logits = logits_BLV.flatten(0, 1)
    if logits.dtype != torch.float64:
        logits = logits.float()
    loss = F.cross_entropy(logits, labels_BL.flatten(), ignore_index=IGNORED, reduction="sum")
    return loss.to_local() if is_dtensor(loss) else loss


def loss_context(ranks: Ranks) -> contextlib.AbstractContextManager[None]:
    """Vocabulary-parallel cross-entropy where the head is cut, nothing otherwise."""
    if ranks.sizes["tensor"] == 1:
        return contextlib.nullcontext()
    from torch.distributed.tensor.parallel import loss_parallel

    return loss_parallel()
