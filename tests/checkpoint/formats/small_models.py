"""Small random models, and runs that hold them."""

import contextlib
import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from arriero.checkpoint.directory import TEMPORARY, commit, step_directory
from arriero.checkpoint.formats.huggingface import write_config, write_json
from arriero.checkpoint.shards import TensorShard, data_file, write_shards
from arriero.model.config import LlamaConfig, RopeScaling, parameter_shapes

TINY = LlamaConfig(
    vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=64, rms_norm_eps=1e-5,
)  # fmt: skip

VARIANTS = {
    "gqa": TINY,
    "mha": replace(TINY, num_key_value_heads=4),
    "tied": replace(TINY, tie_word_embeddings=True),
    "biases": replace(TINY, attention_bias=True, mlp_bias=True),
    "wide-head": replace(TINY, head_dim=16),
    "llama3": replace(
        TINY, rope_theta=5e5,
        rope_scaling=RopeScaling("llama3", factor=8.0, original_max_position_embeddings=32),
    ),
}  # fmt: skip


def random_weights(config: LlamaConfig, *, dtype=torch.float32, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in parameter_shapes(config).items():
        values = torch.randn(shape, generator=generator)
        values = 1 + 0.1 * values if "norm" in name else 0.2 * values
        weights[name] = values.to(dtype)
    return weights


def save_hf(directory: Path, config: LlamaConfig, weights: dict[str, torch.Tensor], *, shards: int = 1) -> Path:
    """A Hugging Face directory written with the safetensors library, not with ours."""
    directory.mkdir(parents=True, exist_ok=True)
    write_config(directory, config, dtype="F32")
    if shards == 1:
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
        return directory
    names, weight_map = list(weights), {}
    for i in range(shards):
        part = names[i::shards]
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file({n: weights[n] for n in part}, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    write_json(directory / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    return directory


def assert_same(reader, weights: dict[str, torch.Tensor]) -> None:
    """Every tensor bit-equal, names and order of no matter."""
    assert sorted(reader.names()) == sorted(weights)
    for name, tensor in weights.items():
        assert reader.dtype(name) == tensor.dtype, name
        assert torch.equal(reader.read(name), tensor), name


@contextlib.contextmanager
def unchanged(directory: Path):
    """Nothing is created or left behind in `directory`."""
    before = sorted(p.name for p in directory.iterdir())
    yield
    assert sorted(p.name for p in directory.iterdir()) == before


def save_run(directory, config, weights, *, tensor=2, steps=(50, 100)):
    """A run whose checkpoints hold each matrix in `tensor` parts, rows or columns, with moments beside them."""
    for step in steps:
        home = step_directory(directory / "checkpoints", step)
        temporary = home.with_name(home.name + TEMPORARY)
        temporary.mkdir(parents=True)
        (temporary / "config.json").write_text(json.dumps(config.to_json()))
        (temporary / "state.json").write_text(json.dumps({"step": step}))
        for rank in range(tensor):
            parts = {}
            for name, whole in weights.items():
                if whole.dim() == 1 and rank:
                    continue
                dim = 1 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0
                pieces = whole.tensor_split(tensor, dim) if whole.dim() == 2 else [whole]
                offset = [0] * whole.dim()
                offset[dim] = sum(p.shape[dim] for p in pieces[:rank])
                for key in (name, f"exp_avg.{name}"):
                    parts[key] = TensorShard(pieces[rank].clone().contiguous(), tuple(whole.shape), tuple(offset))
            write_shards(data_file(temporary, rank), parts)
        commit(temporary, home)
    return directory
