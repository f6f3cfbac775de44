"""Five steps of AdamW against megatron-core's GPTModel at tensor parallel 2, from our weights in Megatron's files."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from cases import case, launch
from test_megatron_oracle import run_oracle

import toy
from arriero.checkpoint.formats.huggingface import write_huggingface
from arriero.checkpoint.tensors.in_memory import in_memory
from arriero.cli.convert import ConvertArgs, run
from arriero.data.batches import Batches
from arriero.data.config import DataConfig
from arriero.model.init import InitialWeights
from arriero.train.config import ScheduleConfig
from arriero.train.schedule import learning_rate

pytestmark = pytest.mark.slow

CONFIG = replace(toy.CONFIG, vocab_size=260, num_hidden_layers=4)


def test_losses_equal_megatron_core_at_tensor_parallel_2(tmp_path: Path) -> None:
    toy.write_data(tmp_path / "data")
    weights = InitialWeights(CONFIG, seed=7)
    tensors = {name: weights.read(name) for name in weights.names()}
    write_huggingface(tmp_path / "hf", in_memory(tensors), config=CONFIG)
    run(
        ConvertArgs(
            tmp_path / "hf", tmp_path / "megatron", "megatron", tp=2, make_vocab_size_divisible_by=1, spec="local"
        )
    )
    data = DataConfig(prefix=str(tmp_path / "data" / "toy_text_document"), split="90,10,0")
    batches = Batches(data, sequence_length=32, global_batch=8, seed=7)
    rows = [batches.batch(step, 0, 8) for step in range(5)]
    schedule = ScheduleConfig(lr=1e-2, min_lr=1e-3, warmup_steps=2)
    job = {
        "action": "train", "config": asdict(CONFIG), "padded_vocab": 260, "out": str(tmp_path / "megatron.json"),
        "tokens": [r.tokens.tolist() for r in rows], "labels": [r.labels.tolist() for r in rows],
        "rates": [learning_rate(schedule, step, 5) for step in range(5)], "weight_decay": 0.1, "betas": [0.9, 0.95],
        "file": str(tmp_path / "megatron/release/mp_rank_{:02d}/model_optim_rng.pt"),
    }  # fmt: skip
    run_oracle(tmp_path, 2, job)
    theirs = json.loads((tmp_path / "megatron.json").read_text())
    given = {"model": "", "init": str(tmp_path / "hf"), "train__grad_clip": 0.0, "dtype": "float32"}
    two = case(tmp_path, "two", **given, **{"parallel.tensor_parallel": 2, "parallel.sequence_parallel": True})
    two["settings"]["model"] = ""
    ours = launch(tmp_path, 2, [two])["two"]["loss"]
    assert theirs[-1] < theirs[0] - 0.1
    assert ours == pytest.approx(theirs, rel=1e-5)
