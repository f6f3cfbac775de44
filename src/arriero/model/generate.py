"""Text generation: logits with a cache of keys and values, and nucleus sampling (https://arxiv.org/abs/1904.09751)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from arriero.common.errors import UserError
from arriero.model.llama import KeyValues, Llama

if TYPE_CHECKING:
    import numpy as np


def generate(
    model: Llama, prompt: list[int], count: int, *, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0,
    excluded: Sequence[int] | np.ndarray = (),
) -> Iterator[int]:  # fmt: skip
    """Yields `count` token ids that continue `prompt`; the caller stops at the end-of-text id.

    Keys and values are cached, except under `dynamic` rotary scaling, whose angles change with the length.

    Args:
        model: in evaluation, on any device.
        prompt: token ids, at least one.
        count: how many ids to yield.
        temperature: 0 takes the likeliest token; 1 samples from the model's own distribution.
        top_p: sample only from the likeliest tokens that together have this probability.
        seed: of the sampling.
        excluded: ids that are never chosen.

    Raises:
        UserError: the logits are NaN or infinite.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    ids = list(prompt)
    cache: dict[str, KeyValues] | None = None
    cached = model.config.rope_scaling.rope_type != "dynamic"
    with torch.inference_mode():
        for _ in range(count):
            fresh = ids[-1:] if cache else ids
            tokens_1L = torch.tensor([fresh], device=device)
            if cached:
                logits_V, cache = next_logits(model, tokens_1L, cache)
            else:
                logits_V = model(tokens_1L)[0, -1]
            logits_V = logits_V.float().cpu()
            logits_V[torch.as_tensor(excluded, dtype=torch.int64)] = -torch.inf
            ids.append(sample_token(logits_V, temperature=temperature, top_p=top_p, generator=generator))
            yield ids[-1]


def next_logits(
    model: Llama, tokens_BL: torch.Tensor, cache: dict[str, KeyValues] | None
) -> tuple[torch.Tensor, dict[str, KeyValues]]:
    """Logits [V] after the last of `tokens_BL` [1, L], which follow the cached positions; and the longer cache."""
    past = 0 if not cache else next(iter(cache.values())).keys.shape[1]
    length = tokens_BL.shape[1]
    x_BLD = model.model.embed_tokens(tokens_BL)
    positions = torch.arange(past, past + length, device=tokens_BL.device)
    cos, sin = model.rope(positions, x_BLD.dtype, past + length)
    mask = None
    if past:  # a new token sees all before it; several see each other causally
        mask = positions[:, None] >= torch.arange(past + length, device=tokens_BL.device)
        mask = mask[None, None]
    longer: dict[str, KeyValues] = {}
    for name, layer in model.model.layers.items():
        x_BLD, longer[name] = layer.step(x_BLD, cos, sin, mask, cache[name] if cache else None)  # type: ignore[operator]
    return model.lm_head(model.model.norm(x_BLD[:, -1:]))[0, 0], longer


def sample_token(logits_V: torch.Tensor, *, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """The next id: the likeliest at temperature 0, else a sample from the smallest set of probability `top_p`.

    Raises:
        UserError: the logits are NaN or infinite.
    """
    if not torch.isfinite(logits_V.max()):  # minus infinity marks excluded ids
        raise UserError("the model's logits are not finite", "try --dtype float32, or another checkpoint")
    if temperature == 0:
        return int(logits_V.argmax())
    logits_V = logits_V.double() - logits_V.max()  # so that no temperature, however low, makes them infinite
    probabilities_V = torch.softmax(logits_V / temperature, dim=-1)
    sorted_V, ids_V = probabilities_V.sort(descending=True)
    before_V = sorted_V.cumsum(-1) - sorted_V
    sorted_V[before_V >= top_p] = 0  # the first is always kept
    return int(ids_V[torch.multinomial(sorted_V, 1, generator=generator)])
