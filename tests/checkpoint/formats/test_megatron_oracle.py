"""Our files in megatron-core's own GPTModel, and its files in ours: real gloo processes on the CPU."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import transformers
from small_models import TINY, VARIANTS, assert_same, random_weights, save_hf

from arriero.checkpoint.formats.foreign_config import ConfigHints
from arriero.checkpoint.open_model import open_model
from arriero.cli.convert import ConvertArgs, run
from arriero.common.errors import UserError
from arriero.model.config import RopeScaling
from programs import free_port

pytestmark = pytest.mark.slow

ORACLE = Path(__file__).with_name("megatron_oracle.py")


def run_oracle(tmp_path, tensor, **job):
    """Runs the oracle in `tensor` processes, each with a time-out; returns what it wrote."""
    job_file = tmp_path / "job.json"
    job_file.write_text(json.dumps({"file": None, **job}))
    common = {
        **os.environ,
        "WORLD_SIZE": str(tensor),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
    }
    processes = [
        subprocess.Popen([sys.executable, ORACLE, job_file], env={**common, "RANK": str(r), "LOCAL_RANK": str(r)},
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for r in range(tensor)
    ]  # fmt: skip
    try:
        for process in processes:
            output, _ = process.communicate(timeout=900)
            assert process.returncode == 0, output[-3000:]
    finally:
        for process in processes:
            process.kill()


CASES = {
    "gqa": VARIANTS["gqa"], "wide-head": VARIANTS["wide-head"], "mha": VARIANTS["mha"], "tied": VARIANTS["tied"],
    "biases, linear": replace(VARIANTS["biases"], rope_scaling=RopeScaling("linear", factor=4.0), rope_theta=500.0),
    "llama 3.1": replace(
        TINY, rope_theta=5e5, max_position_embeddings=16384,
        rope_scaling=RopeScaling("llama3", factor=8.0, original_max_position_embeddings=8192),
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("tensor", "variant", "spec"),
    [(1, "gqa", "te"), (1, "wide-head", "local"), (2, "mha", "te"), (2, "tied", "local"), (1, "biases, linear", "te"),
     (1, "llama 3.1", "te")],
)  # fmt: skip
def test_gptmodel_gives_transformers_logits_and_loss(tmp_path, tensor, variant, spec):
    """Built by Megatron's own layer spec from the arguments in our file; every parameter is in it, and no other."""
    config = CASES[variant]
    save_hf(tmp_path / "hf", config, random_weights(config))
    run(ConvertArgs(tmp_path / "hf", tmp_path / "mg", "megatron", tp=tensor, spec=spec))
    tokens = torch.randint(config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(1))
    labels = tokens.roll(-1, 1)
    run_oracle(
        tmp_path, tensor, action="logits", spec=spec, config=asdict(config), padded_vocab=128 * tensor,
        out=str(tmp_path / "answer.pt"), tokens=tokens.tolist(), labels=labels.tolist(),
        file=str(tmp_path / "mg/release/mp_rank_{:02d}/model_optim_rng.pt"),
    )  # fmt: skip
    answer = torch.load(tmp_path / "answer.pt", weights_only=True)
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "hf")
    with torch.no_grad():
        expected = model(tokens).logits
        model.resize_token_embeddings(128 * tensor, mean_resizing=False)  # Megatron's loss has the padding in its sum
        for table in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
            table[100:] = table[99]
        loss = torch.nn.functional.cross_entropy(model(tokens).logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(answer["logits"][..., :100], expected, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(answer["loss"], loss, rtol=1e-6, atol=1e-6)


def test_a_torch_dist_checkpoint_of_megatron_comes_back(tmp_path):
    tensor, config = 2, TINY
    weights = random_weights(config)
    save_hf(tmp_path / "hf", config, weights)
    run(
        ConvertArgs(
            tmp_path / "hf", tmp_path / "mg", "megatron", tp=tensor, make_vocab_size_divisible_by=4, spec="local"
        )
    )
    saved = tmp_path / "dist" / "iter_0000005"
    saved.mkdir(parents=True)
    run_oracle(
        tmp_path, tensor, action="torch_dist", config=asdict(config), padded_vocab=104,
        out=str(saved), file=str(tmp_path / "mg/release/mp_rank_{:02d}/model_optim_rng.pt"),
    )  # fmt: skip
    (tmp_path / "dist" / "latest_checkpointed_iteration.txt").write_text("5")
    opened = open_model(tmp_path / "dist", hints=ConfigHints(config=tmp_path / "hf"))
    assert opened.kind == "torch_dist"
    assert_same(opened.reader, weights)
    run(ConvertArgs(tmp_path / "dist", tmp_path / "back", "hf", config=tmp_path / "hf"))
    assert_same(open_model(tmp_path / "back").reader, weights)
    (next(saved.glob("*.distcp"))).unlink()
    with pytest.raises(UserError, match="distcp"):
        open_model(tmp_path / "dist", hints=ConfigHints(config=tmp_path / "hf"))
