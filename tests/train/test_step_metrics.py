"""What a real run writes about its time and its throughput."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import toy
from arriero.data.batches import Batches
from arriero.data.config import DataConfig
from arriero.model.config import LlamaConfig
from arriero.observe.throughput import attended_length, throughput
from programs import arriero

pytestmark = pytest.mark.slow

IN_STEP = ("data_wait_ms", "forward_ms", "backward_ms", "communication_ms", "optimizer_ms")


def steps_of(directory: Path, *words: object) -> list[dict[str, Any]]:
    recipe = toy.write_recipe(directory)
    arriero("pretrain", recipe, "--train.steps", "3", *words)
    records = [json.loads(line) for line in (directory / "run" / "metrics.jsonl").read_text().splitlines()]
    return [r for r in records if r["kind"] == "step"]


def test_one_process_with_documents_recomputation_validation_and_a_profile(tmp_path: Path) -> None:
    words = ("--data.attention", "document", "--recompute.mode", "first", "--recompute.first-layers", "1",
             "--train.eval-every", "1", "--train.eval-batches", "1", "--checkpoint.every", "2", "--log.peak-tflops",
             "0.5", "--profile", "steps=3:3")  # fmt: skip
    rows = steps_of(tmp_path, *words)
    for row in rows:
        assert sum(row[key] for key in IN_STEP) == pytest.approx(row["elapsed_ms"], rel=1e-6)
        assert min(row["forward_ms"], row["backward_ms"], row["optimizer_ms"], row["logging_ms"]) > 0
    assert [r["validation_ms"] > 0 for r in rows] == [False, True, True]
    assert [r["checkpoint_ms"] > 0 for r in rows] == [False, False, True]
    data = DataConfig(prefix=str(tmp_path / "data" / "toy_text_document"), split="90,10,0", attention="document")
    documents = Batches(data, sequence_length=32, global_batch=8, seed=1234, split="train", samples=24).batch(0, 0, 8)
    assert documents.documents is not None
    lengths = [sum(1 for d in row if d == one) for row in documents.documents.tolist() for one in set(row)]
    expected = throughput(
        LlamaConfig.from_json(tmp_path / "model"), rows[0]["tokens_per_second_per_device"], attended_length(lengths),
        peak_tflops=0.5, layers=1,
    )  # fmt: skip
    assert attended_length(lengths) < 32
    for key in ("tflops", "mfu", "mfu_full", "hfu"):
        assert rows[0][key] == pytest.approx(getattr(expected, key)), key
    assert json.loads((tmp_path / "run" / "profile" / "rank-0.json").read_text())["traceEvents"]
    assert "| HFU: " in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.parametrize("words", [("--nproc-per-node", "2"), ("--parallel.pipeline-parallel", "2")])
def test_two_processes_see_their_communication(tmp_path: Path, words: tuple[str, ...]) -> None:
    for row in steps_of(tmp_path, *words):
        assert sum(row[key] for key in IN_STEP) == pytest.approx(row["elapsed_ms"], rel=1e-6)
        assert min(row["forward_ms"], row["backward_ms"], row["communication_ms"]) > 0
        assert row["hfu"] is None
