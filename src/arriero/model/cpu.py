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
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from arriero.common import device

BF16, FP32 = torch.bfloat16, torch.float32
QUERY_BLOCK = (
    128  # queries of a block of scores: their keys end with the block, so half of the scores are never computed
)
KEEP_WEIGHTS_UP_TO = (
    8  # attention's weights are kept for backward up to this many times head_dim tokens: 4 times the output's memory
)


def supports(*tensors: Tensor) -> bool:
    """Whether these are plain tensors of one dtype, of the CPU, that its operators are made for."""
    dtype = tensors[0].dtype
    return dtype in (BF16, FP32) and all(
        type(x) in (Tensor, nn.Parameter) and x.device.type == "cpu" and x.dtype == dtype for x in tensors
    )


def supports_training(*tensors: Tensor) -> bool:
    """Whether the operators take these tensors and one of them needs a gradient."""
    return supports(*tensors) and torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


# Attention. torch's flash kernel for the CPU takes three times as long: it does not run on the matrix units' library.


def causal_attention(q_BLHK: Tensor, k_BLGK: Tensor, v_BLGK: Tensor) -> Tensor | None:
    """Causal attention by batched matmuls, a block of queries at a time."""
    _, L, _, K = q_BLHK.shape
    if torch.compiler.is_compiling() or not supports(q_BLHK, k_BLGK, v_BLGK) or k_BLGK.shape[1] != L:
        return None
    if q_BLHK.dtype == FP32 and L > KEEP_WEIGHTS_UP_TO * K:
        return None  # what is computed twice costs more there than torch's kernel
    out: Tensor = _Attention.apply(q_BLHK, k_BLGK, v_BLGK, supports_training(q_BLHK, k_BLGK, v_BLGK))
    return out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BLHK: Tensor, k_BLGK: Tensor, v_BLGK: Tensor, trained: bool) -> Tensor:
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q_BLHK, k_BLGK, v_BLGK))
        keep = trained and q.shape[2] <= KEEP_WEIGHTS_UP_TO * q.shape[3]
        out, weights = torch.ops.arriero.causal_attention(q, k, v, keep)
        ctx.save_for_backward(q, k, v, weights)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BLHK: Tensor) -> tuple[Tensor | None, ...]:
        return *_attention_backward(grad_BLHK, *ctx.saved_tensors), None


def _blocks(length: int) -> list[tuple[int, int]]:
    return [(start, min(start + QUERY_BLOCK, length)) for start in range(0, length, QUERY_BLOCK)]


@functools.lru_cache(maxsize=8)
def _causal_bias(rows: int, dtype: torch.dtype) -> Tensor:
    """Causal mask added to the scores of a diagonal block."""
    return torch.full((rows, rows), -math.inf, dtype=dtype).triu(1)


