"""The operators of the model, each a pure function of tensors, with the back end chosen per device.

Shape legend: B batch, L sequence, D hidden, H query heads, G key-value heads, K head_dim, F feed-forward.
The plain-torch form is the definition; a faster back end must agree with it (tests/model/test_ops.py). The one there is
is torch_npu's (model/npu.py); CUDA and the CPU have theirs behind torch's own operators.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arriero.common import device
from arriero.model import cpu, npu
from arriero.model.config import LlamaConfig


def _vendor(x: Tensor) -> Any:
    """The package of fused operators of this tensor's device, or None."""
    return device.fused_operators(x.device.type)


def rms_norm(x_BLD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm (arXiv:1910.07467); the statistics are taken in float32 at least, as transformers does."""
    if (vendor := _vendor(x_BLD)) and (out := npu.rms_norm(vendor, x_BLD, weight_D, eps)) is not None:
        return out
    if (out := cpu.rms_norm(x_BLD, weight_D, eps)) is not None:
        return out
    x_wide = x_BLD if x_BLD.dtype == torch.float64 else x_BLD.float()
    scale = torch.rsqrt(x_wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight_D * (x_wide * scale).to(x_BLD.dtype)


def rope_frequencies(config: LlamaConfig, length: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rotary frequencies in radians a position, [K/2] (arXiv:2104.09864), after the config's scaling.

    Args:
        config: the model's shape.
        length: number of positions in this forward pass; only `dynamic` scaling looks at it.
        dtype: float32 gives transformers' own frequencies to the bit, which pre-trained weights were made with;
            float64 is for proofs.
    """
    K, scaling, base = config.head_dim, config.rope_scaling, config.rope_theta
    if scaling.rope_type == "dynamic":  # NTK-aware: a larger base as the sequence outgrows the trained length
        trained = config.max_position_embeddings
        stretch = scaling.factor * max(length, trained) / trained - (scaling.factor - 1)
        base = base * stretch ** (K / (K - 2))
    frequencies = 1.0 / (base ** (torch.arange(0, K, 2, dtype=dtype) / K))
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor
    if scaling.rope_type == "llama3":
        return _llama3_frequencies(frequencies, config)
    return frequencies


def _llama3_frequencies(frequencies: Tensor, config: LlamaConfig) -> Tensor:
    """Llama 3.1's scaling: long waves are slowed by `factor`, short ones kept, those between interpolated."""
    scaling = config.rope_scaling
    original = scaling.original_max_position_embeddings
    assert original is not None
    wavelength = 2 * math.pi / frequencies
    blend = (original / wavelength - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = blend.clamp(0, 1)  # 0: slow down in full, 1: leave as it is
    return (1 - blend) * frequencies / scaling.factor + blend * frequencies


def rope_table(frequencies: Tensor, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines [..., L, K] for `positions` [..., L].

    The angles are computed in the frequencies' dtype: float32, as in transformers, except in a float64 model.
    """
    angles = positions.to(frequencies.dtype)[..., None] * frequencies.to(positions.device)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rope(x_BLHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates each head by its position: the first half of K pairs with the second (Hugging Face's order).

    `cos` and `sin` are [L, K], or [B, L, K] where positions differ by row.
    """
    if (vendor := _vendor(x_BLHK)) and (out := npu.apply_rope(vendor, x_BLHK, cos, sin)) is not None:
        return out
    if (out := cpu.apply_rope(x_BLHK, cos, sin)) is not None:
        return out
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    first, second = x_BLHK.chunk(2, dim=-1)
    return x_BLHK * cos + torch.cat((-second, first), dim=-1) * sin


def causal_attention(q_BLHK: Tensor, k_BLGK: Tensor, v_BLGK: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention over the past, grouped heads included; returns [B, L, H, K].

    Args:
        q_BLHK: queries.
        k_BLGK: keys; G divides H.
        v_BLGK: values.
        mask: boolean [B, 1, L, S], True where a query may look. None means causal over the whole row.
    """
    if (vendor := _vendor(q_BLHK)) and (out := npu.causal_attention(vendor, q_BLHK, k_BLGK, v_BLGK, mask)) is not None:
        return out
    if mask is None and (out := cpu.causal_attention(q_BLHK, k_BLGK, v_BLGK)) is not None:
        return out
    q, k, v = (x.transpose(1, 2) for x in (q_BLHK, k_BLGK, v_BLGK))
    grouped = q.shape[1] != k.shape[1]
    if grouped and mask is not None and device.expands_kv_heads_under_mask(q.device.type):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        grouped = False
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)
    return out.transpose(1, 2)


def swiglu(gate_BLF: Tensor, up_BLF: Tensor) -> Tensor:
    """SiLU(gate) * up (arXiv:2002.05202)."""
    if vendor := _vendor(gate_BLF):
        return npu.swiglu(vendor, gate_BLF, up_BLF)
    return F.silu(gate_BLF) * up_BLF


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x weight^T + bias: [.., I] -> [.., O]."""
    if (out := cpu.linear(x, weight_OI, bias_O)) is not None:
        return out
    return F.linear(x, weight_OI, bias_O)


class Linear(nn.Linear):
    """nn.Linear by `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """[.., I] -> [.., O]."""
        return linear(input, self.weight, self.bias)


def swiglu_linear(gate_BLF: Tensor, up_BLF: Tensor, down: nn.Module) -> Tensor:
    """`down` of swiglu(gate, up); together where `down` is a Linear to which nothing was attached."""
    if type(down) is Linear and not (down._forward_hooks or down._forward_pre_hooks):
        out = cpu.swiglu_linear(gate_BLF, up_BLF, down.weight, down.bias)
        if out is not None:
            return out
    result: Tensor = down(swiglu(gate_BLF, up_BLF))
    return result
