"""The keys of `config.json` beyond the shape: which ones change the math, and with which values they do not.

`model/config.py` reads the shape. Whatever else a file holds is found here: a key that would make another model of the
same weights is refused, and every other key that is not taken into account is named in a notice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from arriero.common.errors import UserError, closest_match
from arriero.common.text import escape

NO_EFFECT = frozenset({
    "model_type", "hidden_act", "hidden_activation", "architectures",
    "transformers_version", "torch_dtype", "dtype", "name_or_path", "use_cache", "return_dict", "output_attentions",
    "output_hidden_states", "chunk_size_feed_forward", "id2label", "label2id", "num_labels", "problem_type",
    "pretraining_tp", "attn_implementation", "experts_implementation", "tie_last_hidden_states", "torchscript",
    "use_bfloat16", "gradient_checkpointing", "finetuning_task", "task_specific_params", "tokenizer_class", "prefix",
    "tf_legacy_loss", "is_decoder", "tie_encoder_decoder", "decoder_start_token_id", "sep_token_id", "unsloth_version",
    "unsloth_fixed", "use_sliding_window", "max_window_layers",
    # defaults of text generation, which files of transformers before 4.40 keep here
    "max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty",
    "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "output_scores", "return_dict_in_generate",
    "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty",
    "suppress_tokens", "begin_suppress_tokens",
})  # fmt: skip
"""Keys without an effect on the logits: no notice."""

ROPE_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""The rotary types that are computed here, and the keys that each needs beside rope_theta."""


def _is_unset(value: Any) -> bool:
    return value in (None, False, 0, "", [], {})


def _is_one(value: Any) -> bool:
    return value is None or value == 1


def _holds_only(*allowed: Any) -> Callable[[Any], bool]:
    return lambda value: value is None or (isinstance(value, list) and all(one in allowed for one in value))


CHANGES_MATH: dict[str, tuple[Callable[[Any], bool], str]] = {
    "partial_rotary_factor": (_is_one, "only a part of each head is rotated"),
    "rotary_pct": (_is_one, "only a part of each head is rotated"),
    "rope_traditional": (_is_unset, "neighbouring pairs are rotated, not halves"),
    "rope_interleave": (_is_unset, "neighbouring pairs are rotated, not halves"),
    "rope_interleaved": (_is_unset, "neighbouring pairs are rotated, not halves"),
    "no_rope_layers": (_holds_only(1, True), "some layers have no rotary embedding"),
    "no_rope_layer_interval": (_is_unset, "some layers have no rotary embedding"),
    "nope_layer_interval": (_is_unset, "some layers have no rotary embedding"),
    "alibi": (_is_unset, "positions are biases, not rotations"),
    "use_alibi": (_is_unset, "positions are biases, not rotations"),
    "layer_types": (_holds_only("full_attention", "attention"), "some layers have another kind of attention"),
    "attention_chunk_size": (_is_unset, "attention is cut into chunks"),
    "layers_block_type": (_holds_only("attention"), "some layers have another kind of attention"),
    "attn_logit_softcapping": (_is_unset, "attention scores are capped"),
    "final_logit_softcapping": (_is_unset, "logits are capped"),
    "logit_softcap": (_is_unset, "logits are capped"),
    "final_logits_soft_cap": (_is_unset, "logits are capped"),
    "attn_soft_cap": (_is_unset, "attention scores are capped"),
    "clip_qkv": (_is_unset, "queries, keys and values are clipped"),
    "use_qk_norm": (_is_unset, "queries and keys are normalised"),
    "qk_norm": (_is_unset, "queries and keys are normalised"),
    "qk_layernorm": (_is_unset, "queries and keys are normalised"),
    "use_qk_layernorm": (_is_unset, "queries and keys are normalised"),
    "attn_temperature_tuning": (_is_unset, "attention is scaled by position"),
    "embedding_multiplier": (_is_one, "embeddings are scaled"),
    "residual_multiplier": (_is_one, "residuals are scaled"),
    "logits_scaling": (_is_one, "logits are scaled"),
    "logit_scale": (_is_one, "logits are scaled"),
    "lm_head_multiplier": (_is_one, "logits are scaled"),
    "output_multiplier_scale": (_is_one, "logits are scaled"),
    "key_multiplier": (_is_one, "keys are scaled"),
    "attention_in_multiplier": (_is_one, "attention is scaled"),
    "attention_out_multiplier": (_is_one, "attention is scaled"),
    "mlp_multipliers": (_holds_only(1, 1.0), "the feed-forward is scaled"),
    "scale_emb": (_is_one, "embeddings are scaled"),
    "scale_embeddings": (_is_unset, "embeddings are scaled"),
    "scale_embedding": (_is_unset, "embeddings are scaled"),
    "embedding_scale": (_is_one, "embeddings are scaled"),
    "scale_depth": (_is_unset, "residuals are scaled"),
    "mup_width_scale": (_is_one, "logits are scaled"),
    "use_mup": (_is_unset, "multipliers of muP apply"),
    "use_post_norm": (_is_unset, "the norms stand behind the blocks"),
    "use_parallel_residual": (_is_unset, "attention and feed-forward run side by side"),
    "parallel_attn": (_is_unset, "attention and feed-forward run side by side"),
    "attention_sink": (_is_unset, "attention has sinks"),
    "add_cross_attention": (_is_unset, "there is cross attention"),
    "is_encoder_decoder": (_is_unset, "there is an encoder"),
    "pruned_heads": (_is_unset, "heads were pruned"),
    "per_layer_config": (_is_unset, "layers differ in shape"),
    "block_configs": (_is_unset, "layers differ in shape"),
    "num_experts": (lambda v: _is_unset(v) or v == 1, "the feed-forward is a mixture of experts"),
    "num_local_experts": (lambda v: _is_unset(v) or v == 1, "the feed-forward is a mixture of experts"),
    "n_routed_experts": (lambda v: _is_unset(v) or v == 1, "the feed-forward is a mixture of experts"),
    "moe_num_experts": (lambda v: _is_unset(v) or v == 1, "the feed-forward is a mixture of experts"),
    "quantization_config": (_is_unset, "the weights are quantized"),
    "quantization": (_is_unset, "the weights are quantized"),
    "compression_config": (_is_unset, "the weights are quantized"),
    "vision_config": (_is_unset, "there is an image encoder"),
    "audio_config": (_is_unset, "there is an audio encoder"),
    "text_config": (_is_unset, "the language model is a part of another model"),
}
"""Keys with which the same weights are another model: (whether a value changes nothing, what it changes)."""

