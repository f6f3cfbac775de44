"""Our files in megatron-core's own GPTModel, and its files in ours: real gloo processes on the CPU."""

import json
import os
import subprocess
import sys
from collections import defaultdict
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


def run_oracle(directory, tensor, *jobs):
    """Runs the oracle's jobs, all of one layer spec, in one launch of `tensor` processes."""
    job_file = directory / "jobs.json"
    job_file.write_text(json.dumps([{"spec": "local", **job} for job in jobs]))
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


# name -> (tensor-parallel processes, layer spec, config)
CASES = {
    "gqa": (1, "te", VARIANTS["gqa"]),
    "wide-head": (1, "local", VARIANTS["wide-head"]),
    "mha": (2, "te", VARIANTS["mha"]),
    "tied": (2, "local", VARIANTS["tied"]),
    "biases, linear": (
        1, "te", replace(VARIANTS["biases"], rope_scaling=RopeScaling("linear", factor=4.0), rope_theta=500.0),
    ),
    "llama 3.1": (1, "te", replace(
        TINY, rope_theta=5e5, max_position_embeddings=16384,
        rope_scaling=RopeScaling("llama3", factor=8.0, original_max_position_embeddings=8192),
    )),
}  # fmt: skip


def random_tokens(config):
    return torch.randint(config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """For each case a directory with its weights and Megatron's answer; cases that one launch can do share it."""
    root = tmp_path_factory.mktemp("oracle")
    jobs = defaultdict(list)
    for name, (tensor, spec, config) in CASES.items():
        at = root / name
        save_hf(at / "hf", config, random_weights(config))
        run(ConvertArgs(at / "hf", at / "mg", "megatron", tp=tensor, spec=spec))
        tokens = random_tokens(config)
        jobs[tensor, spec].append({
            "action": "logits", "spec": spec, "config": asdict(config), "padded_vocab": 128 * tensor,
            "out": str(at / "answer.pt"), "tokens": tokens.tolist(), "labels": tokens.roll(-1, 1).tolist(),
            "file": str(at / "mg/release/mp_rank_{:02d}/model_optim_rng.pt"),
        })  # fmt: skip
    for (tensor, _), several in jobs.items():
        run_oracle(root, tensor, *several)
    return root


@pytest.mark.parametrize("name", CASES)
def test_gptmodel_gives_transformers_logits_and_loss(answers, name):
    """Built by Megatron's own layer spec from the arguments in our file; every parameter is in it, and no other."""
    tensor, _, config = CASES[name]
    answer = torch.load(answers / name / "answer.pt", weights_only=True)
    tokens = random_tokens(config)
    model = transformers.LlamaForCausalLM.from_pretrained(answers / name / "hf")
    with torch.no_grad():
        expected = model(tokens).logits
        model.resize_token_embeddings(128 * tensor, mean_resizing=False)  # Megatron's loss has the padding in its sum
        for table in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
            table[100:] = table[99]
        loss = torch.nn.functional.cross_entropy(model(tokens).logits.flatten(0, 1), tokens.roll(-1, 1).flatten())
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
    job = {
        "action": "torch_dist", "config": asdict(config), "padded_vocab": 104, "out": str(saved),
        "file": str(tmp_path / "mg/release/mp_rank_{:02d}/model_optim_rng.pt"),
    }  # fmt: skip
    run_oracle(tmp_path, tensor, job)
    (tmp_path / "dist" / "latest_checkpointed_iteration.txt").write_text("5")
    opened = open_model(tmp_path / "dist", hints=ConfigHints(config=tmp_path / "hf"))
    assert opened.kind == "torch_dist"
    assert_same(opened.reader, weights)
    run(ConvertArgs(tmp_path / "dist", tmp_path / "back", "hf", config=tmp_path / "hf"))
    assert_same(open_model(tmp_path / "back").reader, weights)
    (next(saved.glob("*.distcp"))).unlink()
    with pytest.raises(UserError, match="distcp"):
        open_model(tmp_path / "dist", hints=ConfigHints(config=tmp_path / "hf"))
