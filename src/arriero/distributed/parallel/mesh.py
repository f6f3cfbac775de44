"""This process's coordinates in the layout, the device mesh, and collectives over its dimensions.

Ranks are ordered pipeline, replica, zero, tensor, the last one fastest: neighbours are of one tensor-parallel group,
which communicates most, and a pipeline, which communicates least, spans all. `zero` holds the data-parallel ranks of a
ZeRO group and the context-parallel ranks, which hold the same parameters: context is its fastest part.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from arriero.common.device import reduces_on_host
from arriero.distributed.parallel.config import ParallelConfig

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

DIMENSIONS = ("pipeline", "replica", "zero", "tensor")
BATCH = ("replica", "zero")  # the dimensions over which loss and gradients are summed


@dataclass(frozen=True)
class Ranks:
    """Sizes, coordinates and groups. With one process there is no group, and every sum is the value itself."""

    sizes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(DIMENSIONS, 1))
    """Degree of each mesh dimension."""
    coordinates: dict[str, int] = field(default_factory=lambda: dict.fromkeys(DIMENSIONS, 0))
    """This process's index in each."""
    mesh: DeviceMesh | None = None
    """The mesh over DIMENSIONS; None for one process."""
    context: int = 1
    """Context-parallel degree, a part of `zero`."""
    context_group: ProcessGroup | None = None
    """The processes that share this one's sequences."""
    embedding_group: ProcessGroup | None = None
    """The first and last stage's processes of this one's column, which share a tied embedding; None elsewhere."""

    @classmethod
    def build(cls, config: ParallelConfig, device_type: str) -> Ranks:
        """Makes the meshes over the initialised process group; without one, those of a single process."""
        import torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh

        if not dist.is_initialized():
            return cls()
        data = dist.get_world_size() // config.model_parallel
        shard = config.zero_group or data
        context, tensor, pipeline = config.context_parallel, config.tensor_parallel, config.pipeline_parallel
        sizes = dict(zip(DIMENSIONS, (pipeline, data // shard, shard * context, tensor), strict=True))
        mesh = init_device_mesh(device_type, tuple(sizes.values()), mesh_dim_names=DIMENSIONS)
        coordinates = {name: mesh.get_local_rank(name) for name in DIMENSIONS}
        context_group = None
        if context > 1:
            inner = init_device_mesh(
                device_type, (pipeline * data, context, tensor), mesh_dim_names=("outer", "context", "inner")
            )
            context_group = inner.get_group("context")
        ends = _embedding_group(sizes, coordinates) if pipeline > 1 else None
        return cls(sizes, coordinates, mesh, context, context_group, ends)

    @property
    def world(self) -> int:
        """Number of processes."""
        product = 1
        for size in self.sizes.values():
            product *= size
        return product

    @property
    def rank(self) -> int:
        """This process's number."""
        number = 0
        for name in DIMENSIONS:
            number = number * self.sizes[name] + self.coordinates[name]
        return number

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which logs and writes what is not sharded."""
        return self.rank == 0

    @property
    def data(self) -> int:
        """Data-parallel degree."""
        return self.sizes["replica"] * self.sizes["zero"] // self.context

    @property
    def data_rank(self) -> int:
        """Which part of a global batch is this process's."""
        return (self.coordinates["replica"] * self.sizes["zero"] + self.coordinates["zero"]) // self.context

    @property
    def context_rank(self) -> int:
        """Which part of a sequence is this process's."""
        return self.coordinates["zero"] % self.context

    def sum(self, value: torch.Tensor, *dimensions: str) -> torch.Tensor:
        """Sums `value` over the named mesh dimensions, in place, and returns it."""
        import torch.distributed as dist

        for name in dimensions:
            if self.mesh is not None and self.sizes[name] > 1:
                here = value.cpu() if reduces_on_host(value.device.type, value.dtype) else value
                dist.all_reduce(here, group=self.mesh.get_group(name))
                value.copy_(here)
        return value

    def any(self, *flags: bool) -> list[bool]:
        """For each flag, whether any process has set it: one collective for all of them, between the hosts."""
        import torch
        import torch.distributed as dist

        if self.mesh is None:
            return list(flags)
        tensor = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return [bool(flag) for flag in tensor.tolist()]

    def gather_texts(self, text: str, group: ProcessGroup | None = None, *, limit: int = 1024) -> list[str]:
        """Gathers a text of every rank, cut at `limit` bytes; `group` holds all processes, on the CPU."""
        import torch
        import torch.distributed as dist

        if self.mesh is None:
            return [text]
        raw = text.encode()[:limit]
        mine = torch.tensor(list(raw.ljust(limit, b"\0")), dtype=torch.uint8)
        all_ = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(all_, mine, group=group)
        return [bytes(one.tolist()).rstrip(b"\0").decode(errors="replace") for one in all_]

    def barrier(self) -> None:
        """Waits for all processes."""
        import torch.distributed as dist

        if self.mesh is not None:
            dist.barrier()


def _embedding_group(sizes: dict[str, int], coordinates: dict[str, int]) -> ProcessGroup | None:
    """The group of first and last stage in this process's column; every process makes every group, as torch asks."""
    import torch.distributed as dist

    column = sizes["replica"] * sizes["zero"] * sizes["tensor"]
    last, mine = (sizes["pipeline"] - 1) * column, None
    for i in range(column):
        group = dist.new_group([i, last + i])
        if dist.get_rank() in (i, last + i):
            mine = group
    return mine
