"""Which cores each of several processes on one machine computes on, and with how many threads.

A process that is bound to one NUMA node (a socket, or a part of one) has its memory there, too, because Linux gives a
page from the node of the core that first touches it. Within a node, processes share the cores: the scheduler places
them better than a fixed list, beside which another program might be at work.
"""

from __future__ import annotations

import os
from pathlib import Path

from arriero.common.environment import environment_number

NODES = Path("/sys/devices/system/node")


def set_cpu_affinity(index: int, processes: int, *, bind: bool) -> None:
    """Gives this process its share of the cores that it may use, and as many threads.

    Args:
        index: its number on this machine.
        processes: how many there are.
        bind: keep to one NUMA node, or to several where there are more nodes than processes.
    """
    import torch

    allowed = os.sched_getaffinity(0)
    mine, sharers = share(index, processes, [n & allowed for n in numa_nodes() if n & allowed] or [allowed])
    if bind and mine < allowed:
        os.sched_setaffinity(0, mine)
    usual, fix = max(1, len(mine) // sharers), "give a whole number of threads, or unset it"
    torch.set_num_threads(environment_number(os.environ, "ARRIERO_THREADS", 1, 4096, fix=fix, default=usual))


def share(index: int, processes: int, nodes: list[set[int]]) -> tuple[set[int], int]:
    """The cores of process `index` of `processes`, and how many processes share them.

    Whole nodes, neighbours together, as evenly as they divide.
    """
    count = len(nodes)
    first = [i * count // processes for i in range(processes)]
    last = [max((i + 1) * count // processes, first[i] + 1) for i in range(processes)]
    cores = set().union(*nodes[first[index] : last[index]])
    return cores, sum(first[i] < last[index] and last[i] > first[index] for i in range(processes))


def numa_nodes(root: Path = NODES) -> list[set[int]]:
    """The cores of each NUMA node in order; empty where Linux does not say."""
    lists = sorted(root.glob("node[0-9]*/cpulist"), key=lambda path: int(path.parent.name.removeprefix("node")))
    return [cores(path.read_text()) for path in lists]


def cores(text: str) -> set[int]:
    """`0-3,8` -> {0, 1, 2, 3, 8}, as the kernel writes it."""
    found: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found
