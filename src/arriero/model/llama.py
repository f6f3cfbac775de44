"""LLaMA as plain math, under Hugging Face's parameter names.

No process group, no device, no vendor library is named here: parallelism is applied from outside (parallel/apply.py),
which is why attention asks for its head count with -1: under tensor parallelism a rank holds a part of the heads.

Shape legend: B batch, L sequence, D hidden, H query heads, G key-value heads, K head_dim, F feed-forward, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from arriero.model import head, ops
from arriero.model.config import LlamaConfig


class KeyValues(NamedTuple):
    """One layer's cached keys and values for generation, [B, S, G, K] each."""

    keys: Tensor
    values: Tensor


class RMSNorm(nn.Module):
    """Root-mean-square norm with a gain."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x_BLD: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        return ops.rms_norm(x_BLD, self.weight, self.eps)


class Attention(nn.Module):
    """Causal self-attention with rotary positions and grouped key-value heads."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        d, bias = config.hidden_size, config.attention_bias
        q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.head_dim = config.head_dim
        self.q_proj = ops.Linear(d, q, bias=bias)
        self.k_proj = ops.Linear(d, kv, bias=bias)
        self.v_proj = ops.Linear(d, kv, bias=bias)
        self.o_proj = ops.Linear(q, d, bias=bias)
        self.attend: Callable[..., Tensor] = ops.causal_attention  # context parallelism replaces it

    def forward(
        self, x_BLD: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None = None, past: KeyValues | None = None
    ) -> tuple[Tensor, KeyValues]:
        """[B, L, D] -> [B, L, D], and the keys and values seen so far."""
        split = (*x_BLD.shape[:2], -1, self.head_dim)
        q_BLHK = ops.apply_rope(self.q_proj(x_BLD).view(split), cos, sin)
        k_BSGK = ops.apply_rope(self.k_proj(x_BLD).view(split), cos, sin)
        v_BSGK = self.v_proj(x_BLD).view(split)
        if past is not None:
            k_BSGK = torch.cat((past.keys, k_BSGK), dim=1)
            v_BSGK = torch.cat((past.values, v_BSGK), dim=1)
        out_BLHK = self.attend(q_BLHK, k_BSGK, v_BSGK, mask)
        return self.o_proj(out_BLHK.flatten(2)), KeyValues(k_BSGK, v_BSGK)


class MLP(nn.Module):
    """Gated feed-forward."""

    recomputed = False
    """Set by parallel/recompute.py: torch does not compute a layer's last product again, if that stands alone."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        d, f, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = ops.Linear(d, f, bias=bias)
        self.up_proj = ops.Linear(d, f, bias=bias)
        self.down_proj = ops.Linear(f, d, bias=bias)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        gate_BLF, up_BLF = self.gate_proj(x_BLD), self.up_proj(x_BLD)
        if self.recomputed:
            return self.down_proj(ops.swiglu(gate_BLF, up_BLF))
        return ops.swiglu_linear(gate_BLF, up_BLF, self.down_proj)


class Layer(nn.Module):
    """One decoder layer: attention and feed-forward, each behind a norm, each added to the stream."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x_BLD: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        return self.step(x_BLD, cos, sin, mask, None)[0]

    def step(
        self, x_BLD: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, past: KeyValues | None
    ) -> tuple[Tensor, KeyValues]:
        """As forward, with the keys and values of earlier positions: for generation."""
        attended_BLD, keys = self.self_attn(self.input_layernorm(x_BLD), cos, sin, mask, past)
        x_BLD = x_BLD + attended_BLD
        return x_BLD + self.mlp(self.post_attention_layernorm(x_BLD)), keys


class Embedding(nn.Embedding):
    """The token table; it gives rows in its own dtype, or in `row_dtype` where that is set.

    Casting the few rows that are looked up gives the numbers of a cast table, at less cost, and their gradients are
    added in the table's dtype.
    """

    row_dtype: torch.dtype | None = None

    def reset_parameters(self) -> None:
        """As torch's, but for a table without memory: drawing on the meta device would import the compiler."""
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, ids: Tensor) -> Tensor:
        """[B, L] -> [B, L, D]."""
        rows = super().forward(ids)
        return rows if self.row_dtype is None else rows.to(self.row_dtype)


class Decoder(nn.Module):
    """What Hugging Face calls `model`: embedding, layers, final norm."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleDict({str(i): Layer(config) for i in range(config.num_hidden_layers)})
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Llama(nn.Module):
    """The whole model: tokens in, logits out.

    Layers live in a dict under their global number, so that a pipeline stage can drop those it does not own, and the
    embedding, norm or head with them (they become None), and every parameter keeps its name.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = ops.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.token_loss: Callable[..., Tensor] = head.summed_loss  # tensor parallelism replaces it
        self.loss_scale = 1.0  # of the loss and so of every gradient; a step sets it

    def rope(self, positions: Tensor, dtype: torch.dtype, length: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines for `positions` [L] or [B, L]; `length` is the row's, which dynamic scaling needs."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return ops.rope_table(ops.rope_frequencies(self.config, length, wide), positions, dtype)

    def hidden(self, inputs: Tensor, positions: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """[B, L] -> the normed last hidden state [B, L, D]; what of it this stage has.

        Args:
            inputs: token ids [B, L], or, without an embedding, the stream of the stage before, [B, L, D].
            positions: [L] or [B, L]; None counts from 0.
            mask: boolean [B, 1, L, L], True where a query may look; None is causal over the row.
        """
        x_BLD = inputs if self.model.embed_tokens is None else self.model.embed_tokens(inputs)
        if positions is None:
            positions = torch.arange(inputs.shape[1], device=inputs.device)
        cos, sin = self.rope(positions, x_BLD.dtype, positions.shape[-1])
        for layer in self.model.layers.values():
            x_BLD = layer(x_BLD, cos, sin, mask)
        return x_BLD if self.model.norm is None else self.model.norm(x_BLD)

    def forward(
        self, inputs: Tensor, positions: Tensor | None = None, mask: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """[B, L] -> logits [B, L, V] in the model's dtype; a stage without head returns the stream [B, L, D].

        With `labels` [B, L] the result is loss_scale x the summed loss, [1], and the logits are never held whole.
        """
        x_BLD = self.hidden(inputs, positions, mask)
        if self.lm_head is None:
            return x_BLD
        return self.lm_head(x_BLD) if labels is None else self.token_loss(self.lm_head, x_BLD, labels, self.loss_scale)
