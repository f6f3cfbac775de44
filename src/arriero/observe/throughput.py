"""FLOPs per token, peaks by device, and so MFU and HFU. Every figure names its formula; an unknown device has no peak.

Model FLOPs are what the mathematics needs; hardware FLOPs are what was executed, recomputation included. MFU divides
the first by the peak, HFU the second. Attention is counted causally (half of the score matrix) unless asked otherwise.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from arriero.common.errors import UserError
from arriero.model.config import parameter_shapes

if TYPE_CHECKING:
    from arriero.model.config import LlamaConfig

# Dense (no sparsity) matmul peaks in FLOP/s: 16-bit, TF32, plain float32. The longest name found in the device's wins.
# NVIDIA: the product data sheets, whose tensor-core figures "with sparsity" are twice these.
# Ascend: the Cube unit does 16 x 16 x 16 multiply-adds a cycle, so cores x 8192 x clock, from CANN's platform files.
# The larger figures in circulation (400, 376, 313, 280 TFLOPS) add the vector unit, which a matmul does not use.
PEAKS: dict[str, dict[str, float]] = {
    "A100": {"16bit": 312e12, "tf32": 156e12, "float32": 19.5e12},
    "A800": {"16bit": 312e12, "tf32": 156e12, "float32": 19.5e12},
    "H100": {"16bit": 989.4e12, "tf32": 494.7e12, "float32": 66.9e12},
    "H100 PCIe": {"16bit": 756e12, "tf32": 378e12, "float32": 51.2e12},
    "H100 NVL": {"16bit": 835.5e12, "tf32": 417.5e12, "float32": 60e12},
    "H800": {"16bit": 989.4e12, "tf32": 494.7e12, "float32": 66.9e12},
    "H200": {"16bit": 989.4e12, "tf32": 494.7e12, "float32": 66.9e12},
    "H200 NVL": {"16bit": 835.5e12, "tf32": 417.5e12, "float32": 60e12},
    "GH200": {"16bit": 989.4e12, "tf32": 494.7e12, "float32": 66.9e12},
    "B200": {"16bit": 2250e12, "tf32": 1125e12, "float32": 75e12},
    "GB200": {"16bit": 2500e12, "tf32": 1250e12, "float32": 80e12},
    "Ascend910A": {"16bit": 256e12},
    "Ascend910B1": {"16bit": 373.9e12},
    "Ascend910B2": {"16bit": 353.9e12},
    "Ascend910B3": {"16bit": 294.9e12},
    "Ascend910B4": {"16bit": 245.8e12},
}


def matmul_parameters(config: LlamaConfig) -> int:
    """Number of weights that a token is multiplied with: every matrix, the output head in, the embedding lookup out."""
    shapes = parameter_shapes(config)
    matrices = sum(math.prod(s) for name, s in shapes.items() if len(s) == 2 and "embed_tokens" not in name)
    head_is_the_embedding = config.vocab_size * config.hidden_size if config.tie_word_embeddings else 0
    return matrices + head_is_the_embedding


def flops_per_token(config: LlamaConfig, sequence_length: float, *, causal: bool = True) -> float:
    """Model FLOPs of one token, forward and backward: 6 x matmul parameters + attention.

    Attention is 12 L d s where the whole score matrix counts and 6 L d s where only its causal half does
    (L layers, d = heads x head_dim, s tokens of context). Source: Chowdhery et al. 2022 (PaLM), appendix B.

    Args:
        sequence_length: tokens of a sample; with document masks, `attended_length` of the documents.
        causal: count the causal half only. Give False to compare with figures of Megatron's older or PaLM's convention.
    """
    return 6.0 * matmul_parameters(config) + _attention_flops(config, sequence_length, causal=causal)


def hardware_flops_per_token(
    config: LlamaConfig, sequence_length: float, *, causal: bool = True, layers: int | None = None,
    keep: Collection[str] = (),
) -> float:  # fmt: skip
    """FLOPs executed for one token: the model's, and once more the forward pass of what is recomputed.

    torch stops recomputing a layer once it has all that backward needs, so the last matmul, the down projection, is
    never run again; formulas that count a whole forward (4/3 of the layers: Korthikanti et al. 2022,
    arXiv:2205.05198) give up to 6% too much. tests/observe/test_throughput.py compares with torch's counter.

    Args:
        layers: how many are recomputed; None means all.
        keep: "matmul", "attention": the operators whose results are kept.
    """
    count = config.num_hidden_layers if layers is None else layers
    model = flops_per_token(config, sequence_length, causal=causal)
    attention = _attention_flops(config, sequence_length, causal=causal) / config.num_hidden_layers / 3
    head = config.vocab_size * config.hidden_size
    matrices = (matmul_parameters(config) - head) / config.num_hidden_layers
    matmuls = 2.0 * (matrices - config.hidden_size * config.intermediate_size)
    return model + count * (("attention" not in keep) * attention + ("matmul" not in keep) * matmuls)


@dataclass(frozen=True)
class Throughput:
    """What a token rate means; every share is None where no peak is known."""

    tflops: float
    """Model TFLOP/s of one device, attention counted causally."""
    mfu: float | None
    """tflops over the peak, 0 to 1."""
    mfu_full: float | None
    """The same with the whole score matrix counted, as PaLM and older Megatron do."""
    hfu: float | None
    """FLOPs executed, recomputation included, attention counted causally, over the peak; None without recomputation."""


def throughput(
    config: LlamaConfig, tokens_per_second: float, sequence_length: float, *, peak_tflops: float | None,
    layers: int = 0, keep: Collection[str] = (),
) -> Throughput:  # fmt: skip
    """TFLOP/s, MFU in both conventions and HFU of one device that trains `tokens_per_second`.

    Args:
        sequence_length: as in `flops_per_token`.
        peak_tflops: of the device, or None.
        layers: how many are recomputed.
        keep: as in `hardware_flops_per_token`.
    """
    rate = tokens_per_second / 1e12
    causal, full = (rate * flops_per_token(config, sequence_length, causal=c) for c in (True, False))
    executed = rate * hardware_flops_per_token(config, sequence_length, layers=layers, keep=keep)
    if not peak_tflops:
        return Throughput(causal, None, None, None)
    return Throughput(causal, causal / peak_tflops, full / peak_tflops, executed / peak_tflops if layers else None)


def attended_length(document_lengths: Iterable[int]) -> float:
    """The sequence length that stands for documents under a document mask: sum of squares over sum of lengths."""
    lengths = list(document_lengths)
    return sum(n * n for n in lengths) / max(sum(lengths), 1)


def peak_flops(device_name: str, dtype: object) -> float | None:
    """Dense matmul peak of one device in FLOP/s, or None where it is not known: a wrong peak is worse than none.

    Args:
        device_name: as the back end gives it, such as `NVIDIA H100 80GB HBM3` or `Ascend910B2`.
        dtype: a torch dtype or its name; `tf32` is float32 with tensor cores allowed.
    """
    kind = str(dtype).removeprefix("torch.")
    if kind in ("bfloat16", "float16"):
        kind = "16bit"
    if re.search(r"\bMIG\b", device_name):
        return None  # a slice of the card, with a slice of its peak
    # \b and "no digit after" keep A100 out of RTX A1000, and let 910B2 match 910B2C.
    known = [key for key in PEAKS if all(re.search(rf"\b{w}(?!\d)", device_name, re.I) for w in key.split())]
    return PEAKS[max(known, key=len)].get(kind) if known else None


def seed_tflops(
    *,
    batch: int,
    sequence_length: int,
    layers: int,
    hidden: int,
    vocab: int,
    seconds: float,
    devices: int,
    recompute: bool,
) -> float:
    """TFLOPs per device as AscendSpeed's log line prints it; kept to read old tables, not for ours.

    24 f B s L h^2 (1 + s / 6h + V / 16Lh) / (t n), with f = 4 under activation checkpointing (a hardware figure, then)
    and 3 without (Narayanan et al. 2021, who state it for f = 4). It counts attention in full, takes the feed-forward
    for 8 h^2 (LLaMA's is 8.06 h^2 at 7B), and with f = 3 shrinks the output head's share, which is never recomputed.
    """
    if seconds <= 0 or devices < 1:
        raise UserError(f"seconds {seconds} and devices {devices} must be positive", "give the time of one step")
    factor = 4 if recompute else 3
    shape = 1 + sequence_length / (6 * hidden) + vocab / (16 * layers * hidden)
    flops = 24 * factor * batch * sequence_length * layers * hidden**2 * shape
    return flops / (seconds * devices * 1e12)


def _attention_flops(config: LlamaConfig, sequence_length: float, *, causal: bool) -> float:
    """Scores and weighted sum, 2 x 2 s d forward, and twice that backward, for each layer."""
    width = config.num_attention_heads * config.head_dim
    return (6.0 if causal else 12.0) * config.num_hidden_layers * width * sequence_length
