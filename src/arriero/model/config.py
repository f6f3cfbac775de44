"""The model's shape: Hugging Face's `config.json`, read, checked and written.

`config.json` defines the model; a recipe never repeats it. Old files keep `rope_theta` and `rope_scaling` at the
top, files of transformers 5 keep both in `rope_parameters`: both are read, and `to_json` writes both for either reader.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

from annotated_types import Interval

from arriero.common.errors import UserError, join_problems
from arriero.common.ranges import expected_values, field_ranges, range_problems, value_problem
from arriero.common.registry import Registry
from arriero.common.untrusted import read_json, require_inside, schema_problem
from arriero.model.config_keys import ROPE_KEYS, check_model_type, check_other_keys, rope_settings

FIX = "restore the file from where the model came from"

MAX_LAYERS = 1000

FAMILIES: Registry[Any] = Registry("config.json: model_type", {"llama": "arriero.model.family:LLAMA"})
"""Model families (model/family.py) by config.json's `model_type`."""

_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_OPTIONAL = {
    "num_key_value_heads": int, "head_dim": int, "rms_norm_eps": float, "max_position_embeddings": int,
    "tie_word_embeddings": bool, "attention_bias": bool, "mlp_bias": bool, "initializer_range": float,
    "bos_token_id": int, "eos_token_id": (int, [int]), "pad_token_id": int, "rope_theta": float, "rope_scaling": dict,
    "rope_parameters": dict, "original_max_position_embeddings": int,
}  # fmt: skip
"""What else is read from config.json, null allowed."""
READ_KEYS = frozenset({*_SIZES, *_OPTIONAL})


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained length (Hugging Face's `rope_scaling`)."""

    rope_type: str = "default"
    """One of default, linear, dynamic, llama3."""
    factor: Annotated[float, Interval(ge=1, le=1e6)] = 1.0
    """How many times longer than the original the context is."""
    low_freq_factor: Annotated[float, Interval(ge=1e-6, le=1e6)] = 1.0
    """llama3 only: wavelengths longer than original / low_freq_factor are divided by `factor`."""
    high_freq_factor: Annotated[float, Interval(ge=1e-6, le=1e6)] = 4.0
    """llama3 only: wavelengths shorter than original / high_freq_factor are kept."""
    original_max_position_embeddings: Annotated[int, Interval(ge=1, lt=2**31)] | None = None
    """llama3 only: context length before stretching, in tokens."""


TokenId = Annotated[int, Interval(ge=-1, lt=2**31)]


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a `LlamaForCausalLM`, under Hugging Face's names."""

    model_type: ClassVar[str] = "llama"
    """The family's name in config.json."""
    extra_keys: ClassVar[tuple[str, ...]] = ()
    """Fields of a subclass that are read from config.json beyond LLaMA's."""
    vocab_size: Annotated[int, Interval(ge=1, lt=2**31)] = 32000
    hidden_size: Annotated[int, Interval(ge=1, le=2**20)] = 4096
    intermediate_size: Annotated[int, Interval(ge=1, le=2**24)] = 11008
    num_hidden_layers: Annotated[int, Interval(ge=1, le=MAX_LAYERS)] = 32
    num_attention_heads: Annotated[int, Interval(ge=1, le=65_536)] = 32
    num_key_value_heads: Annotated[int, Interval(ge=1, le=65_536)] = 32
    head_dim: Annotated[int, Interval(ge=1, le=65_536)] = 128
    rms_norm_eps: Annotated[float, Interval(ge=1e-30, le=1)] = 1e-6
    rope_theta: Annotated[float, Interval(ge=1, le=1e15)] = 10000.0
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    max_position_embeddings: Annotated[int, Interval(ge=1, lt=2**31)] = 2048
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    initializer_range: Annotated[float, Interval(ge=0, le=10)] = 0.02
    bos_token_id: TokenId | None = 1
    eos_token_id: TokenId | tuple[TokenId, ...] | None = 2
    """Ends of a text; Llama 3.1 Instruct has several."""
    pad_token_id: TokenId | None = None
    """Kept for other programs: batches here have no padding."""
    notices: tuple[str, ...] = field(default=(), compare=False, repr=False)
    """What of the file is not taken into account, one sentence each; the caller prints them."""

    @property
    def end_ids(self) -> frozenset[int]:
        """Every id that ends a text."""
        ends = self.eos_token_id
        return frozenset(ends) if isinstance(ends, tuple) else frozenset(() if ends is None else (ends,))

    @classmethod
    def from_json(cls, path: Path | str) -> LlamaConfig:
        """Reads `config.json`, or the directory that holds it.

        Raises:
            UserError: no such file, not JSON, not a LLaMA, or a value that this model cannot honour.
        """
        path = Path(path)
        file = path / "config.json" if path.is_dir() else path
        if not file.exists():
            raise UserError(f"{file}: no such file", "name a Hugging Face config.json or its directory")
        return cls.from_dict(
            read_json(require_inside(path, file) if path.is_dir() else file, FIX, dict), where=str(file)
        )

    @classmethod
    def from_dict(cls, raw: dict[str, Any], *, where: str = "config") -> LlamaConfig:
        """Builds the shape from the decoded `config.json`; `where` names the source in errors."""
        kind = raw.get("model_type", cls.model_type)
        if cls is LlamaConfig and kind != cls.model_type and isinstance(kind, str) and kind in FAMILIES.names():
            config: LlamaConfig = FAMILIES.get(kind).config.from_dict(raw, where=where)
            return config
        problems, notices = check_model_type(raw, where, cls.model_type)
        ranges = field_ranges(cls)
        for key, form in (
            *dict.fromkeys(_SIZES, int).items(),
            *_OPTIONAL.items(),
            *dict.fromkeys(cls.extra_keys, float).items(),
        ):
            problems += _key_problems(raw, key, form, ranges.get(key), where)
        if problems:
            raise join_problems(problems)
        heads, hidden, head_dim = raw["num_attention_heads"], raw["hidden_size"], raw.get("head_dim")
        if head_dim is None:
            head_dim = hidden // heads
            if hidden % heads:
                fix = "give head_dim, or a hidden_size that divides"
                problems.append(UserError(f"{where}: hidden_size {hidden} does not divide into {heads} heads", fix))
        rope, kind, wrong_rope, more = rope_settings(raw, where)
        wrong_keys, ignored = check_other_keys(
            raw, READ_KEYS | set(cls.extra_keys), where=where, head_dim=max(1, head_dim)
        )
        problems += [*wrong_rope, *wrong_keys]
        for key in ("rope_theta", *ROPE_KEYS[kind]):
            whole = key == "original_max_position_embeddings"
            if key in rope and (wrong := schema_problem(rope[key], int if whole else float, key)):
                problems.append(UserError(f"{where}: {wrong}", FIX))
        if problems:
            raise join_problems(problems)
        simple = {
            key: raw[key]
            for key in ("rms_norm_eps", "max_position_embeddings", "tie_word_embeddings", "attention_bias", "mlp_bias",
                        "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id", *cls.extra_keys)
            if raw.get(key) is not None or (key in raw and key.endswith("token_id"))
        }  # fmt: skip
        if isinstance(simple.get("eos_token_id"), list):
            simple["eos_token_id"] = tuple(simple["eos_token_id"]) or None
        config = cls(
            **{key: raw[key] for key in _SIZES},
            num_key_value_heads=heads if raw.get("num_key_value_heads") is None else raw["num_key_value_heads"],
            head_dim=head_dim,
            rope_theta=float(rope["rope_theta"]),
            rope_scaling=RopeScaling(kind, **{key: rope[key] for key in ROPE_KEYS[kind]}),
            notices=(*notices, *more, *ignored),
            **simple,
        )
        problems = config.problems(where)
        if problems:
            raise join_problems(problems)
        return config

    def problems(self, where: str = "config") -> list[UserError]:
        """All that is impossible about this shape, each with its fix."""
        if found := range_problems(self, f"{where}: {{}}".format):
            return found
        if self.num_attention_heads % self.num_key_value_heads:
            found.append(
                UserError(
                    f"{where}: {self.num_attention_heads} heads do not divide into {self.num_key_value_heads} "
                    "key-value heads",
                    "make num_attention_heads a multiple of num_key_value_heads",
                )
            )
        if self.head_dim % 2:
            found.append(UserError(f"{where}: head_dim {self.head_dim} is odd", "rotary embedding needs pairs"))
        scaling = self.rope_scaling
        if scaling.rope_type == "dynamic" and self.head_dim == 2:  # its exponent is head_dim / (head_dim - 2)
            found.append(UserError(f"{where}: head_dim 2 with dynamic rope_scaling", "use a head_dim of 4 or more"))
        if scaling.rope_type == "llama3" and scaling.low_freq_factor >= scaling.high_freq_factor:
            fix = "use those of the original config.json, such as 1 and 4"
            found.append(UserError(f"{where}: rope_scaling's low_freq_factor is not below its high_freq_factor", fix))
        return found

    def to_json(self) -> dict[str, Any]:
        """The `config.json` that transformers 4 and 5 read as this shape."""
        scaling = self.rope_scaling
        rope: dict[str, Any] = {"rope_type": scaling.rope_type}
        for key in ROPE_KEYS[scaling.rope_type]:
            rope[key] = getattr(scaling, key)
        old_style = dict(rope) if scaling.rope_type != "default" else None
        return {
            "architectures": [f"{self.model_type.capitalize()}ForCausalLM"],
            "model_type": self.model_type,
            "hidden_act": "silu",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": old_style,
            "rope_parameters": {**rope, "rope_theta": self.rope_theta},
            "max_position_embeddings": self.max_position_embeddings,
            "tie_word_embeddings": self.tie_word_embeddings,
            "attention_bias": self.attention_bias,
            "mlp_bias": self.mlp_bias,
            "initializer_range": self.initializer_range,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": list(self.eos_token_id) if isinstance(self.eos_token_id, tuple) else self.eos_token_id,
            "pad_token_id": self.pad_token_id,
            **{key: getattr(self, key) for key in self.extra_keys},
        }


def _key_problems(raw: dict[str, Any], key: str, form: Any, kind: Any, where: str) -> list[UserError]:
    """What is wrong with one key of a decoded config.json: it lacks, or is of another type or range than its field."""
    if key in _SIZES and key not in raw:
        return [UserError(f"{where}: lacks {key}", f"give {key} as {expected_values(kind)}")]
    if key not in _SIZES and (wrong := schema_problem(raw.get(key), (form, None), key)):
        return [UserError(f"{where}: {wrong}", FIX)]
    value = tuple(raw[key]) if isinstance(raw.get(key), list) else raw.get(key)
    if kind is not None and (key in _SIZES or value is not None) and (wrong := value_problem(value, kind)):
        return [UserError(f"{where}: {key} {wrong}", f"give {key} as {expected_values(kind)}")]
    return []


def layer_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Parameter shapes of one decoder layer of the config's family, named as below `model.layers.N.`."""
    if config.model_type == LlamaConfig.model_type:
        return llama_layer_shapes(config)
    shapes: dict[str, tuple[int, ...]] = FAMILIES.get(config.model_type).layer_shapes(config)
    return shapes


def llama_layer_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """LLaMA's."""
    d, f = config.hidden_size, config.intermediate_size
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    linears = {
        "self_attn.q_proj": (q, d), "self_attn.k_proj": (kv, d), "self_attn.v_proj": (kv, d),
        "self_attn.o_proj": (d, q), "mlp.gate_proj": (f, d), "mlp.up_proj": (f, d), "mlp.down_proj": (d, f),
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in linears.items():
        shapes[f"{name}.weight"] = shape
        if config.attention_bias if name.startswith("self_attn") else config.mlp_bias:
            shapes[f"{name}.bias"] = shape[:1]
    shapes["input_layernorm.weight"] = (d,)
    shapes["post_attention_layernorm.weight"] = (d,)
    return shapes


def parameter_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter's Hugging Face name and shape; no `lm_head.weight` when the embeddings are tied."""
    vocab = (config.vocab_size, config.hidden_size)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": vocab}
    layer = layer_shapes(config)
    for i in range(config.num_hidden_layers):
        shapes.update({f"model.layers.{i}.{name}": shape for name, shape in layer.items()})
    shapes["model.norm.weight"] = (config.hidden_size,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = vocab
    return shapes


def count_parameters(config: LlamaConfig) -> int:
    """Number of parameters; 6,738,415,616 for LLaMA-7B with 32,000 tokens."""
    layer = sum(math.prod(shape) for shape in layer_shapes(config).values())
    embeddings = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    return embeddings + config.num_hidden_layers * layer + config.hidden_size
