"""Meta's own checkpoints: `params.json` and `consolidated.NN.pth`, one file a model-parallel rank.

Meta rotates neighbouring pairs, Hugging Face the two halves of a head: rows of q and k change places. Which dimension a
matrix was sharded along is inferred from its shape, since Llama 3 shards the embedding otherwise than Llama 1 and 2.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from arriero.checkpoint.formats.foreign_config import ConfigHints, ForeignModel
from arriero.checkpoint.formats.huggingface import complete_model
from arriero.checkpoint.formats.tied import EMBEDDING, HEAD
from arriero.checkpoint.tensors.stream import Slice, TensorView
from arriero.checkpoint.tensors.torch_file import TorchFile
from arriero.common.errors import UserError, join_problems
from arriero.common.text import escape
from arriero.common.untrusted import read_json, require_inside, schema_problem
from arriero.model.config import MAX_LAYERS, LlamaConfig, RopeScaling, parameter_shapes

FIX = "fetch the whole directory again"
_NAMES = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj", "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip
_OPTIONAL = {
    "n_kv_heads": int, "norm_eps": float, "rope_theta": float, "use_scaled_rope": bool, "rope_scaling_factor": float,
}  # fmt: skip
_NEUTRAL = {
    "dim", "n_layers", "n_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier", "max_batch_size", "max_seq_len",
    "model_parallel_size", "use_flash", "flash",
}  # fmt: skip
"""Keys of params.json that follow from the tensors, or that change nothing."""
_COLUMNS = ("o_proj.weight", "down_proj.weight")  # sharded by columns whatever their shapes say


def is_meta(path: Path) -> bool:
    """Whether the directory holds Meta's files."""
    return any(path.glob("consolidated.*.pth"))


def open_meta(path: Path, hints: ConfigHints) -> ForeignModel:
    """Opens Meta's files under Hugging Face's names.

    Raises:
        UserError: params.json or a rank is missing or broken, or shapes contradict.
    """
    files = sorted(path.glob("consolidated.*.pth"))
    if [f.name for f in files] != [f"consolidated.{i:02d}.pth" for i in range(len(files))]:
        raise UserError(f"{path}: consolidated.NN.pth files have gaps: {', '.join(f.name for f in files)}", FIX)
    readers = [TorchFile(require_inside(path, f)).reader() for f in files]
    shards = [{_name(key): t for key, t in r.tensors.items() if key != "rope.freqs"} for r in readers]
    config, notes = _config(path, hints, shards)
    tensors, shapes = {}, parameter_shapes(config)
    if config.tie_word_embeddings and HEAD in shards[0]:
        shapes[HEAD] = shapes[EMBEDDING]
    for name, shape in shapes.items():
        absent = [f.name for f, shard in zip(files, shards, strict=True) if name not in shard]
        if absent:
            raise UserError(f"{path / absent[0]}: lacks {name} (in Meta's naming)", FIX)
        tensors[name] = _join(name, shape, [shard[name] for shard in shards], config, str(path))
    extra = sorted({name for shard in shards for name in shard} - set(tensors))
    if extra:
        raise UserError(f"{files[0]}: holds {escape(extra[0], 120)}, unknown to LLaMA", "is it a LLaMA?")
    reader, config = complete_model(tensors, config, where=str(path))
    return ForeignModel("meta", reader, config, f"{len(files)} model-parallel ranks", notes)


def _name(key: str) -> str:
    if key in _NAMES:
        return _NAMES[key]
    match = re.fullmatch(r"layers\.([0-9]+)\.(.+)\.weight", key)
    inner = _LAYER_NAMES.get(match[2]) if match else None
    return f"model.layers.{match[1]}.{inner}.weight" if match and inner else key


