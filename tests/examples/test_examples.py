"""The examples of docs/extending.md, each as a plugin outside the package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from small_inputs import train_sentencepiece
from small_models import TINY, random_weights

from arriero.data.indexed import IndexedDataset
from arriero.data.tokenizer import load_tokenizer
from arriero.observe.metrics import ValidationMetrics, read_metrics
from arriero.observe.sinks import SINKS, MetricsOutput
from toy import write_recipe

EXAMPLES = Path(__file__).parents[2] / "examples" / "extending"


def run(plugin: str, *words: str, code: int = 0) -> str:
    path = os.pathsep.join(filter(None, [str(EXAMPLES), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", "arriero", *words], capture_output=True, text=True, timeout=900, check=False,
        env=os.environ | {"NO_COLOR": "1", "ARRIERO_PLUGINS": plugin, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_examples_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 80


def test_data_format(tmp_path: Path) -> None:
    train_sentencepiece(tmp_path / "tokenizer.model")
    source, out = tmp_path / "questions.tsv", tmp_path / "data" / "questions"
    rows = [("question", "answer"), ("how many?", "two"), ("three cells",), ("who?", 'the "other" one')]
    source.write_text("".join("\t".join(row) + "\n" for row in rows))
    words = ["prepare", str(source), "--format", "question-answer", "--tokenizer", str(tmp_path), "--out", str(out)]
    assert "3 in = 2 out + 1 quarantined" in run("data_format", *words, "--max-bad", "0.5")
    assert json.loads(Path(f"{out}.quarantine.jsonl").read_text())["reason"] == "1 cells, not 2"
    ids, labels = (IndexedDataset(f"{out}_packed_{name}_document") for name in ("input_ids", "labels"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(ids[0]) == "Question: how many?\nAnswer: two"
    assert tokenizer.decode(labels[0][labels[0] != -100]) == "two"
    assert labels[0][-1] == tokenizer.eos_id
    assert tokenizer.decode(labels[1][labels[1] != -100]) == 'the "other" one'


def test_weight_format(tmp_path: Path) -> None:
    weights = random_weights(TINY)
    (tmp_path / "npz").mkdir()
    (tmp_path / "npz" / "config.json").write_text(json.dumps(TINY.to_json()))
    np.savez(tmp_path / "npz" / "weights.npz", **{name: tensor.numpy() for name, tensor in weights.items()})
    run("weight_format", "convert", str(tmp_path / "npz"), str(tmp_path / "hf"), "--to", "hf")
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "hf")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name])
    named = ["convert", str(tmp_path / "npz"), str(tmp_path / "again"), "--to", "hf", "--from"]
    run("weight_format", *named, "npz")
    assert "one of auto, hf, run, torch_dist, megatron, ascendspeed, meta, npz" in run(
        "weight_format", *named, "nzp", code=2
    )


def test_device(tmp_path: Path) -> None:
    recipe = str(write_recipe(tmp_path))
    assert "device 'xpu' is not available" in run("device", "pretrain", recipe, "--device", "xpu", code=2)
    assert "give one of auto, cpu, cuda, npu" in run("", "pretrain", recipe, "--device", "xpu", code=2)


def test_tracker(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    run("tracker", "pretrain", str(recipe))
    rows = [line.split(",") for line in (tmp_path / "run" / "losses.csv").read_text().splitlines()]
    records = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "lm_loss" in r]
    assert [(int(i), kind, float(loss)) for i, kind, loss in rows] == [
        (r["iteration"], r["kind"], r["lm_loss"]) for r in records
    ]
    assert len(rows) > 1


def test_a_sink_that_fails_stops_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def __init__(self, out: Path) -> None:
            self.written = 0

        def write(self, record: dict[str, object]) -> None:
            self.written += 1
            raise ConnectionError("no network")

        def close(self) -> None:
            raise AssertionError("a failed sink is not closed again")

    def refuse(out: Path) -> Broken:
        raise OSError("no account")

    monkeypatch.setitem(SINKS, "broken", Broken)
    monkeypatch.setitem(SINKS, "refusing", refuse)
    logged: list[str] = []
    output = MetricsOutput(tmp_path, None, logged.append)
    for i in (1, 2):
        output.write(ValidationMetrics(iteration=i, lm_loss=np.nan, perplexity=np.inf))
    output.close()
    assert ["no account" in line or "no network" in line for line in logged] == [True, True]
    assert [r["iteration"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