ACTIVATIONS = ("silu", "swish")  # one function under two names


def check_other_keys(
    raw: Mapping[str, Any], read: frozenset[str], *, where: str, head_dim: float
) -> tuple[list[UserError], list[str]]:
    """What a `config.json` holds beyond the keys that are read.

    Args:
        raw: the decoded file.
        read: the keys whose values are taken.
        where: the file, for messages.
        head_dim: size of a head, from which the usual scale of attention follows.

    Returns:
        Problems, one a key that would make another model; notices, one sentence each.
    """
    problems, ignored = [], []
    for key, value in raw.items():
        if key in read or key in NO_EFFECT or key.startswith("_"):
            continue
        if key in CHANGES_MATH:
            changes_nothing, effect = CHANGES_MATH[key]
            if not changes_nothing(value):
                problems.append(_incompatible(where, key, value, effect))
        elif key in ("attention_multiplier", "query_pre_attn_scalar"):
            usual = head_dim**-0.5 if key == "attention_multiplier" else head_dim
            if value is not None and not (_number(value) and math.isclose(value, usual, rel_tol=1e-6)):
                problems.append(_incompatible(where, key, value, "attention scores have another scale"))
        elif key in ("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop"):
            if not _is_unset(value):
                ignored.append(f"{key} {escape(value, 40)} (training here is without dropout)")
        elif key == "sliding_window":
            if not _is_unset(value) and raw.get("use_sliding_window") is not False:
                ignored.append(f"{key} {escape(value, 40)} (LLaMA attends to all positions)")
        elif value is not None:
            ignored.append(escape(key, 60))
    more = f" and {len(ignored) - 12} more" if len(ignored) > 12 else ""
    notices = [f"{escape(where)}: not taken into account: {', '.join(ignored[:12])}{more}"] if ignored else []
    return problems, notices


