import json

import pytest
import torch
from small_models import TINY, random_weights, save_hf, save_run

from arriero.cli.convert import ConvertArgs, run
from arriero.cli.inspect.weights import inspect, recognises


@pytest.fixture
def model(tmp_path):
    return save_hf(tmp_path / "hf", TINY, random_weights(TINY), shards=2)


def facts(path, capsys, *, verify=False):
    assert recognises(path)
    code = inspect(path, json=True, verify=verify)
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("options", "kind", "layout"),
    [
        ({"to": "hf"}, "hf", "whole"),
        (
            {"to": "megatron", "tp": 2, "pp": 2, "vpp": 2},
            "megatron",
            "megatron-core (transformer-engine), TP2 x PP2 x VPP2",
        ),
        ({"to": "ascendspeed", "pp": 4, "fused_mlp": True}, "ascendspeed", "ascendspeed (fused MLP), TP1 x PP4"),
    ],
)
def test_says_what_a_directory_is(model, capsys, options, kind, layout):
    tmp_path = model.parent
    run(ConvertArgs(model, tmp_path / "out", **options, json=True))
    digest = json.loads(capsys.readouterr().out)["fingerprint"]
    code, found = facts(tmp_path / "out", capsys, verify=True)
    assert (code, found["whole"], found["kind"], found["layout"]) == (0, True, kind, layout)
    assert found["fingerprint"] == digest
    assert found["parameters"] == sum(t.numel() for t in random_weights(TINY).values())
    assert (found["heads"], found["key_value_heads"], found["vocabulary"]) == (4, 2, 100)
    assert inspect(tmp_path / "out", json=False, verify=True) == 0
    text = capsys.readouterr().out
    assert "4 layers, hidden 32, 4 heads of 8 (2 key-value)" in text
    assert text.endswith("whole\n")


def test_says_what_is_missing(model, capsys):
    (model / "model-00002-of-00002.safetensors").unlink()
    code, found = facts(model, capsys)
    assert (code, found["whole"], found["kind"]) == (1, False, "hf")
    assert "model-00002" in found["problem"]


def test_a_missing_rank(model, tmp_path, capsys):
    run(ConvertArgs(model, tmp_path / "out", "megatron", tp=2, pp=2))
    (tmp_path / "out/release/mp_rank_01_001/model_optim_rng.pt").unlink()
    capsys.readouterr()
    code, found = facts(tmp_path / "out", capsys)
    assert (code, found["kind"]) == (1, "megatron")
    assert "mp_rank_01_001" in found["problem"]


def test_nan_is_found_by_verify(tmp_path, capsys):
    weights = random_weights(TINY)
    weights["model.layers.1.self_attn.o_proj.weight"][2, 3] = float("nan")
    save_hf(tmp_path / "hf", TINY, weights)
    assert facts(tmp_path / "hf", capsys)[0] == 0
    code, found = facts(tmp_path / "hf", capsys, verify=True)
    assert code == 1
    assert "model.layers.1.self_attn.o_proj.weight holds NaN" in found["problem"]


def test_single_files(model, tmp_path, capsys):
    code, found = facts(model / "model-00001-of-00002.safetensors", capsys)
    assert (code, found["kind"], found["dtypes"]) == (0, "file", {"F32": found["parameters"]})
    torch.save({"a": torch.ones(3), "b": {"c": torch.ones(2, 2)}}, tmp_path / "x.pt")
    assert facts(tmp_path / "x.pt", capsys, verify=True)[1]["parameters"] == 7
    (tmp_path / "x.pt").write_bytes(b"junk")
    assert facts(tmp_path / "x.pt", capsys)[0] == 1


def test_what_is_not_ours(tmp_path):
    save_run(tmp_path / "run", TINY, random_weights(TINY), steps=(1,))
    assert not recognises(tmp_path / "run")
    assert not recognises(tmp_path)
    assert not recognises(tmp_path / "nothing")


def test_an_unfinished_conversion(tmp_path, capsys):
    (tmp_path / "out.partial").mkdir()
    code, found = facts(tmp_path / "out.partial", capsys)
    assert code == 1
    assert "killed" in found["problem"]
