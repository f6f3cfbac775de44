"""Names of tensors as other programs save them: removing wrappers and containers, and what unknown names mean."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import TypeVar

from arriero.common.errors import UserError
from arriero.common.text import escape
from arriero.model.config import LlamaConfig, layer_shapes

T = TypeVar("T")

WRAPPERS = frozenset({
    "module", "_orig_mod", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module",
})  # fmt: skip
"""What DDP, torch.compile, Lightning Fabric, FSDP1 and activation checkpointing put into a name."""
CONTAINERS = ("", "state_dict.", "model_state_dict.", "model.", "state_dict.model.", "model.model.", "base_model.")
"""What training scripts save a model's tensors under, the likeliest first."""
_BESIDE = re.compile(
    r"(optim\w*|optimizer\w*|opt|ema\w*|lr_scheduler\w*|scheduler\w*|scaler\w*|rng\w*|random\w*|loops|callbacks|args|"
    r"config|hyper_parameters|global_step|epoch|step)(\.|$)"
)
"""What else such a script saves beside the model."""
_TABLE = "embed_tokens.weight"

CAUSES: tuple[tuple[str, str, str], ...] = (
    (r"\.(qweight|qzeros|g_idx|scales|SCB|absmax|quant_map|weight_packed|\w*scale(_inv|s)?|quant_state\b.*)$",
     "the weights are quantized", "save the model dequantized, for example by transformers' model.dequantize()"),
    (r"lora_[AB]|lora_embedding|modules_to_save", "these are LoRA adapters",
     "merge them into the model, for example by peft's merge_and_unload()"),
    (r"_flat_param|flat_param_", "these are FSDP's flat shards", "save the full state dict"),
    (r"\b(experts|block_sparse_moe|shared_expert)\b|mlp\.(gate|router)\.", "its feed-forward is a mixture of experts",
     "arriero trains dense LLaMA models"),
    (r"\.(q_norm|k_norm|q_layernorm|k_layernorm)\.", "queries and keys are normalised, as in Qwen3 or OLMo 2",
     "arriero trains llama models only"),
    (r"\.(pre_feedforward_layernorm|post_feedforward_layernorm|post_self_attn_layernorm)\.",
     "it has more norms than LLaMA, as Gemma or OLMo 2", "arriero trains llama models only"),
    (r"\b(qkv_proj|gate_up_proj|W_pack|query_key_value|Wqkv|c_attn)\b", "matrices are fused, as in Phi-3 or Baichuan",
     "arriero trains llama models only"),
    (r"^(tok_embeddings|output|norm|layers\.[0-9]+\.(attention|feed_forward)\.w[a-z0-9]+)\.weight$",
     "the names are Meta's own", "keep the files' names, consolidated.NN.pth, with their params.json"),
    (r"^(decoder\.layers|embedding\.word_embeddings|language_model\.(encoder|embedding))\b", "the names are Megatron's",
     "keep its folders, mp_rank_*, and name the directory above them"),
    (r"\b(vision_tower|vision_model|multi_modal_projector|visual|audio_tower)\b",
     "the language model is a part of another one", "save its language model alone"),
    (r"^(transformer\.|gpt_neox\.|bert\.|encoder\.|h\.[0-9])", "the names are another family's",
     "arriero trains llama models only"),
    (r"^(score|v_head|value_head|classifier)\.", "it has a classifier or a value head",
     "save the language model alone"),
)  # fmt: skip
"""(what an unknown tensor's name looks like, what that means, what to do)."""


