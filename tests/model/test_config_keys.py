"""Every key of config.json against transformers: read as it reads it, refused, or named in a notice."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import re
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.modeling_rope_utils import RopeParameters
from transformers.models.llama import modeling_llama

from arriero.common.errors import UserError
from arriero.model.config import READ_KEYS, LlamaConfig
from arriero.model.config_keys import CHANGES_MATH, NO_EFFECT, ROPE_KEYS
from arriero.model.llama import Llama

BASE = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 53, "hidden_size": 32,
    "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 32,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
TOKENS = torch.randint(53, (2, 24), generator=torch.Generator().manual_seed(0))


def difference(raw: dict[str, Any], config: LlamaConfig) -> float:
    """Largest difference of our logits and transformers', both built from the same config.json and weights."""
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_dict(copy.deepcopy(raw))).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (1.0 if "norm" in name else 0.0))
        ours = Llama(config)
        ours.load_state_dict(theirs.state_dict())
        return float((ours(TOKENS) - theirs(TOKENS).logits).abs().max())


READ_STYLES: dict[str, dict[str, Any]] = {
    "plain": {},
    "no model_type": {"model_type": None, "architectures": None},
    "the first LLaMA's": {"architectures": ["LLaMAForCausalLM"], "pad_token_id": -1, "bos_token_id": 0},
    "theta at the top": {"rope_theta": 500.0},
    "theta in rope_scaling": {"rope_scaling": {"rope_type": "default", "rope_theta": 500.0}},
    "theta in rope_scaling of a type": {"rope_scaling": {"type": "linear", "factor": 2.0, "rope_theta": 500.0}},
    "theta in rope_parameters": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "theta in rope_parameters alone": {"rope_parameters": {"rope_theta": 500}},
    "both at one place": {"rope_theta": 20.0, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "old scaling, theta at the top": {"rope_theta": 500.0, "rope_scaling": {"type": "dynamic", "factor": 3.0}},
    "dynamic beyond the length": {"max_position_embeddings": 8, "rope_scaling": {"type": "dynamic", "factor": 3.0}},
    "scaling wins over parameters": {
        "rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_theta": 500.0},
    },
    "empty scaling": {"rope_scaling": {}, "rope_parameters": {"rope_theta": 500.0}},
    "null scaling": {"rope_scaling": None, "rope_theta": 500.0},
    "two types": {"rope_scaling": {"rope_type": "linear", "type": "dynamic", "factor": 4.0}},
    "llama 3.1": {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 16}, "rope_theta": 500.0},
    "llama 3.1 without the original length": {"rope_scaling": LLAMA3},
    "llama 3.1, original length at the top": {
        "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 16}, "original_max_position_embeddings": 4,
    },
    "llama 3.1 of transformers 5": {
        "rope_parameters": {**LLAMA3, "original_max_position_embeddings": 16, "rope_theta": 500.0},
    },
    "key-value heads": {"num_key_value_heads": 2},
    "wide heads": {"head_dim": 16},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "swish": {"hidden_act": "swish"},
    "tied": {"tie_word_embeddings": True},
    "eps": {"rms_norm_eps": 1e-2},
    "several ends": {"eos_token_id": [2, 7], "pad_token_id": 0},
    "Granite with LLaMA's values": {
        "embedding_multiplier": 1.0, "residual_multiplier": 1, "logits_scaling": 1.0, "attention_multiplier": 8**-0.5,
    },
    "full attention everywhere": {"layer_types": ["full_attention", "full_attention"], "no_rope_layers": [1, 1]},
    "keys without effect": {"pretraining_tp": 2, "use_cache": False, "torch_dtype": "float16", "temperature": 0.3},
}  # fmt: skip


@pytest.mark.parametrize("style", READ_STYLES)
def test_every_style_of_config_gives_transformers_logits_and_survives_writing(style: str) -> None:
    raw = {key: value for key, value in {**BASE, **READ_STYLES[style]}.items() if value is not None}
    config = LlamaConfig.from_dict(raw)
    assert difference(raw, config) < 1e-4
    again = LlamaConfig.from_dict(json.loads(json.dumps(config.to_json())))
    assert again == config
    assert not again.notices
    assert difference(config.to_json(), config) < 1e-4


REFUSED: dict[str, Any] = {
    "partial_rotary_factor": 0.5, "layer_types": ["full_attention", "sliding_attention"],
    "no_rope_layers": [1, 0], "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
    "embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 8.0, "attention_multiplier": 0.0625,
    "query_pre_attn_scalar": 256, "scale_emb": 12, "use_qk_norm": True, "quantization_config": {"bits": 4},
    "num_local_experts": 8, "attention_chunk_size": 8192, "clip_qkv": 8.0, "hidden_act": "gelu",
    "hidden_activation": "gelu_pytorch_tanh", "model_type": "qwen3", "per_layer_config": {"0": {"head_dim": 4}},
    "rope_parameters": {"full_attention": {"rope_theta": 5.0}}, "rope_scaling": {"rope_type": "yarn", "factor": 2.0},
    "pruned_heads": {"0": [1]}, "head_dim": 7, "is_encoder_decoder": True, "vision_config": {"depth": 2},
}  # fmt: skip


@pytest.mark.parametrize("key", REFUSED)
def test_a_key_that_makes_another_model_is_refused_by_name(key: str) -> None:
    with pytest.raises(UserError, match=key):
        LlamaConfig.from_dict({**BASE, key: REFUSED[key]})


def test_all_problems_are_named_together() -> None:
    with pytest.raises(UserError, match=r"(?s)2 problems.*logits_scaling.*quantization_config"):
        LlamaConfig.from_dict({**BASE, "logits_scaling": 8.0, "quantization_config": {"bits": 4}})


