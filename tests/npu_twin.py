"""What torch_npu 2.13 documents its fused operators to compute, in plain torch, in any floating dtype.

A stand-in for the vendor's package: the argument names and defaults are those of its schemas (tests/npu checks that
against the real wheel). Read the masks with care: True hides, and without a mask nothing is hidden.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

UNBOUNDED = 2**31 - 1
calls: list[tuple[str, dict[str, object]]] = []  # what was called, with the arguments that tests ask about


def npu_fusion_attention(
    query: Tensor, key: Tensor, value: Tensor, head_num: int, input_layout: str, *, pse: Tensor | None = None,
    padding_mask: Tensor | None = None, atten_mask: Tensor | None = None, scale: float = 1.0, keep_prob: float = 1.0,
    pre_tockens: int = UNBOUNDED, next_tockens: int = UNBOUNDED, inner_precise: int = 0,
    prefix: list[int] | None = None, actual_seq_qlen: list[int] | None = None,
    actual_seq_kvlen: list[int] | None = None, sparse_mode: int = 0, gen_mask_parallel: bool = True, sync: bool = False,
    softmax_layout: str = "", sink: Tensor | None = None, dropout_mask: Tensor | None = None, seed: int = 0,
    offset: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int, int]:  # fmt: skip
    calls.append(("npu_fusion_attention", {"atten_mask": atten_mask, "sparse_mode": sparse_mode, "shape": query.shape}))
    assert query.dtype == key.dtype == value.dtype, "the kernel wants one dtype"
    assert query.shape[-1] <= 768
    assert keep_prob == 1.0
    q, k, v = (_heads_first(x, n, input_layout) for x, n in _with_heads(query, key, value, head_num, input_layout))
    groups = q.shape[1] // k.shape[1]
    assert q.shape[1] % k.shape[1] == 0
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.transpose(2, 3) * scale
    if atten_mask is not None:  # without one, sparse_mode and the token bounds are ignored
        hidden = _hidden(atten_mask, sparse_mode, pre_tockens, next_tockens, scores)
        scores = scores.masked_fill(hidden, -torch.inf)
    largest = scores.amax(-1, keepdim=True).detach()
    weights = (scores - largest).exp()
    total = weights.sum(-1, keepdim=True)
    out = _heads_back((weights / total) @ v, input_layout)
    eight = (*q.shape[:3], 8)
    return out, largest.float().expand(eight), total.float().expand(eight), query.new_empty(0), seed, offset, 0


def _hidden(mask: Tensor, sparse_mode: int, pre: int, ahead: int, scores: Tensor) -> Tensor:
    assert mask.dtype in (torch.bool, torch.uint8), "the mask is bool or uint8"
    assert mask.device == scores.device
    queries, keys = scores.shape[-2:]
    step = torch.arange(keys) - torch.arange(queries)[:, None]  # how far ahead of the query a key lies
    if sparse_mode == 0:
        assert mask.shape[-2:] == (queries, keys), "sparse_mode 0 wants the whole mask"
        return mask.bool() | (step > ahead) | (step < -pre)
    if sparse_mode in (2, 3):
        expected = torch.ones(2048, 2048, dtype=torch.bool).triu(1)
        assert torch.equal(mask.bool(), expected), "sparse_mode 2 and 3 want the compressed causal mask"
        return step > (0 if sparse_mode == 2 else keys - queries)
    raise NotImplementedError(f"sparse_mode {sparse_mode}")


def _with_heads(q: Tensor, k: Tensor, v: Tensor, heads: int, layout: str) -> list[tuple[Tensor, int]]:
    if layout in ("BSND", "BNSD"):
        assert q.shape[layout.index("N")] == heads, "head_num is the number of query heads"
        return [(x, x.shape[layout.index("N")]) for x in (q, k, v)]
    width = q.shape[-1] // heads
    return [(x, x.shape[-1] // width) for x in (q, k, v)]


def _heads_first(x: Tensor, heads: int, layout: str) -> Tensor:
    """To BNSD."""
    match layout:
        case "BNSD":
            return x
        case "BSND":
            return x.transpose(1, 2)
        case "BSH":
            return x.unflatten(2, (heads, -1)).transpose(1, 2)
        case "SBH":
            return x.unflatten(2, (heads, -1)).permute(1, 2, 0, 3)
    raise NotImplementedError(layout)


def _heads_back(x: Tensor, layout: str) -> Tensor:
    match layout:
        case "BNSD":
            return x
        case "BSND":
            return x.transpose(1, 2)
        case "BSH":
            return x.transpose(1, 2).flatten(2)
        case _:
            return x.permute(2, 0, 1, 3).flatten(2)


def npu_rms_norm(input: Tensor, gamma: Tensor, epsilon: float = 1e-06) -> tuple[Tensor, Tensor]:
    calls.append(("npu_rms_norm", {"epsilon": epsilon}))
    assert input.dtype == gamma.dtype, "the kernel wants one dtype"
    wide = input if input.dtype == torch.float64 else input.float()
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return (wide * rstd * gamma.to(wide.dtype)).to(input.dtype), rstd.detach().float()


def npu_rotary_mul(
    input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: Tensor | None = None
) -> Tensor:
    calls.append(("npu_rotary_mul", {"r1": r1.shape}))
    assert rotary_mode == "half"
    assert rotate is None
    assert input.ndim == r1.ndim == r2.ndim == 4
    assert r1.shape == r2.shape
    assert r1.shape[0] in (1, input.shape[0])
    assert r1.shape[1:] == (input.shape[1], 1, input.shape[3]), "BSND wants 1S1D or BS1D, the whole width of a head"
    assert input.shape[3] < 896
    assert input.shape[3] % 2 == 0
    first, second = input.chunk(2, dim=-1)
    return input * r1 + torch.cat((-second, first), dim=-1) * r2


def npu_swiglu(input: Tensor, dim: int = -1) -> Tensor:
    calls.append(("npu_swiglu", {"shape": input.shape}))
    gate, up = input.chunk(2, dim=dim)
    return F.silu(gate) * up
