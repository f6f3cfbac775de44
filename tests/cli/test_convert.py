import argparse
import json
import os
import pickle
import re
import shutil
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import TINY, VARIANTS, assert_same, random_weights, save_hf, save_run, unchanged

from arriero.checkpoint.formats.huggingface import open_huggingface
from arriero.checkpoint.formats.megatron_args import beyond_megatron, saved_arguments
from arriero.checkpoint.formats.sharding_plan import ParallelDegrees
from arriero.checkpoint.open_model import open_model
from arriero.cli import convert
from arriero.cli.convert import ConvertArgs, run
from arriero.common.errors import CheckFailed, UserError
from arriero.model.config import LlamaConfig, RopeScaling

LAYOUTS = {
    "megatron-tp2-pp2": {"to": "megatron", "tp": 2, "pp": 2},
    "megatron-local": {"to": "megatron", "tp": 2, "pp": 2, "spec": "local"},
    "megatron-vpp": {"to": "megatron", "pp": 2, "vpp": 2},
    "megatron-unpadded": {"to": "megatron", "tp": 2, "make_vocab_size_divisible_by": 1, "iteration": 7},
    "ascendspeed-tp2-pp4": {"to": "ascendspeed", "tp": 2, "pp": 4},
    "ascendspeed-fused": {"to": "ascendspeed", "tp": 2, "fused_mlp": True},
    "ascendspeed-deepspeed": {"to": "ascendspeed", "deepspeed": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_there_and_back_is_bit_exact(tmp_path, variant, layout):
    config = VARIANTS[variant]
    weights = random_weights(config, dtype=torch.bfloat16)
    save_hf(tmp_path / "hf", config, weights, shards=3)
    assert run(ConvertArgs(tmp_path / "hf", tmp_path / "there", **LAYOUTS[layout])) == 0
    assert run(ConvertArgs(tmp_path / "there", tmp_path / "back", "hf")) == 0
    assert_same(open_huggingface(tmp_path / "back"), weights)
    assert LlamaConfig.from_json(tmp_path / "back") == config


@given(
    groups=st.sampled_from([1, 2, 3, 4]), queries=st.integers(1, 3), head_dim=st.sampled_from([2, 4, 6]),
    vocab=st.integers(3, 300), ffn=st.integers(1, 5), layers=st.integers(1, 4), multiple=st.sampled_from([1, 3, 128]),
    biases=st.booleans(), tied=st.booleans(), to=st.sampled_from(["megatron", "ascendspeed"]), fused=st.booleans(),
    data=st.data(),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_law_any_shape_any_layout(  # noqa: PLR0917 - hypothesis passes them by name
    tmp_path_factory, groups, queries, head_dim, vocab, ffn, layers, multiple, biases, tied, to, fused, data
):
    tmp_path = tmp_path_factory.mktemp("law")
    tp = data.draw(st.sampled_from([n for n in range(1, groups + 1) if groups % n == 0]))
    pp = data.draw(st.sampled_from([n for n in range(1, layers + 1) if layers % n == 0]))
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=6, intermediate_size=ffn * tp, num_hidden_layers=layers,
        num_attention_heads=groups * queries, num_key_value_heads=groups, head_dim=head_dim,
        attention_bias=biases, mlp_bias=biases, tie_word_embeddings=tied,
    )  # fmt: skip
    weights = random_weights(config)
    save_hf(tmp_path / "hf", config, weights)
    fused = fused and to == "ascendspeed"
    run(
        ConvertArgs(
            tmp_path / "hf", tmp_path / "x", to, tp=tp, pp=pp, make_vocab_size_divisible_by=multiple, fused_mlp=fused
        )
    )
    opened = open_model(tmp_path / "x")
    assert_same(opened.reader, weights)
    name = data.draw(st.sampled_from([n for n, t in weights.items() if t.dim() == 2]))
    rows, columns = weights[name].shape
    a, b = sorted(data.draw(st.tuples(st.integers(0, rows), st.integers(0, rows))))
    c, d = sorted(data.draw(st.tuples(st.integers(0, columns), st.integers(0, columns))))
    assert torch.equal(opened.reader.read(name, (slice(a, b), slice(c, d))), weights[name][a:b, c:d])
    shutil.rmtree(tmp_path)


def load(path):
    with torch.serialization.safe_globals([argparse.Namespace]):  # as Megatron registers it
        return torch.load(path, weights_only=True, mmap=True)


def test_megatrons_files_are_what_megatron_writes(tmp_path):
    """Layout, tracker and values by Megatron's own rules, computed here with plain torch."""
    config = replace(TINY, num_key_value_heads=2)
    weights = random_weights(config)
    save_hf(tmp_path / "hf", config, weights)
    run(ConvertArgs(tmp_path / "hf", tmp_path / "mg", "megatron", tp=2, pp=2, iteration=12))
    assert (tmp_path / "mg/latest_checkpointed_iteration.txt").read_text() == "12\n"
    rank = load(tmp_path / "mg/iter_0000012/mp_rank_01_001/model_optim_rng.pt")
    assert (rank["checkpoint_version"], rank["iteration"]) == (3.0, 12)
    model, home = rank["model"], "model.layers.2."
    q, k, v = (weights[f"{home}self_attn.{n}_proj.weight"] for n in "qkv")
    fused = torch.cat([q.view(2, 16, 32), k.view(2, 8, 32), v.view(2, 8, 32)], 1)
    assert torch.equal(model["decoder.layers.0.self_attention.linear_qkv.weight"], fused[1])
    gate, up = weights[home + "mlp.gate_proj.weight"], weights[home + "mlp.up_proj.weight"]
    assert torch.equal(model["decoder.layers.0.mlp.linear_fc1.weight"], torch.cat([gate[24:], up[24:]]))
    assert torch.equal(model["decoder.layers.0.mlp.linear_fc2.weight"], weights[home + "mlp.down_proj.weight"][:, 24:])
    head = weights["lm_head.weight"]
    assert torch.equal(model["output_layer.weight"], head[-1:].expand(128, -1))
    first = load(tmp_path / "mg/iter_0000012/mp_rank_00_000/model_optim_rng.pt")["model"]
    embedding = weights["model.embed_tokens.weight"]
    assert torch.equal(first["embedding.word_embeddings.weight"], torch.cat([embedding, embedding[-1:].expand(28, -1)]))
    assert "output_layer.weight" not in first


TE_NAMES = {"input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
            "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight"}  # fmt: skip


def test_the_two_specs_differ_in_the_norms_names_alone(tmp_path):
    save_hf(tmp_path / "hf", TINY, random_weights(TINY))
    ranks = {}
    for spec in ("te", "local"):
        run(ConvertArgs(tmp_path / "hf", tmp_path / spec, "megatron", tp=2, spec=spec))
        ranks[spec] = load(tmp_path / spec / "release/mp_rank_01/model_optim_rng.pt")["model"]
    renamed = {}
    for key, tensor in ranks["local"].items():
        head, dot, tail = key.partition("layers.")
        number, _, inner = tail.partition(".")
        renamed[f"{head}{dot}{number}.{TE_NAMES.get(inner, inner)}" if dot else key] = tensor
    assert renamed.keys() == ranks["te"].keys()
    assert all(torch.equal(tensor, ranks["te"][key]) for key, tensor in renamed.items())


def test_the_arguments_are_a_namespace_that_tells_the_shape(tmp_path, capsys):
    """As Python pickles one; with them alone the way back needs no config.json."""
    scaling = RopeScaling("llama3", factor=8.0, original_max_position_embeddings=8192)
    for name, config in {
        "plain": replace(TINY, vocab_size=97, initializer_range=0.01),
        "llama 3.1": replace(TINY, rope_theta=5e5, rope_scaling=scaling, max_position_embeddings=131072),
        "linear": replace(TINY, rope_scaling=RopeScaling("linear", factor=4.0), tie_word_embeddings=True),
        "biases": VARIANTS["biases"], "mha": VARIANTS["mha"], "wide": VARIANTS["wide-head"],
    }.items():  # fmt: skip
        out = tmp_path / name
        save_hf(out / "hf", config, random_weights(config))
        run(ConvertArgs(out / "hf", out / "mg", "megatron", tp=2, pp=2, vpp=2, iteration=3))
        text = capsys.readouterr().out
        args = load(out / "mg/iter_0000003/mp_rank_01_000/model_optim_rng.pt")["args"]
        assert type(args) is argparse.Namespace
        assert pickle.loads(pickle.dumps(args)) == args
        assert (args.padded_vocab_size, args.tensor_model_parallel_size, args.num_layers) == (256, 2, 4)
        (out / "mg" / "config.json").unlink()
        opened = open_model(out / "mg")
        assert opened.config == replace(config, eos_token_id=2, bos_token_id=1)
        assert_same(opened.reader, random_weights(config))
        line = next(line for line in text.splitlines() if line.startswith("start Megatron-LM with: "))
        flags = dict(re.findall(r"--([a-z-]+)(?: ([^-\s]\S*))?", line))
        wanted = {
            "tensor-model-parallel-size": "2", "num-layers-per-virtual-pipeline-stage": "1", "ckpt-format": "torch",
            "norm-epsilon": "1e-05", "transformer-impl": "transformer_engine", "no-load-optim": "",
        }  # fmt: skip
        assert wanted.items() <= flags.items()
        assert ("use-rope-scaling" in flags) == (name == "llama 3.1")


MEGATRONS_OWN = (
    "num_layers", "hidden_size", "ffn_hidden_size", "seq_length", "num_attention_heads", "num_query_groups",
    "group_query_attention", "kv_channels", "max_position_embeddings", "position_embedding_type",
    "add_position_embedding", "use_rotary_position_embeddings", "rotary_base", "rotary_percent", "rotary_interleaved",
    "add_bias_linear", "add_qkv_bias", "squared_relu", "swiglu", "untie_embeddings_and_output_weights",
    "apply_layernorm_1p", "normalization", "apply_query_key_layer_scaling", "attention_dropout", "hidden_dropout",
    "padded_vocab_size", "tensor_model_parallel_size", "pipeline_model_parallel_size",
)  # fmt: skip
"""What Megatron-LM's load_args_from_checkpoint and check_checkpoint_args ask a dense model's checkpoint for."""


def test_every_argument_that_megatron_asks_for_is_written():
    arguments = saved_arguments(TINY, ParallelDegrees(2, 2, padded_vocab=256), multiple=128, local=False)
    assert set(MEGATRONS_OWN) <= arguments.keys()


@pytest.mark.parametrize(
    ("name", "value"),
    [("rotary_percent", 0.5), ("rotary_interleaved", True), ("apply_layernorm_1p", True), ("swiglu", False),
     ("normalization", "LayerNorm"), ("num_experts", 8), ("qk_layernorm", True), ("position_embedding_type", "yarn")],
)  # fmt: skip
def test_a_checkpoint_of_another_model_is_refused_by_its_argument(tmp_path, name, value):
    save_hf(tmp_path / "hf", TINY, random_weights(TINY))
    run(ConvertArgs(tmp_path / "hf", tmp_path / "mg", "megatron"))
    (tmp_path / "mg" / "config.json").unlink()
    file = tmp_path / "mg/release/mp_rank_00/model_optim_rng.pt"
    payload = torch.load(file, weights_only=False)
    setattr(payload["args"], name, value)
    torch.save(payload, file)
    with pytest.raises(UserError, match=name):
        open_model(tmp_path / "mg")


def test_what_megatron_cannot_compute_is_told(tmp_path, capsys):
    dynamic = replace(TINY, rope_scaling=RopeScaling("dynamic", factor=2.0))
    save_hf(tmp_path / "hf", dynamic, random_weights(dynamic))
    run(ConvertArgs(tmp_path / "hf", tmp_path / "mg", "megatron", json=True))
    report = json.loads(capsys.readouterr().out)
    assert "dynamic" in " ".join(report["notes"])
    assert report["start_with"].startswith("--load ")
    assert not beyond_megatron(TINY)
    assert beyond_megatron(replace(TINY, attention_bias=True))
    assert "this model has" in " ".join(beyond_megatron(VARIANTS["llama3"]))


def test_ascendspeeds_files_are_what_it_reads(tmp_path):
    config = VARIANTS["mha"]
    weights = random_weights(config, dtype=torch.float16)
    save_hf(tmp_path / "hf", config, weights)
    run(ConvertArgs(tmp_path / "hf", tmp_path / "as", "ascendspeed", deepspeed=True))
    assert (tmp_path / "as/latest").read_text() == "release\n"
    payload = load(tmp_path / "as/release/mp_rank_00_model_states.pt")
    assert (payload["checkpoint_version"], payload["dp_world_size"]) == (3.0, 0)
    module = payload["module"]
    q, k, v = (weights[f"model.layers.3.self_attn.{n}_proj.weight"].view(4, 8, 32) for n in "qkv")
    fused = torch.stack([q, k, v], 1).reshape(96, 32)  # per head: q, k, v
    assert torch.equal(module["language_model.layers.3.attention.query_key_value.weight"], fused)
    embedding = weights["model.embed_tokens.weight"]
    assert torch.equal(module["embedding.word_embeddings.weight"], torch.cat([embedding, embedding[-28:]]))
    frequencies = 1.0 / 10000.0 ** (torch.arange(0, 8, 2).float() / 8)
    torch.testing.assert_close(module["language_model.layers.0.attention.rotary_emb.inv_freq"], frequencies)


def test_a_checkpoint_of_a_run_becomes_anything(tmp_path):
    weights = random_weights(TINY)
    save_run(tmp_path / "run", TINY, weights, tensor=3)
    run(ConvertArgs(tmp_path / "run", tmp_path / "mg", "megatron", tp=2, dtype="bfloat16"))
    assert_same(open_model(tmp_path / "mg").reader, {n: t.bfloat16() for n, t in weights.items()})


def test_verify_and_json(tmp_path, capsys):
    save_hf(tmp_path / "hf", TINY, random_weights(TINY))
    run(ConvertArgs(tmp_path / "hf", tmp_path / "mg", "megatron", tp=2, verify=True, json=True))
    there = json.loads(capsys.readouterr().out)
    assert there["largest_logit_difference"] == 0
    assert (there["vocab_size"], there["padded_vocab"], there["files"]) == (100, 256, 2)
    run(ConvertArgs(tmp_path / "mg", tmp_path / "back", "hf", json=True))
    assert json.loads(capsys.readouterr().out)["fingerprint"] == there["fingerprint"]
    run(ConvertArgs(tmp_path / "hf", tmp_path / "half", "hf", dtype="bfloat16", verify=True))
    text = capsys.readouterr().out
    assert "read back and compared" in text
    assert "largest logit difference" in text


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"to": "megatron", "tp": 3}, "possible --tp: 1, 2"),
        ({"to": "megatron", "pp": 3}, "possible --pp: 1, 2, 4"),
        ({"to": "megatron", "tp": 8, "pp": 8}, "2 problems"),
        ({"to": "megatron", "pp": 2, "vpp": 3}, "without --vpp"),
        ({"to": "megatron", "vpp": 2}, "more than one stage"),
        ({"to": "megatron", "tp": 0}, "--tp is 0"),
        ({"to": "hf", "tp": 2}, "no effect"),
        ({"to": "megatron", "deepspeed": True}, "belong to --to ascendspeed"),
        ({"to": "ascendspeed", "spec": "local"}, "--spec belongs to --to megatron"),
        ({"to": "ascendspeed", "deepspeed": True, "pp": 2}, "one file name"),
        ({"to": "ascendspeed", "vpp": 2, "pp": 2}, "no files for virtual stages"),
    ],
)
def test_impossible_layouts_name_the_possible(tmp_path, options, says):
    save_hf(tmp_path / "hf", TINY, random_weights(TINY))
    with unchanged(tmp_path), pytest.raises(UserError) as error:
        run(ConvertArgs(tmp_path / "hf", tmp_path / "out", **options))
    assert says in str(error.value)


