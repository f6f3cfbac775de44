"""Impossible layouts are refused before anything starts, with the possible ones; laws of dividing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from arriero.distributed.parallel import config
from arriero.distributed.parallel.config import ParallelConfig, RecomputeConfig, stage_layers
from arriero.distributed.parallel.context import positions_of
from arriero.distributed.parallel.pipeline import stages_of
from arriero.model.config import LlamaConfig, RopeScaling

LLAMA_33B = LlamaConfig(
    hidden_size=6656, intermediate_size=17920, num_hidden_layers=60, num_attention_heads=52, num_key_value_heads=52
)


def said(layout: ParallelConfig, processes: int, *, model: LlamaConfig = LLAMA_33B, **changes: int) -> str:
    given = {"sequence_length": 2048, "micro_batches": 64} | changes
    return "\n".join(map(str, layout.problems(model, processes, **given)))


def test_the_four_seed_layouts() -> None:
    assert "8 does not divide the 52 attention heads" in said(
        ParallelConfig(tensor_parallel=8, pipeline_parallel=4), 32
    )
    assert "use one of 1, 2, 4" in said(ParallelConfig(tensor_parallel=8, pipeline_parallel=4), 32)
    four = ParallelConfig(tensor_parallel=4, pipeline_parallel=4, sequence_parallel=True)
    assert said(four, 32) == ""


@pytest.mark.parametrize(
    ("changes", "processes", "message"),
    [
        ({"tensor_parallel": 0}, 8, "give a whole number from 1"),
        ({"tensor_parallel": 4}, 6, "such as --nproc-per-node 4"),
        ({"tensor_parallel": 2, "pipeline_parallel": 2}, 2, "such as --nproc-per-node 4"),
        ({"sequence_parallel": True}, 8, "no effect without tensor"),
        ({"virtual_stages": 2}, 8, "no effect without a pipeline"),
        ({"pipeline_parallel": 2, "virtual_stages": 2}, 2, "Interleaved1F1B"),
        ({"pipeline_parallel": 2, "pipeline_schedule": "Interleaved1F1B"}, 2, "several stages"),
        ({"pipeline_parallel": 61}, 61, "at most 60 stages"),
        ({"pipeline_parallel": 2, "pipeline_layers": (30, 31)}, 2, "2 positive numbers that sum to 60"),
        ({"pipeline_parallel": 2, "pipeline_schedule": "ZBVZeroBubble", "zero_stage": 3}, 4, "use zero_stage 1 or 2"),
        ({"context_parallel": 2, "context_method": "ulysses", "tensor_parallel": 4}, 8, "does not divide 13"),
        ({"context_method": "ulysses"}, 8, "no effect without context"),
        ({"zero_group": 3}, 8, "use one of 1, 2, 4, 8, or 0"),
    ],
)
def test_impossible_layouts_name_the_possible(changes: dict[str, Any], processes: int, message: str) -> None:
    assert message in said(ParallelConfig(**changes), processes)


def test_zero_bubble_schedules_want_a_new_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = ParallelConfig(pipeline_parallel=2, pipeline_schedule="ZBVZeroBubble")
    monkeypatch.setattr(config, "version", lambda package: "2.11.0+cu130")
    assert "ZBVZeroBubble needs torch 2.13 or newer" in said(layout, 2)
    monkeypatch.setattr(config, "version", lambda package: "2.13.0+cpu")
    assert said(layout, 2) == ""


def test_batches_and_lengths_that_do_not_fit() -> None:
    assert "at least 4" in said(ParallelConfig(pipeline_parallel=4), 4, micro_batches=3)
    looped = ParallelConfig(pipeline_parallel=2, pipeline_schedule="Interleaved1F1B", virtual_stages=2)
    assert "a multiple of 3" in said(looped, 2, micro_batches=7)
    assert "does not divide into 4 pieces" in said(ParallelConfig(context_parallel=2), 2, sequence_length=30)
    both = ParallelConfig(tensor_parallel=4, sequence_parallel=True)
    assert "for sequence_parallel" in said(both, 4, sequence_length=30)
    dynamic = replace(LLAMA_33B, rope_scaling=RopeScaling("dynamic", 2.0))
    assert "dynamic" in said(ParallelConfig(context_parallel=2), 2, model=dynamic)


def test_recompute_options_without_effect_are_refused() -> None:
    layout = ParallelConfig(pipeline_parallel=4)
    assert RecomputeConfig("first").problems(layout)
    assert RecomputeConfig("full", first_layers=(1,)).problems(layout)
    assert "4" in str(RecomputeConfig("first", first_layers=(3, 2)).problems(layout)[0])
    assert not RecomputeConfig("first", first_layers=(3, 2, 1, 0)).problems(layout)
    zero_bubble = replace(layout, pipeline_schedule="ZBVZeroBubble")
    assert "another schedule" in str(RecomputeConfig("selective").problems(zero_bubble)[0])


@given(
    st.integers(1, 100),
    st.integers(1, 12),
    st.sampled_from(["1F1B", "Interleaved1F1B", "ZBVZeroBubble"]),
    st.integers(1, 4),
)
def test_stages_hold_every_layer_once(layers: int, ranks: int, schedule: Any, virtual: int) -> None:
    config = ParallelConfig(
        pipeline_parallel=ranks, pipeline_schedule=schedule, virtual_stages=virtual if schedule[0] == "I" else 1
    )
    parts = stage_layers(config, layers)
    assert [layer for part in parts for layer in part] == list(range(layers))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    held = sorted(stage for rank in range(ranks) for stage in stages_of(config, rank))
    assert held == list(range(config.stages))


@given(st.integers(1, 8), st.integers(1, 6), st.sampled_from(["all-gather", "ulysses"]))
def test_context_ranks_hold_every_position_once_and_balance_the_work(degree: int, piece: int, method: Any) -> None:
    config, length = ParallelConfig(context_parallel=degree, context_method=method), 2 * degree * piece
    held = [positions_of(rank, config, length) for rank in range(degree)]
    assert torch.equal(torch.cat(held).sort().values, torch.arange(length))
    assert len({len(part) for part in held}) == 1
    if method == "all-gather" and degree > 1:  # the zigzag: equal sums of positions are equal work under a causal mask
        assert len({int(part.sum()) for part in held}) == 1
