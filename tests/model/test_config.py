"""config.json in and out, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import transformers

from arriero.common.errors import UserError
from arriero.common.ranges import field_ranges, range_problems
from arriero.model.config import LlamaConfig, RopeScaling, count_parameters

MINIMAL = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip


@pytest.mark.parametrize(
    ("layers", "hidden", "ffn", "heads", "parameters"),
    [  # published sizes with 32,000 tokens: LLaMA 7B, 13B, 33B, 65B
        (32, 4096, 11008, 32, 6_738_415_616),
        (40, 5120, 13824, 40, 13_015_864_320),
        (60, 6656, 17920, 52, 32_528_943_616),
        (80, 8192, 22016, 64, 65_285_660_672),
    ],
)
def test_parameter_counts_of_the_llama_family(layers: int, hidden: int, ffn: int, heads: int, parameters: int) -> None:
    raw = {**MINIMAL, "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers,
           "num_attention_heads": heads}  # fmt: skip
    assert count_parameters(LlamaConfig.from_dict(raw)) == parameters


@pytest.mark.parametrize("style", ["transformers 5", "before"])
def test_round_trip_through_transformers(tmp_path: Path, style: str) -> None:
    scaling = RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    config = LlamaConfig(num_key_value_heads=8, rope_theta=5e5, rope_scaling=scaling, rms_norm_eps=1e-5)
    if style == "transformers 5":
        transformers.LlamaConfig(**config.to_json()).save_pretrained(tmp_path)
        assert "rope_parameters" in json.loads((tmp_path / "config.json").read_text())
    else:
        raw = {k: v for k, v in config.to_json().items() if k != "rope_parameters"}
        (tmp_path / "config.json").write_text(json.dumps(raw))
    assert LlamaConfig.from_json(tmp_path) == config


def test_old_type_key_and_missing_fields_get_defaults() -> None:
    config = LlamaConfig.from_dict({**MINIMAL, "rope_scaling": {"type": "linear", "factor": 2.0}, "head_dim": None})
    assert config.rope_scaling == RopeScaling("linear", 2.0)
    assert (config.num_key_value_heads, config.head_dim) == (4, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2}}, "'yarn' is not supported"),
        ({"rope_scaling": {"rope_type": "linaer", "factor": 2}}, "did you mean 'linear'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2}}, "lacks low_freq_factor"),
        ({"num_key_value_heads": 3}, "4 heads do not divide into 3"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"head_dim": 5}, "head_dim 5 is odd"),
    ],
)
def test_impossible_configs_are_refused(tmp_path: Path, change: dict, message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**MINIMAL, **change}))
    with pytest.raises(UserError, match=message) as caught:
        LlamaConfig.from_json(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


def test_every_size_that_is_not_there_is_named() -> None:
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    for size in sizes:
        with pytest.raises(UserError, match=f"config: lacks {size}\n.*give {size} as a whole number from 1"):
            LlamaConfig.from_dict({key: value for key, value in MINIMAL.items() if key != size})


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        LlamaConfig.from_json(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        LlamaConfig.from_json(tmp_path)


HOSTILE = [
    math.nan,
    math.inf,
    -math.inf,
    -1,
    0,
    2**31,
    2**63,
    2**70,
    10**400,
    1e308,
    1e-320,
    1e30,
    "5",
    "",
    True,
    [],
    {},
]
SCALING = {
    "linear": ("factor",), "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}  # fmt: skip
CASES = [(key, "") for key, kind in field_ranges(LlamaConfig).items() if "." not in key]
CASES += [(key, kind) for kind, keys in SCALING.items() for key in keys]


@pytest.mark.parametrize("value", HOSTILE, ids=lambda value: str(value)[:12] or type(value).__name__)
@pytest.mark.parametrize(("key", "kind"), CASES)
def test_hostile_numbers_are_refused_by_name_or_within_their_range(key: str, kind: str, value: Any) -> None:
    raw: dict[str, Any] = {**MINIMAL}
    if kind:
        whole = {"factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
        raw["rope_scaling"] = {"rope_type": kind, **{k: whole[k] for k in SCALING[kind]}, key: value}
    else:
        raw[key] = value
    try:
        config = LlamaConfig.from_dict(raw, where="config.json")
    except UserError as error:
        refused = str(error)
    else:
        refused = ""
        assert range_problems(config) == []
    assert not refused or ("config.json" in refused and (key in refused or "head" in refused))
