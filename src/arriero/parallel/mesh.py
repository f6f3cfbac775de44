"""Who holds what: the layout of a run's processes, and the device mesh made of it.

Tensor-parallel degree is stated, data-parallel degree is derived from the number of processes. Neighbouring ranks are
of one tensor-parallel group, since that group talks most.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from arriero.errors import UserError
from arriero.model.config import LlamaConfig

if TYPE_CHECKING:
    import torch
    from torch.distributed.device_mesh import DeviceMesh

DIMENSIONS = ("data", "tensor")


@dataclass(frozen=True)
class ParallelConfig:
    """How the model is spread over the processes."""

    tensor_parallel: int = 1
    """Processes that share each matrix; it must divide the heads, the key-value heads and the feed-forward width."""
    zero_stage: Literal[1, 2, 3] = 2
    """What data-parallel ranks share: 1 optimizer state, 2 gradients too, 3 parameters too. One rank shares nothing."""

    def problems(self, model: LlamaConfig, processes: int) -> list[UserError]:
        """All that is impossible about this layout of `model` on `processes`."""
        found, tensor = [], self.tensor_parallel
        if tensor < 1:
            return [UserError(f"parallel.tensor_parallel is {tensor}", "give a whole number from 1")]
        widths = {
            "attention heads": model.num_attention_heads,
            "key-value heads": model.num_key_value_heads,
            "feed-forward columns": model.intermediate_size,
        }
        possible = [n for n in range(1, model.num_key_value_heads + 1) if not any(w % n for w in widths.values())]
        for what, width in widths.items():
            if width % tensor:
                fix = f"use one of {', '.join(map(str, possible))}"
                found.append(UserError(f"parallel.tensor_parallel {tensor} does not divide the {width} {what}", fix))
        if processes % tensor:
            nearest = max(tensor, processes // tensor * tensor)
            found.append(
                UserError(
                    f"{processes} processes do not divide into tensor-parallel groups of {tensor}",
                    f"start a multiple of {tensor}, such as --nproc-per-node {nearest}",
                )
            )
        return found


@dataclass(frozen=True)
class Ranks:
    """This process's place in the layout, and the sums over parts of it.

    With one process there is no process group, and every sum is the value itself.
    """

    data: int = 1
    """Data-parallel degree."""
    tensor: int = 1
    """Tensor-parallel degree."""
    mesh: DeviceMesh | None = None
    """The mesh with dimensions `data` and `tensor`; None for one process."""
    coordinates: dict[str, int] = field(default_factory=lambda: dict.fromkeys(DIMENSIONS, 0))
    """This process's index in each dimension."""

    @classmethod
    def build(cls, config: ParallelConfig, device_type: str) -> Ranks:
        """Makes the mesh over the initialised process group; without one, the place of a lone process."""
        import torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh

        if not dist.is_initialized():
            return cls()
        data, tensor = dist.get_world_size() // config.tensor_parallel, config.tensor_parallel
        mesh = init_device_mesh(device_type, (data, tensor), mesh_dim_names=DIMENSIONS)
        return cls(data, tensor, mesh, {name: mesh.get_local_rank(name) for name in DIMENSIONS})

    @property
    def world(self) -> int:
        """Number of processes."""
        return self.data * self.tensor

    @property
    def first(self) -> bool:
        """Whether this process speaks for all: it logs, and writes what is not cut."""
        return not any(self.coordinates.values())

    def sum(self, value: torch.Tensor, *dimensions: str) -> torch.Tensor:
        """Sums `value` over the named mesh dimensions, in place, and returns it."""
        import torch.distributed as dist

        for name in dimensions:
            if self.mesh is not None and self.mesh[name].size() > 1:
                dist.all_reduce(value, group=self.mesh.get_group(name))
        return value

    def barrier(self) -> None:
        """Waits for all processes."""
        import torch.distributed as dist

        if self.mesh is not None:
            dist.barrier()
