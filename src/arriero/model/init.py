"""Initial weights, drawn from (seed, parameter name) and nothing else.

Any slice of any parameter can be drawn alone, so a rank makes just the rows that it owns, and every layout and every
device starts from the same numbers.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch
from torch import Tensor

from arriero.model.config import LlamaConfig, parameter_shapes

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
        """Draws `name`, or the part that `index` (a slice a dimension) selects."""
        shape = self._shapes[name]
        if name.endswith("norm.weight"):
            full = torch.ones(shape)
            return full if index is None else full[index].clone()
        if name.endswith(".bias"):
            full = torch.zeros(shape)
            return full if index is None else full[index].clone()
        std = self.config.initializer_range
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            std /= math.sqrt(2 * self.config.num_hidden_layers)
        rows = range(shape[0])[index[0]] if index else range(shape[0])
        if len(rows) == 0:
            return torch.empty((0, *shape[1:]))[:, index[1]] if index and len(index) > 1 else torch.empty(0, *shape[1:])
        first, last = rows[0] // ROWS_PER_DRAW, rows[-1] // ROWS_PER_DRAW
        drawn = np.concatenate([self._draw(name, block) for block in range(first, last + 1)])
        part = drawn[rows[0] - first * ROWS_PER_DRAW :][: len(rows)]
        if index and len(index) > 1:
            part = part[:, index[1]]
        return torch.from_numpy(np.ascontiguousarray(part)).mul_(std)

    def _draw(self, name: str, block: int) -> np.ndarray:
        """Standard normals of rows [block * ROWS_PER_DRAW, ...) of `name`, float32."""
        rows, columns = self._shapes[name]
        count = min(ROWS_PER_DRAW, rows - block * ROWS_PER_DRAW)
        digest = hashlib.sha256(f"{self.seed}/{name}/{block}".encode()).digest()
        generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
        return generator.standard_normal((count, columns), dtype=np.float32)
