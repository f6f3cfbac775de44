"""A stand-in for Transformer Engine on the CPU: just enough that megatron-core's own TE layer spec builds and computes.

The parameters' names and shapes are TE's documented ones (`layer_norm_weight`, `weight`, `bias`); which of them there
are, where they sit and how they are cut is decided by Megatron's wrappers and spec, which are the real ones.
"""

import sys
import types

import torch
import torch.nn.functional as F
from torch import nn


class Linear(nn.Module):
    """y = x weight^T (+ bias), cut over tensor ranks by `parallel_mode`."""

    def __init__(
        self, in_features, out_features, *, bias=True, return_bias=False, parallel_mode=None, tp_size=1, tp_group=None,
        **_,
    ):  # fmt: skip
        super().__init__()
        self.parallel_mode, self.return_bias, self.tp_group, self.tp_size = (
            parallel_mode,
            return_bias,
            tp_group,
            tp_size,
        )
        rows = out_features // tp_size if parallel_mode == "column" else out_features
        columns = in_features // tp_size if parallel_mode == "row" else in_features
        self.weight = nn.Parameter(torch.empty(rows, columns))
        self.bias = nn.Parameter(torch.empty(rows)) if bias else None
        self.in_features, self.out_features, self.use_bias = columns, rows, bias

    def forward(self, x, is_first_microbatch=None):
        out = F.linear(x, self.weight)
        if self.parallel_mode == "row" and self.tp_size > 1:
            torch.distributed.all_reduce(out, group=self.tp_group)
        if self.return_bias:
            return out, self.bias
        return out if self.bias is None else out + self.bias


class RMSNorm(nn.Module):
    def __init__(self, hidden_size, eps=1e-5, zero_centered_gamma=False, **_):
        super().__init__()
        assert not zero_centered_gamma
        self.weight, self.eps = nn.Parameter(torch.ones(hidden_size)), eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class LayerNormLinear(Linear):
    """The norm's gain is a parameter of the linear: `layer_norm_weight`, whole on every rank."""

    def __init__(self, in_features, out_features, eps=1e-5, normalization="LayerNorm", **options):
        super().__init__(in_features, out_features, **options)
        assert normalization == "RMSNorm"
        self.layer_norm_weight, self.eps = nn.Parameter(torch.ones(in_features)), eps

    def forward(self, x, is_first_microbatch=None):
        return super().forward(F.rms_norm(x, self.layer_norm_weight.shape, self.layer_norm_weight, self.eps))


class DotProductAttention(nn.Module):
    """Causal attention over [L, B, H, K], grouped heads included."""

    def __init__(self, num_attention_heads, kv_channels, **_):
        super().__init__()

    def forward(self, query, key, value, attention_mask, attn_mask_type=None, **_):
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.permute(2, 0, 1, 3).flatten(2)


def install():
    """Makes `import transformer_engine` give this, before megatron is imported."""

    def module(name, **content):
        made = types.ModuleType(name)
        made.__dict__.update(content)
        sys.modules[name] = made
        return made

    empty = type("Empty", (), {})
    fp8 = module("transformer_engine.pytorch.fp8", FP8GlobalStateManager=empty, fp8_autocast=empty)
    beside = (
        "CudaRNGStatesTracker",
        "activation_recompute_forward",
        "checkpoint",
        "is_fp8_activation_recompute_enabled",
    )
    distributed = module("transformer_engine.pytorch.distributed", **dict.fromkeys(beside, empty))
    module("transformer_engine.pytorch.float8_tensor", Float8Tensor=empty)
    module("transformer_engine.pytorch.cpp_extensions", cast_to_fp8=empty)
    recipe = module("transformer_engine.common.recipe", DelayedScaling=empty)
    common = module("transformer_engine.common", recipe=recipe)
    pytorch = module(
        "transformer_engine.pytorch", Linear=Linear, LayerNormLinear=LayerNormLinear, RMSNorm=RMSNorm,
        LayerNorm=RMSNorm, DotProductAttention=DotProductAttention, fp8=fp8, distributed=distributed,
    )  # fmt: skip
    module("transformer_engine", pytorch=pytorch, common=common, __version__="1.8.0")
