"""Models of other programs, and the shape of those without config.json: from the user, saved arguments or tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from arriero.checkpoint.formats.dialects import Dialect
from arriero.checkpoint.formats.megatron_args import LLAMA3_ORIGINAL, check_arguments
from arriero.checkpoint.tensors.pickle_symbols import Call
from arriero.checkpoint.tensors.stream import TensorView, ViewReader
from arriero.common.errors import UserError, join_problems
from arriero.data.tokenizer_json import vocabulary_size
from arriero.model.config import LlamaConfig, RopeScaling


@dataclass(frozen=True)
class ConfigHints:
    """What the user states about a checkpoint."""

    config: Path | None = None
    """A Hugging Face config.json, or its directory."""
    vocab_size: int | None = None
    """True size of the vocabulary, without padding."""
    tokenizer: Path | None = None
    """A tokenizer's directory, whose size is the vocabulary's."""


@dataclass(frozen=True)
class ForeignModel:
    """A model in another program's format, opened under Hugging Face's names."""

    kind: str
    reader: ViewReader
    config: LlamaConfig
    layout: str
    """How it is sharded, for messages."""
    notes: list[str]
    """What was assumed, one sentence each."""


def apply_vocabulary(
    config: LlamaConfig, hints: ConfigHints, *, known: bool, rows: int
) -> tuple[LlamaConfig, list[str]]:
    """Sets the true vocabulary size.

    Args:
        config: the shape so far.
        hints: what the user stated, and the tokenizer that was found.
        known: whether the config already has the true size.
        rows: how many rows the checkpoint has, padding included.

    Returns:
        The config, and what had to be assumed.
    """
    if hints.vocab_size is not None:
        config = replace(config, vocab_size=hints.vocab_size)
        if problems := config.problems("--vocab-size"):
            raise join_problems(problems)
        return config, []
    if known:
        return config, []
    if hints.tokenizer is None:
        note = f"all {config.vocab_size} vocabulary rows were kept, padding included: give --vocab-size or --tokenizer"
        return config, [note]
    size = vocabulary_size(hints.tokenizer)
    if size <= rows:
        left = f"{rows - size} rows beyond the tokenizer's {size} ids were left out as padding: else give --vocab-size"
        return replace(config, vocab_size=size), [left] if size < rows else []
    note = f"the tokenizer has {size} ids, the checkpoint {rows} rows: all rows were kept"
    return replace(config, vocab_size=rows), [note]


def resolve_config(
    root: Path, folder: Path, hints: ConfigHints, *, tensors: Mapping[str, TensorView], dialect: Dialect, tensor: int,
    layers: int, payload: dict[str, Any],
) -> tuple[LlamaConfig, list[str]]:  # fmt: skip
    """The shape of a checkpoint of rank files, and what had to be assumed.

    Args:
        root: the checkpoint's directory, which may hold a config.json.
        folder: the iteration's directory.
        hints: what the user stated.
        tensors: all tensors of tensor rank 0.
        dialect: their names.
        tensor: tensor-parallel degree.
        layers: counted layers.
        payload: the first rank's file, whose `args` hold most of it.
    """
    given = hints.config or next((d for d in (root, folder) if (d / "config.json").is_file()), None)
    if given is not None:
        return apply_vocabulary(LlamaConfig.from_json(given), hints, known=True, rows=0)
    args = payload.get("args")
    saved = args.state if isinstance(args, Call) and isinstance(args.state, dict) else {}
    check_arguments(saved, str(folder))
    # Only plain numbers of a plausible size; any other value is treated as absent.
    state = {k: v for k, v in saved.items() if isinstance(v, bool) or (isinstance(v, (int, float)) and 0 < v < 2**31)}
    inferred, notes = _from_tensors(root, tensors, dialect, tensor=tensor, layers=layers, args=state)
    rows = tensors[dialect.embedding].shape[0] * tensor
    config, more = apply_vocabulary(inferred, hints, known=isinstance(state.get("vocab_size"), int), rows=rows)
    return config, notes + more


def _from_tensors(
    root: Path, tensors: Mapping[str, TensorView], dialect: Dialect, *, tensor: int, layers: int, args: dict[str, Any]
) -> tuple[LlamaConfig, list[str]]:
    """Reads sizes off the tensors; heads and constants come from the saved arguments where there are any."""
    prefix = dialect.layer.format(0)
    try:
        vocab, hidden = tensors[dialect.embedding].shape
        fused = tensors[f"{prefix}{dialect.qkv}.weight"].shape[0] * tensor
        attended = tensors[f"{prefix}{dialect.out}.weight"].shape[1] * tensor
        ffn = tensors[f"{prefix}{dialect.down}.weight"].shape[1] * tensor
    except (KeyError, ValueError, IndexError):
        raise UserError(f"{root}: lacks the tensors that give its shape", "copy the whole directory again") from None
    frequencies = tensors.get(prefix + dialect.inv_freq) if dialect.inv_freq else None
    notes = []
    if frequencies is not None:
        head_dim = 2 * frequencies.shape[0]
    elif isinstance(args.get("num_attention_heads"), int):
        head_dim = attended // args["num_attention_heads"]
    else:
        head_dim = 128
        notes.append(
            "the number of heads is not in the checkpoint: heads of 128, as LLaMA's, are assumed; else give --config"
        )
    if head_dim < 2 or attended % head_dim or (fused - attended) % (2 * head_dim):
        raise UserError(f"{root}: {attended} attention rows are no whole heads of {head_dim}", "give --config")
    eps = args.get("norm_epsilon", args.get("layernorm_epsilon"))
    theta = args.get("rotary_base")
    if eps is None or theta is None:
        notes.append(
            "rms_norm_eps 1e-6 and rope_theta 10000 are assumed where the checkpoint has none; else give --config"
        )
    untied = args.get("untie_embeddings_and_output_weights")
    scaling = RopeScaling()
    if isinstance(args.get("rotary_seq_len_interpolation_factor"), (int, float)):
        scaling = RopeScaling("linear", factor=float(args["rotary_seq_len_interpolation_factor"]))
    if args.get("use_rope_scaling"):  # Megatron's flag means Llama 3.1's scaling, whose other constants it fixes
        factor = float(args.get("rope_scaling_factor") or 8.0)
        scaling = RopeScaling("llama3", factor=factor, original_max_position_embeddings=LLAMA3_ORIGINAL)
    true_vocab = args.get("vocab_size")
    config = LlamaConfig(
        vocab_size=true_vocab if isinstance(true_vocab, int) else vocab * tensor,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=attended // head_dim,
        num_key_value_heads=(fused - attended) // (2 * head_dim),
        head_dim=head_dim,
        rms_norm_eps=float(eps or 1e-6),
        rope_theta=float(theta or 10000.0),
        max_position_embeddings=int(args.get("max_position_embeddings") or 2048),
        rope_scaling=scaling,
        initializer_range=float(args.get("init_method_std") or 0.02),
        tie_word_embeddings=dialect.head not in tensors if untied is None else not untied,
        attention_bias=f"{prefix}{dialect.qkv}.bias" in tensors,
        mlp_bias=f"{prefix}{dialect.down}.bias" in tensors,
    )
    problems = config.problems(str(root))
    if problems:
        raise UserError(problems[0].problem, "give --config")
    return config, notes
