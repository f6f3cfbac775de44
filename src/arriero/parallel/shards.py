"""The part of each parameter that this process holds: where it lies in the whole, and who else holds it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from arriero.parallel.mesh import DIMENSIONS, Ranks


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
    cut_over: tuple[str, ...]
    """Mesh dimensions over which the parameter is cut; over the others every rank holds the same."""

    @property
    def index(self) -> tuple[slice, ...]:
        """The local part as an index into the whole."""
        return tuple(slice(o, o + n) for o, n in zip(self.offset, self.local_shape, strict=True))

    def written_by(self, ranks: Ranks) -> bool:
        """Whether this process is the one that writes the part: the first of those that hold the same."""
        return all(ranks.coordinates[name] == 0 for name in DIMENSIONS if name not in self.cut_over)


def local(tensor: Tensor) -> Tensor:
    """The local part of a parameter or gradient, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_gradient(parameter: nn.Parameter) -> Tensor | None:
    """The local part of a parameter's gradient, cut as the parameter is.

    torch returns the gradient of a vocabulary-parallel embedding whole on every rank: it is cut here.
    """
    gradient = parameter.grad
    if isinstance(gradient, DTensor) and isinstance(parameter, DTensor):
        gradient = gradient.redistribute(placements=parameter.placements)
    return None if gradient is None else local(gradient)


def shards(model: nn.Module) -> dict[str, tuple[Shard, nn.Parameter]]:
    """Every parameter that this process holds a part of, by global name."""
    found: dict[str, tuple[Shard, nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        if isinstance(parameter, DTensor):
            mesh = parameter.device_mesh
            part, offset = compute_local_shape_and_global_offset(shape, mesh, parameter.placements)
            names = mesh.mesh_dim_names or ()
            cut = tuple(n for n, p in zip(names, parameter.placements, strict=True) if not p.is_replicate())
            found[name] = (Shard(name, shape, tuple(offset), tuple(part), cut), parameter)
        else:
            found[name] = (Shard(name, shape, (0,) * len(shape), shape, ()), parameter)
    return found
