"""Names as other programs save them are read where a prefix is all that differs; else the real cause is named."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from small_models import TINY, assert_same, random_weights, save_hf

from arriero.checkpoint.formats.huggingface import open_huggingface, write_config
from arriero.checkpoint.formats.names import CONTAINERS, WRAPPERS, strip_prefixes
from arriero.checkpoint.open_model import open_model
from arriero.common.errors import UserError

TIED = replace(TINY, tie_word_embeddings=True)


def prefixed(prefix):
    return lambda weights: {prefix + name: tensor for name, tensor in weights.items()}


def inside(*keys, **beside):
    def wrap(weights):
        for key in reversed(keys):
            weights = {key: weights}
        return {**weights, **beside}

    return wrap


READ = {
    "DDP": prefixed("module."),
    "torch.compile": prefixed("_orig_mod."),
    "both": prefixed("_orig_mod.module."),
    "compiled layers": lambda w: {n.replace("layers.1.", "layers.1._orig_mod."): t for n, t in w.items()},
    "checkpointed layers": lambda w: {
        n.replace("layers.2.", "layers.2._checkpoint_wrapped_module."): t for n, t in w.items()
    },
    "FSDP1": lambda w: {
        "_fsdp_wrapped_module." + n.replace("mlp.", "mlp._fsdp_wrapped_module."): t for n, t in w.items()
    },
    "a Lightning module": prefixed("model."),
    "state_dict": inside("state_dict"),
    "a Lightning checkpoint": lambda w: inside(
        "state_dict", optimizer_states=[{"state": {0: {"exp_avg": torch.ones(3)}}}], epoch=3
    )(prefixed("model.")(w)),
    "model and optimizer": inside("model", optimizer={"state": {0: {"exp_avg": torch.ones(3)}}}, step=torch.tensor(3)),
    "model_state_dict and rng": inside("model_state_dict", rng_state=torch.ones(3, dtype=torch.uint8)),
    "two levels": inside("state_dict", "model"),
    "an average beside it": lambda w: {"model": w, "ema": {n: t + 1 for n, t in w.items()}},
}


@pytest.mark.parametrize("style", READ)
def test_prefixes_and_containers_are_read_through(tmp_path, style):
    weights = random_weights(TINY)
    write_config(tmp_path, TINY, dtype="F32")
    torch.save(READ[style](weights), tmp_path / "pytorch_model.bin")
    assert_same(open_huggingface(tmp_path), weights)


def test_safetensors_with_a_prefix_and_shards(tmp_path):
    weights = random_weights(TINY)
    save_hf(tmp_path, TINY, prefixed("module._orig_mod.")(weights), shards=3)
    assert_same(open_huggingface(tmp_path), weights)


def test_the_part_without_the_head(tmp_path):
    weights = random_weights(TIED)
    save_hf(tmp_path, TIED, {name.removeprefix("model."): t for name, t in weights.items()})
    assert_same(open_huggingface(tmp_path), weights)


def with_extra(name, *, drop="", shape=(4,), dtype=torch.float32):
    def change(weights):
        kept = {n: t for n, t in weights.items() if not (drop and drop in n)}
        return {**kept, name: torch.ones(shape).to(dtype)}

    return change


def without(word):
    return lambda weights: {name: tensor for name, tensor in weights.items() if word not in name}


def only(name):
    return lambda weights: {name: torch.ones(4, 4)}


QKV_BIASES = {f"model.layers.{i}.self_attn.{n}_proj.bias": torch.ones(4) for i in range(4) for n in "qkv"}
LAYER = "model.layers.0"
HINTS = {
    "float8 head": (lambda w: {**w, "lm_head.weight": w["lm_head.weight"].to(torch.float8_e4m3fn)},
                    "lm_head.weight is F8_E4M3", "float32, bfloat16 or float16"),
    "float8 head with a scale": (with_extra("lm_head.weight_scale"), "quantized", "dequantize"),
    "GPTQ": (with_extra(f"{LAYER}.mlp.up_proj.qweight", drop="layers.0.mlp.up_proj"), "quantized", "dequantize"),
    "bitsandbytes": (with_extra(f"{LAYER}.mlp.up_proj.weight.absmax"), "quantized", "dequantize"),
    "int8": (lambda w: {**w, "lm_head.weight": w["lm_head.weight"].to(torch.int8)}, "is I8", "dequantized"),
    "packed": (lambda w: {**w, "lm_head.weight": torch.zeros(1600)}, "is [1600]", "packed"),
    "LoRA": (with_extra(f"base_model.model.{LAYER}.self_attn.q_proj.lora_A.weight", drop="model"), "LoRA", "merge"),
    "MoE": (with_extra(f"{LAYER}.block_sparse_moe.experts.0.w1.weight", drop="mlp"), "mixture of experts", "dense"),
    "Qwen3": (with_extra(f"{LAYER}.self_attn.q_norm.weight"), "normalised", "llama models only"),
    "Qwen2": (lambda w: {**w, **QKV_BIASES}, "as in Qwen2", "llama models only"),
    "Phi-3": (with_extra(f"{LAYER}.self_attn.qkv_proj.weight", drop="q_proj"), "fused", "llama models only"),
    "Meta's names": (only("tok_embeddings.weight"), "Meta's own", "params.json"),
    "Megatron's names": (only("decoder.layers.0.mlp.linear_fc1.weight"), "Megatron's", "mp_rank"),
    "GPT-2": (only("transformer.h.0.attn.c_proj.weight"), "another family's", "llama models"),
    "reward model": (with_extra("score.weight", drop="lm_head"), "classifier", "language model alone"),
    "no head": (without("lm_head.weight"), "no head", "tie_word_embeddings"),
    "too few layers": (without("layers.3"), "4 layers, the files 3", "num_hidden_layers"),
    "a lost tensor": (without("layers.3.mlp.up"), "lacks", "fetch"),
    "biases": (with_extra(f"{LAYER}.mlp.up_proj.bias", shape=(48,)), "have biases", "mlp_bias to true"),
    "control characters": (with_extra("evil\x1b[2J.weight"), "evil\\x1b[2J", ""),
}  # fmt: skip


@pytest.mark.parametrize("case", HINTS)
def test_the_real_cause_is_named(tmp_path, case):
    change, cause, fix = HINTS[case]
    write_config(tmp_path, TINY, dtype="F32")
    save_file({n: t.contiguous() for n, t in change(random_weights(TINY)).items()}, tmp_path / "model.safetensors")
    with pytest.raises(UserError) as error:
        open_huggingface(tmp_path)
    assert cause in error.value.problem
    assert fix in error.value.fix
    assert "\x1b" not in str(error.value)
    if case not in ("too few layers",):
        assert "num_hidden_layers" not in error.value.fix
    if case != "no head":
        assert "tie_word_embeddings" not in str(error.value)


@pytest.mark.parametrize("case", [case for case in HINTS if "float8" in case])
def test_a_float8_tensor_of_torch_save_is_no_missing_one(tmp_path, case):
    write_config(tmp_path, TINY, dtype="F32")
    torch.save(HINTS[case][0](random_weights(TINY)), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=HINTS[case][1]):
        open_model(tmp_path)


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (torch.ones(3, 4).to_sparse(), "_rebuild_sparse_tensor"),
        (torch.ones(3, 4, device="meta"), "_rebuild_meta_tensor"),
    ],
)
def test_a_tensor_that_is_no_plain_array_is_not_dropped(tmp_path, tensor, said):
    write_config(tmp_path, TINY, dtype="F32")
    torch.save({**random_weights(TINY), "lm_head.weight": tensor}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=said):
        open_model(tmp_path)


def test_two_models_side_by_side_are_not_guessed_at(tmp_path):
    weights = random_weights(TINY)
    write_config(tmp_path, TINY, dtype="F32")
    torch.save({"student": weights, "teacher": weights}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="several models"):
        open_huggingface(tmp_path)
    torch.save({**prefixed("module.")(weights), **weights}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="twice"):
        open_huggingface(tmp_path)


@given(
    wrappers=st.lists(st.sampled_from(sorted(WRAPPERS)), max_size=3),
    container=st.sampled_from(CONTAINERS),
    cut=st.integers(0, 4),
)
@settings(max_examples=60, deadline=None)
def test_law_any_wrapper_anywhere(wrappers, container, cut):
    names = list(random_weights(TINY))
    wrapped = {}
    for name in names:
        parts = name.split(".")
        wrapped[".".join([*container.split(".")[:-1], *parts[:cut], *wrappers, *parts[cut:]])] = name
    assert strip_prefixes(wrapped, "x") == {name: name for name in names}


def test_a_huge_sparse_tensor_is_refused_by_its_header(tmp_path, monkeypatch):
    """Shapes are compared with config.json before a byte of data is read or room is made for it."""
    header = {"model.embed_tokens.weight": {"dtype": "F32", "shape": [2**24, 1024], "data_offsets": [0, 2**36]}}
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + 2**36)
    write_config(tmp_path, TIED, dtype="F32")
    monkeypatch.setattr("arriero.checkpoint.tensors.stream.TensorView.read_window", None)
    with pytest.raises(UserError, match=r"embed_tokens.weight is \[16777216, 1024\]"):
        open_model(tmp_path)
