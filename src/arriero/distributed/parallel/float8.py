"""8-bit float matmuls in the decoder layers, by torchao: operands are scaled and cast to float8, sums stay wide.

| recipe             | one scale for each          | forward     | input gradient | weight gradient |
| ------------------ | --------------------------- | ----------- | -------------- | --------------- |
| tensorwise         | tensor                      | e4m3 x e4m3 | e5m2 x e4m3    | e5m2 x e4m3     |
| rowwise            | row or column, a power of 2 | e4m3 x e4m3 | e4m3 x e4m3    | e4m3 x e4m3     |
| rowwise_with_gw_hp | row, a power of 2           | e4m3 x e4m3 | e4m3 x e4m3 *  | bfloat16        |

* the weight with one scale, a power of 2.
The formats are those of arXiv:2209.05433. Scales are taken from the tensor at hand, so there is no state to save.
Embedding, norms, attention and output head stay as they are; so do the parameters at rest and all their names.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal

from torch import nn

from arriero.common.errors import UserError
from arriero.distributed.parallel.config import ParallelConfig
from arriero.model.config import LlamaConfig
from arriero.model.llama import Llama

Float8Recipe = Literal["none", "tensorwise", "rowwise", "rowwise_with_gw_hp"]
UNIT = 16  # the matmul units take multiples of it in both dimensions that float8 operands have in memory


def apply_float8(model: Llama, recipe: Float8Recipe, *, emulate: bool) -> None:
    """Has the linear layers of the decoder layers that are there of `model` multiply in float8, in place.

    Args:
        model: on any device, the meta device too, before tensor parallelism and ZeRO.
        recipe: torchao's name for it; "none" does nothing.
        emulate: multiply in float32 what was cast to float8, where the device has no unit for it.
    """
    if recipe == "none":
        return
    with _quiet():
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    config = replace(Float8LinearConfig.from_recipe_name(recipe), emulate=emulate)
    convert_to_float8_training(model, config=config, module_filter_fn=_in_a_layer)


def _in_a_layer(module: nn.Module, path: str) -> bool:
    return path.startswith("model.layers.")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torchao's warnings at import: they are of kernels that float8 training does not use."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


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
