"""Initial weights, drawn from (seed, parameter name) and nothing else.

Any slice of any parameter can be drawn alone, so a rank makes just the rows that it owns, and every layout and every
device starts from the same numbers.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import math
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from arriero.model.config import FAMILIES, LlamaConfig, parameter_shapes

ROWS_PER_DRAW = 256  # rows that share one generator: small enough to skip to a slice, large enough to be quick


class InitialWeights:
    """Reads initial weights by slice, as if they were a file.

    | parameter                     | value                                                        |
    | ----------------------------- | ------------------------------------------------------------ |
    | norm gains                    | 1                                                            |
    | biases                        | 0                                                            |
    | o_proj, down_proj             | normal, std = initializer_range / sqrt(2 x layers)           |
    | all other matrices            | normal, std = initializer_range (0.02)                       |

    The two projections that write to the residual stream are scaled down so that its variance does not grow with depth
    (GPT-2, section 2.3). With these weights the loss starts near ln V + initializer_range^2 x hidden / 2: the final
    norm gives D unit entries, so that a logit's variance is initializer_range^2 x D.

    Args:
        config: the model's shape.
        seed: the run's seed.
    """

    def __init__(self, config: LlamaConfig, seed: int) -> None:
        self.config = config
        self.seed = seed
        self._shapes = parameter_shapes(config)

    def names(self) -> list[str]:
        """All parameters, under Hugging Face's names."""
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """The full shape of one parameter."""
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """Always float32: drawn once, then cast, so that every training dtype starts from the same numbers."""
        return torch.float32

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> Tensor:
        """Draws `name`, or the part that `index` (a slice a dimension, step 1) selects."""
        slices = (*(index or ()), slice(None), slice(None))
        wanted = [range(n)[s] for n, s in zip(self._shapes[name], slices, strict=False)]
        out = torch.empty([len(r) for r in wanted])
        self.read_into(name, [r.start for r in wanted], out)
        return out

    def read_into(self, name: str, start: list[int], out: Tensor) -> None:
        """Fills `out`, float32 on the CPU, with the part of `name` that begins at `start`."""
        if name.endswith(("norm.weight", ".bias")):
            out.fill_(0.0 if name.endswith(".bias") else 1.0)
        elif out.numel():
            rows = range(start[0], start[0] + len(out))
            blocks = range(rows[0] // ROWS_PER_DRAW, rows[-1] // ROWS_PER_DRAW + 1)
            fill = partial(self._fill, name, rows, start[1], out.detach().numpy())
            with ThreadPoolExecutor(min(len(blocks), torch.get_num_threads())) as threads:
                list(threads.map(fill, blocks))

    def _fill(self, name: str, rows: range, column: int, out: np.ndarray, block: int) -> None:
        """Draws what `out` (`rows` of `name`, from `column`) has of rows [block * ROWS_PER_DRAW, ...)."""
        first = block * ROWS_PER_DRAW
        low, high = max(first, rows[0]), min(first + ROWS_PER_DRAW, rows[-1] + 1)
        part, columns = out[low - rows[0] : high - rows[0]], self._shapes[name][1]
        in_place = low == first and part.shape[1] == columns and part.flags.c_contiguous
        drawn = part if in_place else np.empty((high - first, columns), dtype=np.float32)
        digest = hashlib.sha256(f"{self.seed}/{name}/{block}".encode()).digest()
        fill_normal(np.random.Philox(key=int.from_bytes(digest[:16], "little")), drawn)
        if not in_place:
            part[...] = drawn[low - first :, column : column + part.shape[1]]
        part *= np.float32(self._std(name))

    def _std(self, name: str) -> float:
        if self.config.model_type == LlamaConfig.model_type:
            return llama_initial_std(self.config, name)
        std: float = FAMILIES.get(self.config.model_type).initial_std(self.config, name)
        return std


def llama_initial_std(config: LlamaConfig, name: str) -> float:
    """The standard deviation of a matrix's initial weights: see the table of `InitialWeights`."""
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        return config.initializer_range / math.sqrt(2 * config.num_hidden_layers)
    return config.initializer_range


def fill_normal(bits: np.random.BitGenerator, out: np.ndarray) -> None:
    """As `np.random.Generator(bits).standard_normal(out=out)`, float32, without holding Python's lock.

    numpy's function is called at its C name, as numpy's manual shows under "Extending": its Generator keeps the lock.
    """
    if (draw := _c_normal()) is None:
        np.random.Generator(bits).standard_normal(out=out, dtype=np.float32)
    else:
        draw(bits.ctypes.bit_generator, out.size, out.ctypes.data)


@functools.cache
def _c_normal() -> Any:
    try:
        draw = ctypes.CDLL(np.random._generator.__file__).random_standard_normal_fill_f
    except (AttributeError, OSError):
        return None
    draw.argtypes, draw.restype = [ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_void_p], None
    return draw