NOTICED: dict[str, dict[str, Any]] = {
    "attention_dropout": {"attention_dropout": 0.1},
    "sliding_window": {"sliding_window": 4096, "model_type": None},
    "architectures": {"architectures": ["MistralForCausalLM"]},
    "rope_scaling.beta_fast": {"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 32}},
    "rope_parameters.factor": {"rope_parameters": {"rope_type": "default", "factor": 8.0}},
    "which is taken over": {"rope_theta": 20.0, "rope_parameters": {"rope_theta": 500.0}},
    "which differs from it": READ_STYLES["scaling wins over parameters"],
    "max_sequence_length": {"max_sequence_length": 2048},
    "bell\\x07": {"bell\x07": 1},
    "original_max_position_embeddings": {"original_max_position_embeddings": 8},
}


@pytest.mark.parametrize("said", NOTICED)
def test_a_key_that_is_not_taken_into_account_is_named(said: str) -> None:
    raw = {key: value for key, value in {**BASE, **NOTICED[said]}.items() if value is not None}
    config = LlamaConfig.from_dict(raw)
    assert said in "\n".join(config.notices)
    assert "\x07" not in "\n".join(config.notices)
    assert difference(raw, config) < 1e-4


def test_another_familys_file_without_a_model_type_is_refused() -> None:
    with pytest.raises(UserError, match="MistralForCausalLM"):
        LlamaConfig.from_dict({**BASE, "model_type": None, "architectures": ["MistralForCausalLM"]})


def test_every_key_that_transformers_llama_reads_is_known_here() -> None:
    """Taken from its dataclass and from the source of its model, so that a new version's keys are found."""
    known = READ_KEYS | NO_EFFECT | CHANGES_MATH.keys() | {"attention_dropout"}
    fields = {f.name for f in dataclasses.fields(transformers.LlamaConfig)}
    source = inspect.getsource(modeling_llama)
    in_model = set(re.findall(r"config\.([a-z]\w+)|getattr\((?:self\.)?config, \"([a-z]\w+)", source))
    read = fields | {a or b for a, b in in_model}
    assert len(read) > 25
    assert read - known == set()
    nested = {"rope_theta", "rope_type", "partial_rotary_factor", *(key for keys in ROPE_KEYS.values() for key in keys)}
    others = set(RopeParameters.__annotations__) - nested
    for key in others:  # of types that are refused; with ours they are of no effect, and named
        config = LlamaConfig.from_dict({**BASE, "rope_scaling": {"type": "linear", "factor": 2.0, key: 2}})
        assert any(key in notice for notice in config.notices), key


POOL: dict[str, list[Any]] = {
    "model_type": ["llama"], "architectures": [["LlamaForCausalLM"], ["MistralForCausalLM"], []],
    "num_key_value_heads": [1, 2, 4, 3, None], "head_dim": [None, 8, 16, 6], "rms_norm_eps": [1e-5, 1e-2],
    "rope_theta": [500.0, 10000, 1e6], "tie_word_embeddings": [True, False], "attention_bias": [True, False],
    "mlp_bias": [True, False], "hidden_act": ["silu", "swish", "gelu", "relu"], "attention_dropout": [0.0, 0.1],
    "max_position_embeddings": [8, 32, 4096], "original_max_position_embeddings": [4, 16],
    "partial_rotary_factor": [1.0, 0.5], "sliding_window": [4, None], "pretraining_tp": [1, 2],
    "layer_types": [["full_attention"] * 2, ["sliding_attention"] * 2], "eos_token_id": [2, [2, 3], None],
    "pad_token_id": [0, -1, None], "logits_scaling": [1.0, 4.0], "quantization_config": [None],
    "rope_scaling": [None, {}, {"type": "linear", "factor": 2.0}, {"rope_type": "dynamic", "factor": 4.0},
                     {"rope_type": "default", "rope_theta": 77.0}, {**LLAMA3, "rope_theta": 900.0},
                     {"rope_type": "linear", "factor": 2, "partial_rotary_factor": 1.0},
                     {**LLAMA3, "original_max_position_embeddings": 16, "type": "llama3"},
                     {"rope_type": "linear", "type": "dynamic", "factor": 2.0, "rope_theta": 44.0}],
    "rope_parameters": [None, {"rope_theta": 333.0}, {"rope_type": "linear", "factor": 3.0},
                        {**LLAMA3, "original_max_position_embeddings": 8, "rope_theta": 55.0}],
}  # fmt: skip


@given(keys=st.fixed_dictionaries({}, optional={key: st.sampled_from(values) for key, values in POOL.items()}))
@settings(max_examples=120, deadline=None)
def test_law_any_config_is_refused_or_gives_transformers_logits(keys: dict[str, Any]) -> None:
    raw = {**BASE, **copy.deepcopy(keys)}
    try:
        config = LlamaConfig.from_dict(raw)
    except UserError:
        return
    assert difference(raw, config) < 1e-4
    assert LlamaConfig.from_dict(config.to_json()) == config


BAD_NUMBERS = [float("nan"), float("inf"), -float("inf"), -1, 0, 1e300, 2**70, "1", True, [1], {}]
NUMBERS = [
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_theta",
]  # fmt: skip


@pytest.mark.parametrize("key", [*NUMBERS, "factor", "low_freq_factor", "original_max_position_embeddings"])
def test_numbers_out_of_range_are_refused_by_name(key: str) -> None:
    for value in BAD_NUMBERS:
        raw = copy.deepcopy({**BASE, "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 16}})
        (raw if key in NUMBERS else raw["rope_scaling"])[key] = value
        with pytest.raises(UserError, match=key):
            LlamaConfig.from_dict(raw)