def check_model_type(raw: Mapping[str, Any], where: str, expected: str) -> tuple[list[UserError], list[str]]:
    """Whether the file is of the `expected` model_type, by its keys on model and activation: problems and notices."""
    problems, notices = [], []
    fix = "arriero trains llama models only"
    kind, names = raw.get("model_type"), raw.get("architectures")
    if kind not in (None, expected):
        problems.append(UserError(f"{where}: model_type is {escape(repr(kind))}", fix))
    elif names is not None:
        listed = names if isinstance(names, list) else [names]
        if listed and not any(str(name).lower().startswith(expected) for name in listed):
            problem = f"architectures is {escape(names)}"
            if kind is None:
                problems.append(UserError(f"{where}: {problem}, and model_type is missing", fix))
            else:
                notices.append(f"{escape(where)}: {problem}, but model_type is llama: read as LLaMA")
    for key in ("hidden_act", "hidden_activation"):
        if raw.get(key) not in (None, *ACTIVATIONS):
            problems.append(UserError(f"{where}: {key} is {escape(repr(raw[key]))}", "LLaMA's activation is silu"))
    return problems, notices


def rope_settings(raw: Mapping[str, Any], where: str) -> tuple[dict[str, Any], str, list[UserError], list[str]]:
    """The rotary settings, from the keys that transformers reads.

    A `rope_scaling` that is not empty wins over `rope_parameters` as a whole; `rope_theta` inside wins over the one at
    the top. Files before transformers 4.43 write `type` for `rope_type`.

    Returns:
        The settings, with rope_theta and every key that the type needs; the type; problems; notices.
    """
    source = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    given: dict[str, Any] = {k: v for k, v in (raw.get(source) or {}).items() if v is not None}
    notices, problems = [], []
    kind = given.get("rope_type", given.get("type", "default"))
    theta = next((v for v in (given.get("rope_theta"), raw.get("rope_theta")) if v is not None), 10000.0)
    outer = raw.get("original_max_position_embeddings")
    if kind == "llama3":
        original = given.get("original_max_position_embeddings", raw.get("max_position_embeddings"))
        given["original_max_position_embeddings"] = (2048 if original is None else original) if outer is None else outer
    elif outer is not None:
        notices.append(f"{escape(where)}: not taken into account: original_max_position_embeddings (of llama3 only)")
    if not isinstance(kind, str) or kind not in ROPE_KEYS:
        fix = closest_match(str(kind), ROPE_KEYS)
        return (
            given,
            "default",
            [UserError(f"{where}: {source} of type {escape(repr(kind))} is not supported", fix)],
            [],
        )
    known = {"rope_type", "type", "rope_theta", *ROPE_KEYS[kind]}
    for key in [key for key in given if key not in known]:
        changes_nothing, effect = CHANGES_MATH.get(key, (None, ""))
        if isinstance(given[key], dict):
            problems.append(
                _incompatible(where, f"{source}.{key}", given[key], "layers have rotary embeddings of their own")
            )
        elif changes_nothing is None:
            text = f"{source}.{key} (of no effect with type {kind})"
            notices.append(f"{escape(where)}: not taken into account: {escape(text)}")
        elif not changes_nothing(given[key]):
            problems.append(_incompatible(where, f"{source}.{key}", given[key], effect))
    if missing := [key for key in ROPE_KEYS[kind] if key not in given]:
        problem = f"{where}: {source} of type {kind} lacks {', '.join(missing)}"
        problems.append(UserError(problem, "add it to config.json"))
    notices += [f"{escape(where)}: {one}" for one in _contradictions(raw, given, source, theta, kind)]
    return {**given, "rope_theta": theta}, kind, problems, notices


def _contradictions(raw: Mapping[str, Any], given: Mapping[str, Any], source: str, theta: Any, kind: str) -> list[str]:
    """Contradictions between two keys of the file about rotary embedding."""
    found = []
    if raw.get("rope_theta") not in (None, theta):
        found.append(
            f"{source} has rope_theta {escape(theta, 40)}, which is taken over {escape(raw['rope_theta'], 40)}"
        )
    if "type" in given and given["type"] != kind:
        found.append(f"{source} has rope_type {kind}, which is taken over type {escape(given['type'], 40)}")
    other = raw.get("rope_parameters") if source == "rope_scaling" else None
    if other and (
        other.get("rope_theta") not in (None, theta) or other.get("rope_type", other.get("type")) not in (None, kind)
    ):
        found.append("rope_scaling is taken and rope_parameters is not, which differs from it")
    return found


def _incompatible(where: str, key: str, value: Any, effect: str) -> UserError:
    fix = f"this is no plain LLaMA ({effect})"
    if "quantized" in effect:
        fix = "save the model dequantized, for example by transformers' model.dequantize()"
    return UserError(f"{where}: {key} is {escape(repr(value), 80)}: {effect}", fix)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