def test_the_33b_is_not_cut_in_eight(tmp_path):
    from arriero.checkpoint.formats.sharding_plan import ParallelDegrees, check_degrees

    config = LlamaConfig(
        hidden_size=6656, intermediate_size=17920, num_hidden_layers=60, num_attention_heads=52, num_key_value_heads=52
    )
    with pytest.raises(UserError, match=r"(?s)52 attention heads.*over 8.*possible --tp: 1, 2, 4$") as error:
        check_degrees(config, ParallelDegrees(8, 4))
    assert "17920" not in str(error.value)
    check_degrees(config, ParallelDegrees(4, 4))


def test_too_little_disk_is_told_before(tmp_path, monkeypatch):
    save_hf(tmp_path / "hf", TINY, random_weights(TINY))
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1000))
    with unchanged(tmp_path), pytest.raises(UserError, match="are free"):
        run(ConvertArgs(tmp_path / "hf", tmp_path / "out", "megatron"))


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_conversion_leaves_nothing(tmp_path, monkeypatch, stop):
    save_hf(tmp_path / "hf", TINY, random_weights(TINY))
    calls, real = iter(range(40)), os.pwrite

    def write(fd, data, offset):
        if next(calls, None) is None:
            raise stop
        return real(fd, data, offset)

    monkeypatch.setattr("os.pwrite", write)
    with unchanged(tmp_path), pytest.raises((KeyboardInterrupt, UserError)):
        run(ConvertArgs(tmp_path / "hf", tmp_path / "out", "megatron", tp=2))


def test_rows_in_the_wrong_place_fail_the_proof_and_leave_nothing(tmp_path, monkeypatch):
    save_hf(tmp_path / "hf", TINY, random_weights(TINY))
    real = convert.plan_ranks

    def swapped(*args):
        files = real(*args)
        gate, up = (next(i for i, p in enumerate(files[1].writes) if n in p.name) for n in ("gate_proj", "up_proj"))
        writes = files[1].writes
        writes[gate], writes[up] = (
            replace(writes[gate], offset=writes[up].offset),
            replace(writes[up], offset=writes[gate].offset),
        )
        return files

    monkeypatch.setattr(convert, "plan_ranks", swapped)
    with unchanged(tmp_path), pytest.raises(CheckFailed, match=r"gate_proj.weight and 1 more read back other values"):
        run(ConvertArgs(tmp_path / "hf", tmp_path / "out", "megatron", tp=2))