def strip_prefixes(tensors: Mapping[str, T], where: str) -> dict[str, T]:
    """The tensors under Hugging Face's names, where wrappers and containers are all that differs.

    Raises:
        UserError: two tensors have one name then, or several models lie side by side.
    """
    plain: dict[str, T] = {}
    for name, tensor in tensors.items():
        short = ".".join(part for part in name.split(".") if part not in WRAPPERS)
        if short in plain:
            fix = "save one model's state dict alone"
            raise UserError(f"{where}: holds {escape(name)} twice, once under another prefix", fix)
        plain[short] = tensor
    ends = [name.removesuffix(_TABLE) for name in plain if name == _TABLE or name.endswith(f".{_TABLE}")]
    found = [end.removesuffix("model.") if end.endswith("model.") else None for end in ends]
    prefixes = [prefix for prefix in found if prefix is not None]
    if ends == [""]:  # saved from LlamaModel, the part without the head
        return {name if name == "lm_head.weight" else f"model.{name}": t for name, t in plain.items()}
    known = [prefix for prefix in CONTAINERS if prefix in prefixes] or prefixes
    if not known or known[0] == "":
        return plain
    if len(prefixes) > 1 and known[0] not in CONTAINERS:
        fix = "save one model's state dict alone"
        raise UserError(f"{where}: holds several models: {escape(', '.join(sorted(prefixes)))}", fix)
    inside = {name.removeprefix(known[0]): t for name, t in plain.items() if name.startswith(known[0])}
    others = tuple(prefix for prefix in prefixes if prefix not in ("", known[0]) and not known[0].startswith(prefix))
    beside = {
        name: t
        for name, t in plain.items()
        if not (name.startswith((known[0], *others)) or _BESIDE.match(name))
    }  # fmt: skip
    return {**inside, **beside}


def explain_mismatch(config: LlamaConfig, missing: Collection[str], extra: Collection[str]) -> tuple[str, str]:
    """Why the names are not those of `config`: the cause, which may be empty, and the fix.

    Args:
        config: what the names should fit.
        missing: names that it asks for and that are not there.
        extra: names that are there and that it does not ask for.
    """
    for pattern, cause, fix in CAUSES:
        if any(re.search(pattern, name) for name in extra):
            return cause, fix
    if found := _layers_differ(config, missing, extra) or _biases_differ(missing, extra):
        return found
    if list(missing) == ["lm_head.weight"] and not extra:
        return "there is no head", "if it is the embedding, set tie_word_embeddings to true in config.json"
    if extra and len(missing) > 3:
        return "the names are not LLaMA's", "save the state dict of transformers' LlamaForCausalLM"
    return "", "fetch the files again, with their own config.json"


def _layers_differ(config: LlamaConfig, missing: Collection[str], extra: Collection[str]) -> tuple[str, str] | None:
    """Whether whole layers at the end are all that differs: cause and fix."""
    numbers = [int(m[1]) if (m := re.match(r"model\.layers\.([0-9]{1,9})\.", n)) else -1 for n in (*missing, *extra)]
    count = config.num_hidden_layers
    if extra and not missing and min(numbers) >= count:
        return f"config.json has {count} layers, the files {max(numbers) + 1}", "correct num_hidden_layers"
    first = min(numbers, default=-1)
    if missing and not extra and first > 0 and len(missing) == (count - first) * len(layer_shapes(config)):
        fix = "correct num_hidden_layers, or fetch the files again"
        return f"config.json has {count} layers, the files {first}", fix
    return None


def _biases_differ(missing: Collection[str], extra: Collection[str]) -> tuple[str, str] | None:
    """Whether biases are all that differs: cause and fix."""
    names = [*missing, *extra]
    if bool(missing) == bool(extra) or not all(name.endswith("_proj.bias") for name in names):
        return None
    if extra and {name.split(".")[-2] for name in extra} == {"q_proj", "k_proj", "v_proj"}:
        return "q, k and v have biases and o has none, as in Qwen2", "arriero trains llama models only"
    flags = [
        f for f, part in (("attention_bias", ".self_attn."), ("mlp_bias", ".mlp.")) if any(part in n for n in names)
    ]
    cause, value = ("the files have biases", "true") if extra else ("the files have no such biases", "false")
    return cause, f"set {' and '.join(flags)} to {value} in config.json"
