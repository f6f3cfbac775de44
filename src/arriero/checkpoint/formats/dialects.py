"""The names that other systems give to LLaMA's tensors. They are applied in sharding_plan.py."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Dialect:
    """One naming. Keys without `.weight` take `.weight` and `.bias`; `layer` is the prefix of a layer's keys."""

    name: str
    embedding: str
    layer: str
    input_norm: str
    qkv: str
    out: str
    post_norm: str
    gate_up: tuple[str, ...]  # one key: fused, gate above up; two keys: apart
    down: str
    final_norm: str
    head: str
    tied_head: str  # the copy of tied embeddings that a last stage without the first holds
    always_head: bool = False  # the model has a head of its own even where config.json ties it
    pad_with_last_rows: bool = False  # padding copies the last rows of the table; otherwise the last row, repeated
    inv_freq: str = ""  # rotary frequencies that a strict load expects in every layer


MCORE = Dialect(
    name="megatron-core",
    embedding="embedding.word_embeddings.weight",
    layer="decoder.layers.{}.",
    input_norm="input_layernorm.weight",
    qkv="self_attention.linear_qkv",
    out="self_attention.linear_proj",
    post_norm="pre_mlp_layernorm.weight",
    gate_up=("mlp.linear_fc1",),
    down="mlp.linear_fc2",
    final_norm="decoder.final_layernorm.weight",
    head="output_layer.weight",
    tied_head="output_layer.weight",
)
MCORE_TE = replace(
    MCORE,
    name="megatron-core (transformer-engine)",
    input_norm="self_attention.linear_qkv.layer_norm_weight",
    post_norm="mlp.linear_fc1.layer_norm_weight",
)
LEGACY = Dialect(
    name="megatron (before core)",
    embedding="language_model.embedding.word_embeddings.weight",
    layer="language_model.encoder.layers.{}.",
    input_norm="input_norm.weight",
    qkv="self_attention.query_key_value",
    out="self_attention.dense",
    post_norm="post_attention_norm.weight",
    gate_up=("mlp.dense_h_to_4h",),
    down="mlp.dense_4h_to_h",
    final_norm="language_model.encoder.final_norm.weight",
    head="language_model.output_layer.weight",
    tied_head="word_embeddings_for_head.weight",
)
LEGACY_2023 = replace(
    LEGACY,
    name="megatron (before September 2023)",
    input_norm="input_layernorm.weight",
    post_norm="post_attention_layernorm.weight",
    final_norm="language_model.encoder.final_layernorm.weight",
)
MODELLINK = replace(LEGACY, name="modellink", gate_up=("mlp.gate_proj", "mlp.dense_h_to_4h"))
ASCENDSPEED = Dialect(
    name="ascendspeed",
    embedding="embedding.word_embeddings.weight",
    layer="language_model.layers.{}.",
    input_norm="input_layernorm.weight",
    qkv="attention.query_key_value",
    out="attention.dense",
    post_norm="post_attention_layernorm.weight",
    gate_up=("mlp.gate_proj", "mlp.up_proj"),
    down="mlp.down_proj",
    final_norm="language_model.final_layernorm.weight",
    head="lm_head.lm_head.weight",
    tied_head="lm_head.lm_head.weight",
    always_head=True,
    pad_with_last_rows=True,
    inv_freq="attention.rotary_emb.inv_freq",
)
ASCENDSPEED_FUSED = replace(ASCENDSPEED, name="ascendspeed (fused MLP)", gate_up=("mlp.proj",))

READABLE = (
    MCORE,
    MCORE_TE,
    MODELLINK,  # before LEGACY, whose names are among its own
    replace(LEGACY_2023, name="modellink (November 2023)", gate_up=MODELLINK.gate_up),
    replace(LEGACY, name="modellink (fused MLP)", gate_up=("mlp.proj",)),
    replace(LEGACY_2023, name="modellink (November 2023, fused MLP)", gate_up=("mlp.proj",)),
    LEGACY,
    LEGACY_2023,
    ASCENDSPEED,
    ASCENDSPEED_FUSED,
)


def recognise(keys: set[str]) -> Dialect | None:
    """The dialect of one rank's keys: the one whose every name for a layer is there."""
    numbers = {key.split("layers.")[1].split(".")[0] for key in keys if "layers." in key}
    for dialect in READABLE:
        inner = (dialect.qkv, dialect.out, *dialect.gate_up, dialect.down)
        names = (dialect.input_norm, dialect.post_norm, *(f"{name}.weight" for name in inner))
        if any(all(dialect.layer.format(n) + name in keys for name in names) for n in sorted(numbers)):
            return dialect
    return None
