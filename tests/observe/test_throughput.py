from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from arriero.errors import UserError
from arriero.model.config import LlamaConfig, parameter_shapes
from arriero.observe.throughput import (
    attended_length,
    flops_per_token,
    hardware_flops_per_token,
    matmul_parameters,
    peak_flops,
    seed_tflops,
)

LLAMA_7B = LlamaConfig()


def test_7b_counts_every_matrix_but_the_embedding() -> None:
    assert matmul_parameters(LLAMA_7B) == 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 32000 * 4096
    assert flops_per_token(LLAMA_7B, 2048, causal=False) == 6 * 6_607_077_376 + 12 * 32 * 4096 * 2048


def test_causal_attention_is_half_of_full() -> None:
    matmuls = 6.0 * matmul_parameters(LLAMA_7B)
    full, half = (flops_per_token(LLAMA_7B, 4096, causal=causal) - matmuls for causal in (False, True))
    assert full == 2 * half > 0


def test_tied_head_and_grouped_queries() -> None:
    tied = replace(LLAMA_7B, tie_word_embeddings=True)
    assert flops_per_token(tied, 512) == flops_per_token(LLAMA_7B, 512)  # the head is a matmul, tied or not
    grouped = replace(LLAMA_7B, num_key_value_heads=8)
    fewer = 6 * 32 * 2 * 4096 * (4096 - 1024)
    assert flops_per_token(LLAMA_7B, 512) - flops_per_token(grouped, 512) == fewer  # attention itself is unchanged


def test_biases_and_norms_are_no_matmuls() -> None:
    biased = replace(LLAMA_7B, attention_bias=True, mlp_bias=True)
    assert matmul_parameters(biased) == matmul_parameters(LLAMA_7B)
    assert len(parameter_shapes(biased)) > len(parameter_shapes(LLAMA_7B))


def test_matmul_flops_agree_with_what_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=4,
    )  # fmt: skip
    weights = [
        torch.zeros(shape, requires_grad=True) for name, shape in parameter_shapes(config).items()
        if len(shape) == 2 and "embed" not in name
    ]  # fmt: skip
    with FlopCounterMode(display=False) as counter:
        for weight in weights:
            x = torch.zeros(10, weight.shape[1], requires_grad=True)
            torch.nn.functional.linear(x, weight).sum().backward()
    assert counter.get_total_flops() == 10 * 6 * matmul_parameters(config)


def test_full_recompute_is_the_seed_s_four_thirds_of_the_layers() -> None:
    model = flops_per_token(LLAMA_7B, 2048, causal=False)
    head = 6 * 32000 * 4096
    again = hardware_flops_per_token(LLAMA_7B, 2048, causal=False, recompute="full") - model
    assert again == pytest.approx((model - head) / 3)
    assert hardware_flops_per_token(LLAMA_7B, 2048, recompute="none") == flops_per_token(LLAMA_7B, 2048)
    selective = hardware_flops_per_token(LLAMA_7B, 2048, recompute="selective") - flops_per_token(LLAMA_7B, 2048)
    assert selective == 2 * 32 * 4096 * 2048


def test_document_masks_shorten_the_context() -> None:
    assert attended_length([512] * 4) == 512
    assert attended_length([1, 3]) == 2.5
    assert attended_length([]) == 0


@pytest.mark.parametrize(
    ("name", "dtype", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312),
        ("NVIDIA A100 80GB PCIe", torch.float16, 312),
        ("NVIDIA A100-SXM4-40GB", torch.float32, 19.5),
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.4),
        ("NVIDIA H100 80GB HBM3", "tf32", 494.7),
        ("NVIDIA H100 PCIe", torch.bfloat16, 756),
        ("NVIDIA H100 NVL", torch.bfloat16, 835.5),
        ("NVIDIA H200", torch.bfloat16, 989.4),
        ("NVIDIA GH200 480GB", torch.bfloat16, 989.4),
        ("NVIDIA B200", torch.bfloat16, 2250),
        ("Ascend910B2", torch.bfloat16, 353.9),
        ("Ascend910B2C", torch.float16, 353.9),
        ("Ascend910B4", torch.float16, 245.8),
    ],
)
def test_known_peaks(name: str, dtype: object, tflops: float) -> None:
    assert peak_flops(name, dtype) == pytest.approx(tflops * 1e12)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("AMD EPYC 9V74", torch.bfloat16),
        ("NVIDIA RTX A1000", torch.bfloat16),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", torch.bfloat16),
        ("NVIDIA H20", torch.bfloat16),
        ("Ascend910B", torch.bfloat16),
        ("Ascend910B1", torch.float32),
        ("NVIDIA H100 80GB HBM3", torch.float64),
        ("", torch.bfloat16),
    ],
)
def test_no_peak_is_guessed(name: str, dtype: object) -> None:
    assert peak_flops(name, dtype) is None


def test_the_seed_s_table_mixes_two_conventions() -> None:
    """examples/llama/README.md of AscendSpeed: 7B 5.725 s/step, 162.2 TFLOPs; 13B 18.20 s/step, 146.1; 8 devices."""
    small = {"batch": 64, "sequence_length": 2048, "layers": 32, "hidden": 4096, "vocab": 32000, "seconds": 5.725}
    large = {"batch": 128, "sequence_length": 2048, "layers": 40, "hidden": 5120, "vocab": 32000, "seconds": 18.20}
    assert seed_tflops(**small, devices=8, recompute=True) == pytest.approx(162.2, rel=2e-3)
    assert seed_tflops(**large, devices=8, recompute=False) == pytest.approx(146.1, rel=2e-3)
    # In one convention, model FLOPs with causal attention, 13B is well ahead of 7B, where the table has it behind.
    config_13b = replace(
        LLAMA_7B, hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40,
        num_key_value_heads=40,
    )  # fmt: skip
    tokens_7b, tokens_13b = 64 * 2048 / 5.725 / 8, 128 * 2048 / 18.20 / 8
    assert flops_per_token(LLAMA_7B, 2048) * tokens_7b / 1e12 == pytest.approx(118.1, abs=0.1)
    assert flops_per_token(config_13b, 2048) * tokens_13b / 1e12 == pytest.approx(143.4, abs=0.1)


def test_seed_formula_wants_a_time() -> None:
    with pytest.raises(UserError, match="must be positive"):
        seed_tflops(batch=1, sequence_length=1, layers=1, hidden=1, vocab=1, seconds=0, devices=1, recompute=False)
