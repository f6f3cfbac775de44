"""The shard of each parameter on this process: its offset in the whole, and the mesh dimensions it is sharded over."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeGuard

from torch import Tensor, nn

from arriero.distributed.parallel.mesh import DIMENSIONS, Ranks
from arriero.model.llama import Llama

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Shard:
    """One parameter's local part."""

    name: str
    """The parameter's global (Hugging Face) name."""
    shape: tuple[int, ...]
    """The whole parameter's shape."""
    offset: tuple[int, ...]
    """Where the local part begins in the whole."""
    local_shape: tuple[int, ...]
    """The local part's shape; may hold no element."""
    sharded_over: tuple[str, ...]
    """Mesh dimensions over which the parameter is cut; over the others every rank holds the same."""
    copy: bool = False
    """Whether this is the head's copy of a tied embedding that another stage holds: neither written nor counted."""

    @property
    def index(self) -> tuple[slice, ...]:
        """The local part as an index into the whole."""
        return tuple(slice(o, o + n) for o, n in zip(self.offset, self.local_shape, strict=True))

    def written_by(self, ranks: Ranks) -> bool:
        """Whether this process is the one that writes the part: the first of those that hold the same."""
        return not self.copy and all(
            ranks.coordinates[name] == 0 for name in DIMENSIONS if name not in self.sharded_over
        )


def is_dtensor(tensor: object) -> TypeGuard[DTensor]:
    """Whether it is a DTensor; a lone process has none, and need not import them, which takes a second."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """The local part of a parameter or gradient, sharing its memory."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def local_gradient(parameter: nn.Parameter) -> Tensor | None:
    """The local part of a parameter's gradient, cut as the parameter is, sharing the gradient's memory.

    torch returns the gradient of a vocabulary-parallel embedding whole on every rank: it is cut here, for good.
    """
    gradient, held = parameter.grad, parameter.data
    if gradient is None:
        return None
    if is_dtensor(gradient) and is_dtensor(held) and gradient.placements != held.placements:
        parameter.grad = gradient = gradient.redistribute(placements=held.placements)
    return local(gradient)


def shards(parts: Iterable[Llama], ranks: Ranks) -> dict[str, tuple[Shard, nn.Parameter]]:
    """Every parameter that this process holds a part of, under its path in the model."""
    found: dict[str, tuple[Shard, nn.Parameter]] = {}
    for model in parts:
        for path, parameter in model.named_parameters():
            copy = path == "lm_head.weight" and model.config.tie_word_embeddings
            name = "model.embed_tokens.weight" if copy else path
            found[path] = (_shard(name, parameter, ranks, copy=copy), parameter)
    return found


def _shard(name: str, parameter: nn.Parameter, ranks: Ranks, *, copy: bool) -> Shard:
    shape = tuple(parameter.shape)
    part, offset, cut = shape, (0,) * len(shape), []
    if is_dtensor(parameter):
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        mesh = parameter.device_mesh
        part, offset = compute_local_shape_and_global_offset(shape, mesh, parameter.placements)
        names = mesh.mesh_dim_names or ()
        cut = [n for n, p in zip(names, parameter.placements, strict=True) if not p.is_replicate()]
    if ranks.sizes["pipeline"] > 1:
        cut.append("pipeline")
    return Shard(name, shape, tuple(offset), tuple(part), tuple(cut), copy)
