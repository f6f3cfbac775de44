"""Tied embeddings and a head in the file: what transformers makes of both, by every way in."""

import json
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import save_file
from small_models import TINY, random_weights, save_hf, save_run
from test_foreign import to_meta

from arriero.checkpoint.formats.foreign_config import ConfigHints
from arriero.checkpoint.formats.huggingface import (
    has_weights,
    open_huggingface,
    read_shape,
    write_config,
    write_huggingface,
)
from arriero.checkpoint.open_model import build, open_model
from arriero.checkpoint.tensors.in_memory import in_memory
from arriero.cli import convert, export
from arriero.cli.convert import ConvertArgs
from arriero.cli.export import ExportArgs
from arriero.model.llama import Llama

TIED = replace(TINY, tie_word_embeddings=True)
TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TOKENS = torch.randint(100, (2, 20), generator=torch.Generator().manual_seed(3))


def weights_with(head):
    """Weights of the tied model and what the file holds of its two tables."""
    weights = random_weights(TINY)
    other = weights.pop(HEAD)
    if head == "differs":
        weights[HEAD] = other
    elif head == "one value differs":
        weights[HEAD] = weights[TABLE].clone()
        weights[HEAD][-1, -1] += 1
    elif head == "equal":
        weights[HEAD] = weights[TABLE].clone()
    elif head == "of another dtype":
        weights[TABLE] = weights[TABLE].bfloat16().float()
        weights[HEAD] = weights[TABLE].bfloat16()
    elif head == "alone":
        weights[HEAD] = weights.pop(TABLE)
    return weights


def logits(path, hints=None):
    opened = open_model(path, hints=hints)
    return build(opened.reader, opened.config, torch.float32)(TOKENS)


def transformers_logits(path):
    with torch.no_grad():
        return transformers.LlamaForCausalLM.from_pretrained(path, dtype=torch.float32)(TOKENS).logits


@pytest.mark.parametrize("saved_as", ["safetensors", "bin", "shards"])
@pytest.mark.parametrize("head", ["none", "differs", "one value differs", "equal", "of another dtype", "alone"])
def test_a_tied_config_gives_transformers_logits_whatever_head_the_file_holds(tmp_path, head, saved_as):
    weights = weights_with(head)
    save_hf(tmp_path / "hf", TIED, weights, shards=2 if saved_as == "shards" else 1)
    if saved_as == "bin":
        (tmp_path / "hf" / "model.safetensors").unlink()
        torch.save(weights, tmp_path / "hf" / "pytorch_model.bin")
    expected = transformers_logits(tmp_path / "hf")
    torch.testing.assert_close(logits(tmp_path / "hf"), expected, rtol=1e-4, atol=1e-4)
    apart = "differs" in head
    assert read_shape(tmp_path / "hf").tie_word_embeddings is not apart
    assert (HEAD in open_huggingface(tmp_path / "hf").names()) is apart
    assert bool(open_model(tmp_path / "hf").notes) is apart
    export.run(ExportArgs(tmp_path / "hf", tmp_path / "out"))
    for to in ("hf", "megatron"):
        convert.run(ConvertArgs(tmp_path / "hf", tmp_path / f"to-{to}", to, dtype="float32"))
        torch.testing.assert_close(logits(tmp_path / f"to-{to}"), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(transformers_logits(tmp_path / "out"), expected, rtol=1e-4, atol=1e-4)


def test_two_names_of_one_storage_are_not_read_to_be_compared(tmp_path, monkeypatch):
    weights = weights_with("none")
    save_hf(tmp_path, TIED, weights)
    (tmp_path / "model.safetensors").unlink()
    torch.save({**weights, HEAD: weights[TABLE]}, tmp_path / "pytorch_model.bin")
    monkeypatch.setattr("arriero.checkpoint.tensors.stream.TensorView.read_window", None)
    assert read_shape(tmp_path).tie_word_embeddings


def test_a_shape_that_was_read_is_read_again_when_the_files_change(tmp_path):
    save_hf(tmp_path, TIED, weights_with("equal"))
    assert read_shape(tmp_path).tie_word_embeddings
    save_file(weights_with("differs"), tmp_path / "model.safetensors")
    assert not read_shape(tmp_path).tie_word_embeddings
    (tmp_path / "model.safetensors").unlink()
    assert not has_weights(tmp_path)
    assert read_shape(tmp_path).tie_word_embeddings


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("kind", ["megatron", "megatron, last stage", "ascendspeed", "meta"])
def test_a_neighbours_tied_checkpoint_that_holds_a_head(tmp_path, kind, apart):
    """The head of its own is kept where it differs, and is one with the embedding where it does not."""
    tied, both = weights_with("none"), weights_with("differs" if apart else "equal")
    save_hf(tmp_path / "whole", replace(TIED, tie_word_embeddings=False), both)
    expected = transformers_logits(tmp_path / "whole")
    hints, out = None, tmp_path / "out"
    if kind == "meta":
        out.mkdir()
        (out / "params.json").write_text(json.dumps({"dim": 32, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2}))
        torch.save(to_meta(both, TINY), out / "consolidated.00.pth")
        write_config(tmp_path, TIED, dtype="F32")
        hints = ConfigHints(config=tmp_path / "config.json")
    else:
        to, pp = kind.split(",")[0], 2 if "last stage" in kind else 1
        save_hf(tmp_path / "tied", TIED, tied)
        convert.run(ConvertArgs(tmp_path / "tied", out, to, pp=pp))
        file = out / "release" / ("mp_rank_00_001" if pp == 2 else "mp_rank_00") / "model_optim_rng.pt"
        payload = torch.load(file, weights_only=False)
        key = "lm_head.lm_head.weight" if to == "ascendspeed" else "output_layer.weight"
        payload["model"][key] = torch.cat([both[HEAD], both[HEAD][-1:].expand(28, -1)])
        torch.save(payload, file)
    opened = open_model(out, hints=hints)
    assert opened.config.tie_word_embeddings is not apart
    torch.testing.assert_close(logits(out, hints), expected, rtol=1e-4, atol=1e-4)
    assert any("head differs" in note for note in opened.notes) is apart


def test_a_run_and_a_state_dict_of_a_tied_model(tmp_path):
    """A state dict in memory has both names; a run's checkpoint has one."""
    torch.manual_seed(0)
    model = Llama(TIED)
    write_huggingface(tmp_path / "hf", in_memory(model.state_dict()), config=TIED)
    assert HEAD not in open_huggingface(tmp_path / "hf").names()
    save_run(tmp_path / "run", TIED, weights_with("none"))
    assert open_model(tmp_path / "run").config == TIED
