"""What a layout cannot be combined with: compilation, float8."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

from arriero.common.errors import UserError
from arriero.distributed.parallel.config import ZERO_BUBBLE, Float8Recipe, ParallelConfig
from arriero.model.config import LlamaConfig

UNIT = 16  # the matmul units take multiples of it in both dimensions that float8 operands have in memory


def float8_problems(
    recipe: Float8Recipe, dtype: str, model: LlamaConfig, parallel: ParallelConfig, *, tokens: int
) -> list[UserError]:
    """All that keeps this model from training in float8 under this layout.

    Args:
        recipe: of float8.
        dtype: of the parameters in flight.
        model: the shape.
        parallel: the layout.
        tokens: of one micro-batch, all context ranks together.
    """
    if recipe == "none":
        return []
    found = []
    if importlib.util.find_spec("torchao") is None:
        fix = "pip install torchao, or pip install 'arriero[float8]'"
        found.append(UserError(f"train.float8 {recipe} needs torchao, which is not installed", fix))
    if dtype != "bfloat16":
        fix = "use train.dtype bfloat16, or train.float8 none"
        found.append(UserError(f"train.float8 {recipe} does not go with train.dtype {dtype}", fix))
    for name, size, degree in _sizes(recipe, model, parallel, tokens):
        if size % (UNIT * max(1, degree)):
            cut = f" over {degree} ranks" if degree > 1 else ""
            what = f"train.float8 {recipe}: {name} {size}{cut} is not a multiple of {UNIT}{' each' if cut else ''}"
            found.append(UserError(what, f"make it a multiple of {UNIT * degree}, or use train.float8 none"))
    return found


def _sizes(recipe: str, model: LlamaConfig, parallel: ParallelConfig, tokens: int) -> Iterator[tuple[str, int, int]]:
    """(what, its size, by how many ranks it is cut) of all that a float8 matmul sees."""
    tensor, heads, groups = parallel.tensor_parallel, model.num_attention_heads, model.num_key_value_heads
    yield "hidden_size", model.hidden_size, 1
    yield "num_attention_heads x head_dim", heads * model.head_dim, tensor
    yield "num_key_value_heads x head_dim", groups * model.head_dim, tensor
    yield "intermediate_size", model.intermediate_size, tensor
    if recipe != "rowwise_with_gw_hp":  # the weight gradient sums over tokens
        yield "train.micro_batch x train.sequence_length", tokens, parallel.context_parallel


def compile_layout_problems(parallel: ParallelConfig) -> list[UserError]:
    """Layouts whose layers cannot be compiled."""
    if parallel.pipeline_parallel == 1 or parallel.pipeline_schedule not in ZERO_BUBBLE:
        return []
    # The backward pass is run in halves; a compiled layer has one that frees its buffers when it is first run.
    what = f"train.compile does not work with parallel.pipeline_schedule {parallel.pipeline_schedule}"
    return [UserError(what, "use 1F1B, GPipe, Interleaved1F1B or LoopedBFS, or leave train.compile out")]
