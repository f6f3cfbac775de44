"""The arguments that Megatron-LM keeps beside its weights: written for `--use-checkpoint-args`, and read back.

Names as in Megatron-LM's megatron/training/arguments.py; what it takes from a checkpoint is listed in
`load_args_from_checkpoint`, and what must agree in `check_checkpoint_args`, both in megatron/training/checkpointing.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from arriero.checkpoint.formats.sharding_plan import ParallelDegrees
from arriero.common.errors import UserError, join_problems
from arriero.common.text import escape
from arriero.model.config import LlamaConfig, RopeScaling

LLAMA3_ORIGINAL = 8192  # the original length of Llama 3.1, which Megatron fixes
_FIXED = RopeScaling("llama3", original_max_position_embeddings=LLAMA3_ORIGINAL)


def saved_arguments(config: LlamaConfig, degrees: ParallelDegrees, *, multiple: int, local: bool) -> dict[str, Any]:
    """The arguments with which Megatron builds this model: attributes of the `argparse.Namespace` under `args`.

    Args:
        config: the shape.
        degrees: degrees of parallelism, and the padded vocabulary.
        multiple: what the vocabulary was padded to a multiple of, times the tensor-parallel degree.
        local: whether the layers are Megatron's own, not Transformer Engine's.
    """
    grouped = config.num_key_value_heads != config.num_attention_heads
    scaling = config.rope_scaling
    arguments: dict[str, Any] = {
        "num_layers": config.num_hidden_layers, "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.intermediate_size, "num_attention_heads": config.num_attention_heads,
        "group_query_attention": grouped, "num_query_groups": config.num_key_value_heads if grouped else 1,
        "kv_channels": config.head_dim, "seq_length": config.max_position_embeddings,
        "max_position_embeddings": config.max_position_embeddings, "position_embedding_type": "rope",
        "add_position_embedding": True, "use_rotary_position_embeddings": True, "rotary_percent": 1.0,
        "rotary_base": _whole(config.rope_theta), "rotary_interleaved": False, "add_bias_linear": config.mlp_bias,
        "add_qkv_bias": config.attention_bias, "swiglu": True, "squared_relu": False,
        "untie_embeddings_and_output_weights": not config.tie_word_embeddings, "apply_layernorm_1p": False,
        "normalization": "RMSNorm", "norm_epsilon": config.rms_norm_eps, "apply_query_key_layer_scaling": False,
        "attention_dropout": 0.0, "hidden_dropout": 0.0, "init_method_std": config.initializer_range,
        "vocab_size": config.vocab_size, "padded_vocab_size": degrees.padded_vocab,
        "make_vocab_size_divisible_by": multiple, "tensor_model_parallel_size": degrees.tensor,
        "pipeline_model_parallel_size": degrees.pipeline, "data_parallel_random_init": False,
        "transformer_impl": "local" if local else "transformer_engine", "ckpt_format": "torch",
        "use_rope_scaling": scaling.rope_type == "llama3", "consumed_train_samples": 0, "consumed_valid_samples": 0,
    }  # fmt: skip
    if degrees.virtual > 1:
        arguments["virtual_pipeline_model_parallel_size"] = degrees.virtual
        arguments["num_layers_per_virtual_pipeline_stage"] = config.num_hidden_layers // (
            degrees.pipeline * degrees.virtual
        )
    if scaling.rope_type == "llama3":
        arguments["rope_scaling_factor"] = float(scaling.factor)
    if scaling.rope_type == "linear":
        arguments["rotary_seq_len_interpolation_factor"] = _whole(scaling.factor)
    return arguments


def start_flags(directory: Path, arguments: Mapping[str, Any], *, iteration: int) -> str:
    """The flags to start Megatron-LM with: those that it does not take from the checkpoint, or not in every version.

    Args:
        directory: the checkpoint.
        arguments: as `saved_arguments` gives them.
        iteration: what the checkpoint claims; 0 is `release`.
    """
    flags = [f"--load {escape(directory)} --use-checkpoint-args --ckpt-format torch"]
    for name in (
        "tensor_model_parallel_size", "pipeline_model_parallel_size", "num_layers_per_virtual_pipeline_stage",
        "make_vocab_size_divisible_by", "norm_epsilon", "rotary_base", "rotary_seq_len_interpolation_factor",
        "attention_dropout", "hidden_dropout", "transformer_impl",
    ):  # fmt: skip
        if name in arguments:
            flags.append(f"--{name.replace('_', '-')} {arguments[name]}")
    if arguments["use_rope_scaling"]:
        flags.append(f"--use-rope-scaling --rope-scaling-factor {arguments['rope_scaling_factor']}")
    if arguments["transformer_impl"] == "local":
        flags.append("--no-persist-layer-norm")
    if iteration:
        flags.append("--no-load-optim --no-load-rng")
    return " ".join(flags)


def beyond_megatron(config: LlamaConfig) -> list[str]:
    """What of this shape Megatron-LM cannot compute, one sentence each."""
    found, scaling = [], config.rope_scaling
    if scaling.rope_type == "dynamic":
        found.append("Megatron-LM has no dynamic rope_scaling: its logits differ beyond max_position_embeddings")
    keys = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    own = [f"{key} {getattr(scaling, key)}" for key in keys if getattr(scaling, key) != getattr(_FIXED, key)]
    if scaling.rope_type == "llama3" and own:
        fixed = ", ".join(f"{key} {getattr(_FIXED, key)}" for key in keys)
        found.append(f"Megatron-LM fixes llama3's {fixed}; this model has {', '.join(own)}: its logits differ there")
    if scaling.rope_type == "linear" and scaling.factor != int(scaling.factor):
        found.append("Megatron-LM's --rotary-seq-len-interpolation-factor takes whole numbers only")
    if config.attention_bias != config.mlp_bias:
        found.append("Megatron-LM has biases on all linears or on q, k and v alone: this model has others")
    return found


def _whole(value: float) -> float:
    return int(value) if value == int(value) else value


def _off(value: Any) -> bool:
    return value in (None, False, 0, "")


def _is(*allowed: Any) -> Callable[[Any], bool]:
    return lambda value: value is None or value in allowed


_CHANGES_MATH: dict[str, Callable[[Any], bool]] = {
    "rotary_percent": _is(1, 1.0), "rotary_interleaved": _off, "apply_layernorm_1p": _off, "squared_relu": _off,
    "normalization": _is("RMSNorm"), "swiglu": _is(True), "num_experts": _is(0, 1), "qk_layernorm": _off,
    "qk_l2_norm": _off, "multi_latent_attention": _off, "window_size": _off, "no_rope_freq": _off,
    "apply_residual_connection_post_layernorm": _off, "is_hybrid_model": _off, "attention_output_gate": _off,
    "position_embedding_type": _is("rope", "learned_absolute"), "softmax_type": _is("vanilla"),
    "heterogeneous_layers_config_path": _off, "activation_func_clamp_value": _off, "glu_linear_offset": _off,
}  # fmt: skip
"""Saved arguments with which the same weights are another model, and the values with which they are LLaMA's."""


def check_arguments(arguments: Mapping[str, Any], where: str) -> None:
    """Raises UserError, naming every saved argument that makes this another model than LLaMA."""
    problems = [
        UserError(f"{where}: was trained with {name} {escape(repr(arguments[name]), 60)}", "that is no LLaMA")
        for name, usual in _CHANGES_MATH.items()
        if name in arguments and isinstance(arguments[name], (str, int, float, bool)) and not usual(arguments[name])
    ]
    if problems:
        raise join_problems(problems)
