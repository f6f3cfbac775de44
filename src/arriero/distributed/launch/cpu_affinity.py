"""CPU affinity and number of threads of each of several processes on one machine.

A process that is bound to one NUMA node (a socket, or a part of one) has its memory there as well, because Linux
allocates a page on the node of the core that first touches it. Within a node, processes share the cores: the scheduler
places them better than a fixed assignment, which another program may disturb.
"""

from __future__ import annotations

import os
from pathlib import Path

from arriero.common.environment import environment_number

NODES = Path("/sys/devices/system/node")


def set_cpu_affinity(index: int, processes: int, *, bind: bool) -> None:
    """Binds this process to its share of the allowed cores, and sets as many threads.

    Args:
        index: local rank.
        processes: on this machine.
        bind: to one NUMA node, or to several where there are more nodes than processes; else only the threads are set.
    """
    import torch

    allowed = os.sched_getaffinity(0)
    own, sharers = assign_cores(index, processes, [n & allowed for n in numa_nodes() if n & allowed] or [allowed])
    if bind and own < allowed:
        os.sched_setaffinity(0, own)
    default, fix = max(1, len(own) // sharers), "give a whole number of threads, or unset it"
    torch.set_num_threads(environment_number(os.environ, "ARRIERO_THREADS", 1, 4096, fix=fix, default=default))


def assign_cores(index: int, processes: int, nodes: list[set[int]]) -> tuple[set[int], int]:
    """The cores of process `index` of `processes`, and how many processes share them.

    Each process has whole nodes; processes with neighbouring indices share a node; the split is as even as possible.
    """
    count = len(nodes)
    first = [i * count // processes for i in range(processes)]
    last = [max((i + 1) * count // processes, first[i] + 1) for i in range(processes)]
    cores = set().union(*nodes[first[index] : last[index]])
    return cores, sum(first[i] < last[index] and last[i] > first[index] for i in range(processes))


def numa_nodes(root: Path = NODES) -> list[set[int]]:
    """The cores of each NUMA node in order; empty where /sys does not list them."""
    lists = sorted(root.glob("node[0-9]*/cpulist"), key=lambda path: int(path.parent.name.removeprefix("node")))
    return [parse_cpu_list(path.read_text()) for path in lists]


def parse_cpu_list(text: str) -> set[int]:
    """The kernel's format of core lists: `0-3,8` -> {0, 1, 2, 3, 8}."""
    found: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found
