import json

import pytest
import torch
import transformers
from small_models import TINY, VARIANTS, assert_same, random_weights, save_hf, save_run, unchanged

from arriero.checkpoint.formats.huggingface import open_huggingface
from arriero.checkpoint.open_model import load_model, open_model
from arriero.cli.export import ExportArgs, run
from arriero.common.errors import UserError


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_is_exported_bit_for_bit_and_transformers_agrees(tmp_path, variant, capsys):
    config = VARIANTS[variant]
    weights = random_weights(config)
    save_run(tmp_path / "run", config, weights, tensor=3)
    assert run(ExportArgs(tmp_path / "run", tmp_path / "out", json=True)) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["largest_logit_difference"] == 0
    assert answer["source"].endswith("step-00000100")
    assert_same(open_huggingface(tmp_path / "out"), weights)
    tokens = torch.randint(100, (2, 20))
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)(tokens).logits
    ours = load_model(tmp_path / "run")[0](tokens)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)


def test_a_cast_is_told_by_the_logits(tmp_path, capsys):
    weights = random_weights(TINY)
    save_run(tmp_path / "run", TINY, weights)
    run(ExportArgs(tmp_path / "run", tmp_path / "out", dtype="bfloat16"))
    assert_same(open_huggingface(tmp_path / "out"), {name: t.bfloat16() for name, t in weights.items()})
    text = capsys.readouterr().out
    assert "largest logit difference" in text
    assert "no tokenizer was found" in text


def test_an_uncommitted_checkpoint_is_refused(tmp_path):
    save_run(tmp_path / "run", TINY, random_weights(TINY))
    newest = tmp_path / "run" / "checkpoints" / "step-00000100"
    (newest / "COMMITTED").unlink()
    assert open_model(tmp_path / "run").path.name == "step-00000050"
    with pytest.raises(UserError, match="not committed"):
        open_model(newest)


def test_a_missing_part_is_refused(tmp_path):
    save_run(tmp_path / "run", TINY, random_weights(TINY), steps=(7,))
    (tmp_path / "run" / "checkpoints" / "step-00000007" / "rank-00001.json").unlink()
    with unchanged(tmp_path), pytest.raises(UserError, match=r"of .* elements"):
        run(ExportArgs(tmp_path / "run", tmp_path / "out"))


def test_a_run_without_checkpoints_is_refused(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="holds no checkpoint"):
        open_model(tmp_path)


def test_a_path_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="no such"):
        open_model(tmp_path / "nowhere")


def test_a_directory_can_be_exported_in_another_dtype(tmp_path):
    weights = random_weights(TINY, dtype=torch.bfloat16)
    save_hf(tmp_path / "m", TINY, weights)
    run(ExportArgs(tmp_path / "m", tmp_path / "out", dtype="float32"))
    assert_same(open_huggingface(tmp_path / "out"), {name: t.float() for name, t in weights.items()})


def test_a_damaged_checkpoint_is_refused_by_the_name_of_its_tensor(tmp_path):
    save_run(tmp_path / "run", TINY, random_weights(TINY))
    data = tmp_path / "run" / "checkpoints" / "step-00000100" / "rank-00001.safetensors"
    content = bytearray(data.read_bytes())
    content[-5] ^= 1
    data.write_bytes(content)
    with unchanged(tmp_path), pytest.raises(UserError, match=r"tensor .* is damaged"):
        run(ExportArgs(tmp_path / "run", tmp_path / "out"))
    assert open_model(tmp_path / "run" / "checkpoints" / "step-00000050").path.name == "step-00000050"
