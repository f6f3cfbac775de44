"""The model's operators for training on the CPU: few passes over memory, little kept for backward.

Each returns what the operator of the same name in ops.py defines, or None where ops.py must do it itself: float64 (the
proofs), float16, masks, DTensors. tests/model/test_cpu.py sets them against float64.

Shape legend: B batch, L sequence, D hidden, H query heads, G key-value heads, R = H / G, K head_dim, F feed-forward.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

ROWS = 128  # queries of a block of scores: their keys end with the block, so half of the scores are never computed
KEPT = 8  # attention's weights are kept for backward up to this many times head_dim tokens: 4 times the output's memory


def takes(*tensors: Tensor) -> bool:
    """Whether these are plain tensors of one dtype, of the CPU, that its operators are made for."""
    dtype = tensors[0].dtype
    return dtype in (torch.bfloat16, torch.float32) and all(
        type(x) in (Tensor, nn.Parameter) and x.device.type == "cpu" and x.dtype == dtype for x in tensors
    )


def trains(*tensors: Tensor) -> bool:
    """Whether the operators take these tensors, and autograd will ask for a gradient of one."""
    return takes(*tensors) and torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


# Attention. torch's flash kernel for the CPU takes three times as long: it does not run on the matrix units' library.


def causal_attention(q_BLHK: Tensor, k_BLGK: Tensor, v_BLGK: Tensor) -> Tensor | None:
    """Causal attention by batched matmuls, a block of queries at a time."""
    _, L, _, K = q_BLHK.shape
    if torch.compiler.is_compiling() or not takes(q_BLHK, k_BLGK, v_BLGK) or L != k_BLGK.shape[1]:
        return None
    if q_BLHK.dtype == torch.float32 and L > KEPT * K:
        return None  # what is computed twice costs more there than torch's kernel
    out: Tensor = _Attention.apply(q_BLHK, k_BLGK, v_BLGK, trains(q_BLHK, k_BLGK, v_BLGK))
    return out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BLHK: Tensor, k_BLGK: Tensor, v_BLGK: Tensor, trained: bool) -> Tensor:
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q_BLHK, k_BLGK, v_BLGK))
        keep = trained and q.shape[2] <= KEPT * q.shape[3]
        out, weights = torch.ops.arriero.causal_attention(q, k, v, keep)
        ctx.save_for_backward(q, k, v, weights)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BLHK: Tensor) -> tuple[Tensor | None, ...]:
        return *_attention_backward(grad_BLHK, *ctx.saved_tensors), None


def _blocks(length: int) -> list[tuple[int, int]]:
    return [(start, min(start + ROWS, length)) for start in range(0, length, ROWS)]


@functools.lru_cache(maxsize=8)
def _hidden(rows: int, dtype: torch.dtype) -> Tensor:
    """What is added to the scores on the diagonal: nothing may look ahead."""
    return torch.full((rows, rows), -math.inf, dtype=dtype).triu(1)


def _by_head(x_BLHK: Tensor, groups: int) -> Tensor:
    """Rows of queries under the keys that they share: [B, L, H, K] -> [BG, RL, K]."""
    B, L, H, K = x_BLHK.shape
    return x_BLHK.view(B, L, groups, H // groups, K).permute(0, 2, 3, 1, 4).reshape(B * groups, -1, K)


def _into(out_BLHK: Tensor, block: Tensor, groups: int) -> None:
    """The reverse of _by_head, for a block of positions."""
    B, L, H, K = out_BLHK.shape
    out_BLHK.view(B, L, groups, H // groups, K).copy_(
        block.view(B, groups, H // groups, L, K).permute(0, 3, 1, 2, 4)
    )


def _weights(q: Tensor, k: Tensor, start: int) -> Tensor:
    """Softmax of a block's scores [BG, R rows, keys]; its sums are taken in float32."""
    shape = (len(k), q.shape[1], k.shape[1])
    scores = torch.baddbmm(q.new_empty(1), q, k.transpose(1, 2), beta=0, alpha=q.shape[-1] ** -0.5)
    rows = k.shape[1] - start
    scores.view(shape[0], -1, rows, shape[2])[..., start:].add_(_hidden(rows, q.dtype))
    return torch.softmax(scores, -1, out=scores)


def _attention(q_BHLK: Tensor, k_BGLK: Tensor, v_BGLK: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """The output, [B, L, H, K], and the blocks' weights one after the other, or nothing."""
    (B, H, L, K), G = q_BHLK.shape, k_BGLK.shape[1]
    q, k, v = q_BHLK.view(B * G, H // G, L, K), k_BGLK.view(B * G, L, K), v_BGLK.view(B * G, L, K)
    out = q.new_empty(B, L, H, K)
    kept = q.new_empty(B * H * sum((b - a) * b for a, b in _blocks(L)) if keep else 0)
    room = iter(kept.split([B * H * (b - a) * b for a, b in _blocks(L)])) if keep else None
    for a, b in _blocks(L):
        weights = _weights(q[:, :, a:b].reshape(B * G, -1, K), k[:, :b], a)
        _into(out[:, a:b], torch.bmm(weights, v[:, :b]), G)
        if room is not None:
            next(room).copy_(weights.view(-1))
    return out, kept


def _attention_meta(q_BHLK: Tensor, k_BGLK: Tensor, v_BGLK: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    B, H, L, K = q_BHLK.shape
    return q_BHLK.new_empty(B, L, H, K), q_BHLK.new_empty(B * H * sum((b - a) * b for a, b in _blocks(L)) * keep)


def _attention_backward(
    grad_BLHK: Tensor, q_BHLK: Tensor, k_BGLK: Tensor, v_BGLK: Tensor, kept: Tensor
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of queries, keys and values, [B, L, heads, K], from the last block, which sees all keys, to the first."""
    (B, H, L, K), G = q_BHLK.shape, k_BGLK.shape[1]
    q, k, v = q_BHLK.view(B * G, H // G, L, K), k_BGLK.view(B * G, L, K), v_BGLK.view(B * G, L, K)
    grad_q, grad_k, grad_v = q.new_empty(B, L, H, K), torch.zeros_like(k), torch.zeros_like(v)
    end, scale = kept.numel(), K**-0.5
    for a, b in reversed(_blocks(L)):
        rows = q[:, :, a:b].reshape(B * G, -1, K)
        if kept.numel():
            end -= (count := B * H * (b - a) * b)
            weights = kept[end : end + count].view(B * G, -1, b)
        else:
            weights = _weights(rows, k[:, :b], a)
        grad = _by_head(grad_BLHK[:, a:b], G)
        grad_v[:, :b].baddbmm_(weights.transpose(1, 2), grad)
        grad_scores = torch.bmm(grad, v[:, :b].transpose(1, 2))
        grad_scores = torch._softmax_backward_data(grad_scores, weights, -1, q.dtype)
        into_q = torch.baddbmm(q.new_empty(1), grad_scores, k[:, :b], beta=0, alpha=scale)
        _into(grad_q[:, a:b], into_q, G)
        grad_k[:, :b].baddbmm_(grad_scores.transpose(1, 2), rows, alpha=scale)
    return grad_q, *(x.view(B, G, L, K).transpose(1, 2) for x in (grad_k, grad_v))


# A named operator, so that recompute.py can keep its result. torch.library.custom_op would import torch._dynamo,
# seconds of it, at the first step.
_library = torch.library.Library("arriero", "DEF")
_library.define("causal_attention(Tensor q, Tensor k, Tensor v, bool keep) -> (Tensor, Tensor)")
_library.impl("causal_attention", _attention, "CPU")
_library.impl("causal_attention", _attention_meta, "Meta")
