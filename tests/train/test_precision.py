"""Low precision without ZeRO: the numbers of a model whose every parameter is cast, at rest in float32."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from arriero.distributed.parallel.config import ParallelConfig
from arriero.distributed.parallel.pipeline import prune_to_stage
from arriero.model.config import LlamaConfig
from arriero.model.llama import Llama
from arriero.train.precision import in_compute_dtype

CONFIG = LlamaConfig(
    vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8,
)  # fmt: skip
EMBEDDING = "model.embed_tokens.weight"


def tokens() -> torch.Tensor:
    """Few distinct tokens, so that each row of the table is looked up many times."""
    return torch.randint(0, 5, (2, 300), generator=torch.Generator().manual_seed(0))


def model(*, tied: bool) -> Llama:
    torch.manual_seed(0)
    return Llama(replace(CONFIG, tie_word_embeddings=tied))


@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_those_of_a_model_that_is_cast_whole(*, tied: bool) -> None:
    ours, cast = model(tied=tied), model(tied=tied).to(torch.bfloat16)
    logits = in_compute_dtype(ours, torch.bfloat16)(tokens())
    assert logits.dtype == torch.bfloat16
    assert torch.equal(logits, cast(tokens()))
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_are_those_of_a_model_that_is_cast_whole(*, tied: bool) -> None:
    """All but the embedding's to the bit: there bfloat16 gradients are added in float32 and not in bfloat16."""
    ours, cast = model(tied=tied), model(tied=tied).to(torch.bfloat16)
    for called in (in_compute_dtype(ours, torch.bfloat16), cast):
        F.cross_entropy(called(tokens()).flatten(0, 1).float(), tokens().flatten()).backward()
    for name, parameter in ours.named_parameters():
        other = cast.get_parameter(name).grad
        assert parameter.grad is not None
        assert other is not None
        assert parameter.grad.dtype == torch.float32
        if name == EMBEDDING:
            assert F.cosine_similarity(parameter.grad.flatten(), other.float().flatten(), dim=0) > 0.999
        else:
            assert torch.equal(parameter.grad, other.float()), name


def test_rows_that_are_looked_up_often_get_the_exact_sum_of_their_gradients() -> None:
    """Against float64: adding 120 gradients a row in bfloat16 loses what is small beside the sum."""
    ours, ids = model(tied=False), tokens()
    seen: list[torch.Tensor] = []
    called = in_compute_dtype(ours, torch.bfloat16)
    ours.model.embed_tokens.register_forward_hook(lambda module, inputs, rows: rows.register_hook(seen.append) and None)
    F.cross_entropy(called(ids).flatten(0, 1).float(), ids.flatten()).backward()
    (rows,) = seen
    assert rows.dtype == torch.bfloat16
    exact = torch.zeros(CONFIG.vocab_size, CONFIG.hidden_size, dtype=torch.float64)
    exact.index_add_(0, ids.flatten(), rows.flatten(0, 1).double())
    gradient = ours.model.embed_tokens.weight.grad
    assert gradient is not None
    assert (gradient - exact).abs().max() < 1e-6 * exact.abs().max()
    low = torch.zeros_like(exact, dtype=torch.bfloat16).index_add_(0, ids.flatten(), rows.flatten(0, 1))
    assert (low - exact).abs().max() > 1e-3 * exact.abs().max()


@pytest.mark.parametrize("stage", [0, 1])
def test_a_stage_without_embedding_takes_the_stream(stage: int) -> None:
    part = model(tied=False)
    prune_to_stage(part, stage, ParallelConfig(pipeline_parallel=2))
    whole = in_compute_dtype(model(tied=False), torch.bfloat16)
    stream: list[torch.Tensor] = []
    whole.get_submodule("inner.model.layers.0").register_forward_hook(lambda module, inputs, out: stream.append(out))
    logits = whole(tokens())
    out = in_compute_dtype(part, torch.bfloat16)(tokens() if stage == 0 else stream[0])
    assert torch.equal(out, logits if stage else stream[0])
