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

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from torch import nn

from arriero.distributed.parallel.config import Float8Recipe
from arriero.model.llama import Llama


def apply_float8(model: Llama, recipe: Float8Recipe, *, emulate: bool) -> None:
    """Has the linear layers of the decoder layers that are there of `model` multiply in float8, in place.

    Args:
        model: on any device, the meta device too, before tensor parallelism and ZeRO.
        recipe: torchao's name for it; "none" does nothing.
        emulate: multiply in float32 what was cast to float8, where the device has no unit for it.
    """
    if recipe == "none":
        return
    with _without_import_warnings():
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    config = replace(Float8LinearConfig.from_recipe_name(recipe), emulate=emulate)
    convert_to_float8_training(model, config=config, module_filter_fn=_is_in_decoder_layer)


def _is_in_decoder_layer(module: nn.Module, path: str) -> bool:
    return path.startswith("model.layers.")


@contextmanager
def _without_import_warnings() -> Iterator[None]:
    """Without torchao's warnings at import: they are of kernels that float8 training does not use."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
