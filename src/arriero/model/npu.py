"""The model's operators in torch_npu's fused kernels, each with the semantics that its documentation states.

Each function takes the vendor's package first (device.fused_operators finds it) and returns what the operator of the
same name in ops.py defines, or None where the kernel's limits do not allow it and ops.py must do it itself.
tests/npu_twin.py computes what the vendor documents, and tests/model/test_ops.py sets the two against each other.

Shape legend: B batch, L sequence, S keys, D hidden, H query heads, G key-value heads, K head_dim, F feed-forward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

FULL_MASK, LEFT_UP_CAUSAL = 0, 2  # sparse_mode: the whole mask is given; causal from the top left corner
COMPRESSED_MASK_SIZE = 2048  # rows of the mask that the causal modes ask for, whatever L is
UNBOUNDED = 2**31 - 1  # tokens that a query may look back or ahead

_causal_masks: dict[torch.device, Tensor] = {}
_inverted_masks: WeakTensorKeyDictionary = (
    WeakTensorKeyDictionary()
)  # a batch's mask -> its inverse: one for all layers


def causal_attention(
    vendor: Any, q_BLHK: Tensor, k_BLGK: Tensor, v_BLGK: Tensor, mask: Tensor | None
) -> Tensor | None:  # fmt: skip
    """Attention over the past, or where `mask` [B, 1, L, S] is True.

    The kernel's own masks are True where nothing may be seen, and without one it is not causal, whatever sparse_mode
    says: a mask is therefore always made. It is for training only; under inference_mode it declines.
    """
    if q_BLHK.shape[-1] > 768 or torch.is_inference_mode_enabled():
        return None
    if mask is None:
        hidden, mode, ahead = _causal_mask(q_BLHK), LEFT_UP_CAUSAL, 0
    else:
        hidden, mode, ahead = _inverse(mask), FULL_MASK, UNBOUNDED
    return _fusion_attention(vendor, q_BLHK, k_BLGK, v_BLGK, hidden=hidden, sparse_mode=mode, ahead=ahead)


def _fusion_attention(
    vendor: Any, q: Tensor, k: Tensor, v: Tensor, *, hidden: Tensor, sparse_mode: int, ahead: int
) -> Tensor:  # fmt: skip
    """The one call of the kernel. `hidden` is not optional; the odd spelling of `tockens` is the vendor's."""
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    out: Tensor = vendor.npu_fusion_attention(
        q, k, v, q.shape[2], "BSND", atten_mask=hidden, scale=q.shape[-1] ** -0.5, keep_prob=1.0,
        pre_tockens=UNBOUNDED, next_tockens=ahead, sparse_mode=sparse_mode,
    )[0]  # fmt: skip
    return out


def _causal_mask(q: Tensor) -> Tensor:
    """The compressed causal mask, True above the diagonal; kept for each device, never for a fake tensor's."""
    if type(q) is Tensor and q.device in _causal_masks:
        return _causal_masks[q.device]
    made = torch.ones(COMPRESSED_MASK_SIZE, COMPRESSED_MASK_SIZE, dtype=torch.bool, device=q.device).triu(1)
    if type(made) is Tensor:
        _causal_masks[q.device] = made
    return made


def _inverse(mask: Tensor) -> Tensor:
    if mask not in _inverted_masks:
        _inverted_masks[mask] = ~mask
    inverse: Tensor = _inverted_masks[mask]
    return inverse


def rms_norm(vendor: Any, x_BLD: Tensor, weight_D: Tensor, eps: float) -> Tensor | None:
    """The kernel returns the normed rows and one over their root mean squares; it needs one dtype throughout."""
    if x_BLD.dtype != weight_D.dtype:
        return None
    if hasattr(x_BLD, "to_local"):
        return _norm_of_own_rows(vendor, x_BLD, weight_D, eps)
    out: Tensor = vendor.npu_rms_norm(x_BLD, weight_D, epsilon=eps)[0]
    return out


def _norm_of_own_rows(vendor: Any, x_BLD: Any, weight_D: Any, eps: float) -> Tensor:
    """Under sequence parallelism (DTensors): each process norms its own positions; the gain's gradient is summed."""
    from torch.distributed.tensor import Partial

    gain = weight_D.to_local(grad_placements=[Partial()] * weight_D.device_mesh.ndim)
    out: Tensor = vendor.npu_rms_norm(x_BLD.to_local(), gain, epsilon=eps)[0]
    whole: Tensor = type(x_BLD).from_local(
        out, x_BLD.device_mesh, x_BLD.placements, shape=x_BLD.shape, stride=x_BLD.stride()
    )
    return whole


def apply_rope(vendor: Any, x_BLHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor | None:
    """Mode `half` pairs the first half of K with the second, as Hugging Face does; `cos` and `sin` are [.., L, K]."""
    B, L, H, K = x_BLHK.shape
    if K % 2 or K >= 896 or B >= 1000 or H >= 1000 or x_BLHK.dtype != cos.dtype:
        return None
    cos, sin = (table.reshape(-1, L, 1, K) for table in (cos, sin))
    out: Tensor = vendor.npu_rotary_mul(x_BLHK, cos, sin)
    return out


def swiglu(vendor: Any, gate_BLF: Tensor, up_BLF: Tensor) -> Tensor:
    """The kernel takes gate and up as one tensor, gate first.

    The copy into one costs less than what it saves: 12 F of memory traffic forward and backward against 15 F.
    """
    out: Tensor = vendor.npu_swiglu(torch.cat((gate_BLF, up_BLF), dim=-1), dim=-1)
    return out