def _by_head(x_BLHK: Tensor, groups: int) -> Tensor:
    """Rows of queries under the keys that they share: [B, L, H, K] -> [BG, RL, K]."""
    B, L, H, K = x_BLHK.shape
    return x_BLHK.view(B, L, groups, H // groups, K).permute(0, 2, 3, 1, 4).reshape(B * groups, -1, K)


def _write_by_position(out_BLHK: Tensor, block: Tensor, groups: int) -> None:
    """The reverse of _by_head, for a block of positions."""
    B, L, H, K = out_BLHK.shape
    out_BLHK.view(B, L, groups, H // groups, K).copy_(block.view(B, groups, H // groups, L, K).permute(0, 3, 1, 2, 4))


def _weights(q: Tensor, k: Tensor, start: int) -> Tensor:
    """Softmax of a block's scores [BG, R rows, keys]; its sums are taken in float32."""
    shape = (len(k), q.shape[1], k.shape[1])
    scores = torch.baddbmm(q.new_empty(1), q, k.transpose(1, 2), beta=0, alpha=q.shape[-1] ** -0.5)
    rows = k.shape[1] - start
    scores.view(shape[0], -1, rows, shape[2])[..., start:].add_(_causal_bias(rows, q.dtype))
    return torch.softmax(scores, -1, out=scores)


def _attention(q_BHLK: Tensor, k_BGLK: Tensor, v_BGLK: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """The output, [B, L, H, K], and the blocks' weights one after the other, or nothing."""
    (B, H, L, K), G = q_BHLK.shape, k_BGLK.shape[1]
    q, k, v = q_BHLK.view(B * G, H // G, L, K), k_BGLK.view(B * G, L, K), v_BGLK.view(B * G, L, K)
    out = q.new_empty(B, L, H, K)
    kept = q.new_empty(B * H * sum((b - a) * b for a, b in _blocks(L)) if keep else 0)
    kept_blocks = iter(kept.split([B * H * (b - a) * b for a, b in _blocks(L)])) if keep else None
    for a, b in _blocks(L):
        weights = _weights(q[:, :, a:b].reshape(B * G, -1, K), k[:, :b], a)
        _write_by_position(out[:, a:b], torch.bmm(weights, v[:, :b]), G)
        if kept_blocks is not None:
            next(kept_blocks).copy_(weights.view(-1))
    return out, kept


def _attention_meta(q_BHLK: Tensor, k_BGLK: Tensor, v_BGLK: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    B, H, L, K = q_BHLK.shape
    return q_BHLK.new_empty(B, L, H, K), q_BHLK.new_empty(B * H * sum((b - a) * b for a, b in _blocks(L)) * keep)


def _attention_backward(
    grad_BLHK: Tensor, q_BHLK: Tensor, k_BGLK: Tensor, v_BGLK: Tensor, kept: Tensor
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of queries, keys and values, [B, L, heads, K]; the last block, which sees all keys, comes first."""
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
        _write_by_position(grad_q[:, a:b], into_q, G)
        grad_k[:, :b].baddbmm_(grad_scores.transpose(1, 2), rows, alpha=scale)
    grad_k, grad_v = (x.view(B, G, L, K).transpose(1, 2) for x in (grad_k, grad_v))
    return grad_q, grad_k, grad_v


# A named operator, so that recompute.py can keep its result. torch.library.custom_op would import torch._dynamo,
# seconds of it, at the first step.
_library = torch.library.Library("arriero", "DEF")
_library.define("causal_attention(Tensor q, Tensor k, Tensor v, bool keep) -> (Tensor, Tensor)")
_library.impl("causal_attention", _attention, "CPU")
_library.impl("causal_attention", _attention_meta, "Meta")


# Products. oneDNN takes a transposed view as it is; torch.mm would give float32 to MKL.


def product(x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x weight^T + bias by the faster library; on any device."""
    if x_NI.dtype == FP32 and x_NI.device.type == "cpu" and device.prefers_onednn():
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x_NI, weight_OI, bias_O, "none", [], "")
        return out
    return F.linear(x_NI, weight_OI, bias_O)


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor | None:
    """[.., I] -> [.., O] in float32 by oneDNN, where that is the faster library."""
    given = (x, weight_OI) if bias_O is None else (x, weight_OI, bias_O)
    if x.dtype != FP32 or torch.compiler.is_compiling() or not supports(*given) or not device.prefers_onednn():
        return None
    x = _SaveInputs.apply(x, weight_OI)
    out: Tensor = _Linear.apply(x, weight_OI, bias_O, x.grad_fn)
    return out


class _SaveInputs(torch.autograd.Function):
    """x itself, which is kept with the weight for the product that follows.

    Apart from the product, since a Function keeps its tensors only once it has run: activation checkpointing, which
    stops when it has back what was kept, would run each layer's last product again for nothing.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight_OI)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, kept: Any) -> Tensor:
        ctx.kept = kept
        return product(x.flatten(0, -2), weight_OI, bias_O).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, (for_x, for_weight, for_bias, _) = grad.flatten(0, -2), ctx.needs_input_grad
        if not (for_x or for_weight):
            return None, None, rows.sum(0), None
        x, weight = ctx.kept.saved_tensors
        return (
            product(rows, weight.t()).view(x.shape) if for_x else None,
            product(rows.t(), x.flatten(0, -2).t()) if for_weight else None,
            rows.sum(0) if for_bias else None,
            None,
        )


# Activation and down projection: neither silu(gate) nor its product with up is kept.


def swiglu_linear(gate_BLF: Tensor, up_BLF: Tensor, weight_DF: Tensor, bias_D: Tensor | None) -> Tensor | None:
    """(SiLU(gate) * up) weight^T + bias: [B, L, D]."""
    given = (gate_BLF, up_BLF, weight_DF) if bias_D is None else (gate_BLF, up_BLF, weight_DF, bias_D)
    if torch.compiler.is_compiling() or not supports_training(*given):
        return None
    out: Tensor = _SwigluLinear.apply(gate_BLF, up_BLF, weight_DF, bias_D)
    return out


class _SwigluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight_DF: Tensor, bias_D: Tensor | None) -> Tensor:
        ctx.save_for_backward(gate, up, weight_DF)
        active = F.silu(gate).mul_(up)
        return product(active.flatten(0, -2), weight_DF, bias_D).view(*gate.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, weight = ctx.saved_tensors
        rows, shape = grad.flatten(0, -2), gate.shape
        gate, up = gate.flatten(0, -2), up.flatten(0, -2)
        silu = F.silu(gate)
        grad_weight = product(rows.t(), (silu * up).t()) if ctx.needs_input_grad[2] else None
        grad_active = product(rows, weight.t())
        grad_up = silu.mul_(grad_active)
        grad_gate = torch.ops.aten.silu_backward(grad_active.mul_(up), gate)
        grad_bias = rows.sum(0) if ctx.needs_input_grad[3] else None
        return grad_gate.view(shape), grad_up.view(shape), grad_weight, grad_bias


# The norm's backward in five passes, from its input alone; autograd's takes a dozen, of float32 copies that it keeps.


def rms_norm(x_BLD: Tensor, weight_D: Tensor, eps: float) -> Tensor | None:
    """Root-mean-square norm, its statistics in float32."""
    if torch.compiler.is_compiling() or not supports_training(x_BLD, weight_D):
        return None
    out: Tensor = _Norm.apply(x_BLD, weight_D, eps)
    return out


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=FP32)
        scale = size.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight_D, scale)
        return torch.mul(x, scale, out=torch.empty_like(x)).mul_(weight_D)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """With s the scale and c = sum(grad weight x) of a row: s (grad weight) - x c s^3 / D, and sum(grad x s)."""
        shape, (x, weight, scale) = grad.shape, ctx.saved_tensors
        grad, x, scale, weight_wide = grad.flatten(0, -2), x.flatten(0, -2), scale.view(-1, 1), weight.float()
        products = grad.float() * x
        grad_weight = torch.mv(products.t(), scale[:, 0])
        along = torch.mv(products, weight_wide)[:, None] * scale.pow(3) / -shape[-1]
        wide = torch.mul(grad, weight_wide, out=products).mul_(scale).addcmul_(x, along)
        return wide.to(x.dtype).view(shape), grad_weight.to(weight.dtype), None


def apply_rope(x_BLHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor | None:
    """Rotary positions; the result lies in memory as attention reads it, head by head."""
    if torch.compiler.is_compiling() or not supports_training(x_BLHK) or cos.dtype != x_BLHK.dtype:
        return None
    out: Tensor = _Rope.apply(x_BLHK, cos, sin)
    return out


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BLHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        B, L, H, K = x_BLHK.shape
        return _rotate(x_BLHK, cos, sin, 1, into=x_BLHK.new_empty(B, H, L, K).transpose(1, 2))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, sin, -1, into=grad.new_empty(grad.shape)), None, None


def _rotate(x_BLHK: Tensor, cos: Tensor, sin: Tensor, sign: int, *, into: Tensor) -> Tensor:
    """Turns by the angles, or back with `sign` -1. The halves of cos and sin are alike (ops.rope_table)."""
    half = x_BLHK.shape[-1] // 2
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)[..., :half]
    torch.mul(x_BLHK, cos, out=into)
    into[..., :half].addcmul_(x_BLHK[..., half:], sin, value=-sign)
    into[..., half:].addcmul_(x_BLHK[..., :half], sin, value=sign)
    return into