def _config(path: Path, hints: ConfigHints, shards: list[dict[str, TensorView]]) -> tuple[LlamaConfig, list[str]]:
    """The shape: params.json, completed from the tensors' shapes."""
    if hints.config is not None:
        return LlamaConfig.from_json(hints.config), []
    file = path / "params.json"
    if not file.exists():
        raise UserError(f"{path}: holds no params.json", FIX)
    params: dict[str, Any] = read_json(require_inside(path, file), FIX, {"dim": int, "n_layers": int, "n_heads": int})
    for key, form in _OPTIONAL.items():
        if wrong := schema_problem(params.get(key), (form, None), key):
            raise UserError(f"{file}: {wrong}", FIX)
    other = [k for k, v in params.items() if k not in _NEUTRAL | _OPTIONAL.keys() and v not in (None, False, 0)]
    if refused := [key for key in other if re.match(r"quantization|lora|moe|vision|num_experts|use_qk_norm", key)]:
        raise UserError(f"{file}: holds {escape(refused[0], 60)}", "arriero reads dense LLaMA models only")
    hidden, layers, heads = params["dim"], params["n_layers"], params["n_heads"]
    if min(hidden, layers, heads) < 1 or layers > MAX_LAYERS or hidden % heads:
        raise UserError(f"{file}: {layers} layers of {heads} heads in {hidden}", FIX)
    try:
        ffn = sum(shard["model.layers.0.mlp.gate_proj.weight"].shape[0] for shard in shards)
        embedding = [shard["model.embed_tokens.weight"].shape for shard in shards]
        rows = embedding[0][0] if embedding[0][1] * len(shards) == hidden else sum(shape[0] for shape in embedding)
    except (KeyError, IndexError):
        raise UserError(f"{path}: a rank lacks its first layer or its embedding", FIX) from None
    scaling, notes = RopeScaling(), []
    if params.get("use_scaled_rope"):
        scaling = RopeScaling("llama3", factor=float(params.get("rope_scaling_factor") or 8.0),
                              original_max_position_embeddings=8192)  # fmt: skip
    if other:
        notes.append(f"{escape(file)}: not taken into account: {', '.join(escape(key, 60) for key in other[:12])}")
    notes.append("max_position_embeddings 2048 is assumed, params.json does not tell it: else give --config")
    theta = float(params.get("rope_theta") or 10000.0)
    config = LlamaConfig(
        vocab_size=rows, hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=int(params.get("n_kv_heads") or heads), head_dim=hidden // heads,
        rms_norm_eps=float(params.get("norm_eps") or 1e-5), rope_theta=theta, rope_scaling=scaling,
        tie_word_embeddings="lm_head.weight" not in shards[0],
    )  # fmt: skip
    if hints.vocab_size is not None:
        config = replace(config, vocab_size=hints.vocab_size)
    if problems := config.problems(str(file)):
        raise join_problems(problems)
    return config, notes


def _join(name: str, shape: tuple[int, ...], parts: list[TensorView], config: LlamaConfig, where: str) -> TensorView:
    """Puts the ranks' parts side by side or on one another."""
    if len(shape) == 1:
        parts = parts[:1]
    by_columns = len(shape) == 2 and len(parts) > 1 and (name.endswith(_COLUMNS) or parts[0].shape[0] == shape[0])
    slices: list[Slice] = []
    at = 0
    for part in parts:
        rows, columns = (*part.shape, 1)[:2]
        source = part.slices[0].source
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            slices += _split_halves(source, rows, columns, at, config.head_dim)
        else:
            slices.append(Slice(source, 0, 0, rows, columns, *((0, at) if by_columns else (at, 0))))
        at += columns if by_columns else rows
    expected = shape[1] if by_columns else shape[0]
    width = (*parts[0].shape, 1)[1]
    if (
        at != expected
        or (not by_columns and len(shape) == 2 and width != shape[1])
        or len({p.dtype for p in parts}) > 1
    ):
        found = [list(p.shape) for p in parts]
        raise UserError(f"{where}: the parts {found} of {name} make no {list(shape)}", "check params.json")
    return TensorView(parts[0].dtype, shape, tuple(slices))


def _split_halves(source: Any, rows: int, columns: int, at: int, size: int) -> Iterator[Slice]:
    """Rows 0, 2, 4, ... of each head, then 1, 3, 5, ...: from neighbouring pairs to halves."""
    for head in range(0, rows, size):
        for odd in (0, 1):
            yield Slice(source, head + odd, 0, size // 2, columns, at + head + odd * size // 2, 0, step=2)
