"""Processes on the NUMA nodes of one machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arriero.distributed.launch.cpu_affinity import assign_cores, numa_nodes, parse_cpu_list

TWO_SOCKETS = [set(range(8)), set(range(8, 16))]


def test_the_kernels_lists() -> None:
    assert parse_cpu_list("0-3,8\n") == {0, 1, 2, 3, 8}
    assert parse_cpu_list("5") == {5}
    assert parse_cpu_list("\n") == set()  # a node of memory alone


@pytest.mark.parametrize(
    ("processes", "expected"),
    [
        (1, [(set(range(16)), 1)]),
        (2, [(TWO_SOCKETS[0], 1), (TWO_SOCKETS[1], 1)]),
        (4, [(TWO_SOCKETS[0], 2)] * 2 + [(TWO_SOCKETS[1], 2)] * 2),
        (3, [(TWO_SOCKETS[0], 2), (TWO_SOCKETS[0], 2), (TWO_SOCKETS[1], 1)]),
    ],
)
def test_two_sockets(processes: int, expected: list[tuple[set[int], int]]) -> None:
    assert [assign_cores(i, processes, TWO_SOCKETS) for i in range(processes)] == expected


@given(processes=st.integers(1, 40), nodes=st.integers(1, 16))
def test_every_core_is_used_and_no_node_is_crowded(processes: int, nodes: int) -> None:
    machine = [set(range(4 * n, 4 * n + 4)) for n in range(nodes)]
    given_out = [assign_cores(i, processes, machine) for i in range(processes)]
    assert set().union(*(mine for mine, _ in given_out)) == set().union(*machine)
    for mine, sharers in given_out:
        assert sharers == sum(bool(mine & other) for other, _ in given_out)
        assert len(mine) in (4, 4 * (nodes // processes), 4 * -(-nodes // processes))
    loads = [sharers for _, sharers in given_out]
    assert max(loads) - min(loads) <= 1


def test_nodes_are_read_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number, text in ((10, "4-5"), (2, "2-3"), (0, "0-1")):
        (tmp_path / f"node{number}").mkdir()
        (tmp_path / f"node{number}" / "cpulist").write_text(text)
    assert numa_nodes(tmp_path) == [{0, 1}, {2, 3}, {4, 5}]
    assert numa_nodes(tmp_path / "absent") == []


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core cannot be divided")
def test_a_process_is_bound_and_takes_as_many_threads(tmp_path: Path) -> None:
    """Every core a node of its own, in a process of its own, which says where it ended up."""
    allowed = sorted(os.sched_getaffinity(0))
    for i, core in enumerate(allowed):
        (tmp_path / f"node{i}").mkdir()
        (tmp_path / f"node{i}" / "cpulist").write_text(str(core))
    script = (
        "import os, pathlib, sys, torch; from arriero.distributed.launch import cpu_affinity as placement\n"
        "nodes = placement.numa_nodes(pathlib.Path(sys.argv[1])); placement.numa_nodes = lambda: nodes\n"
        "placement.set_cpu_affinity(1, 2, bind=sys.argv[2] == 'bind')\n"
        "print(sorted(os.sched_getaffinity(0)), torch.get_num_threads())"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("ARRIERO_THREADS", "OMP_NUM_THREADS")}
    upper = allowed[len(allowed) // 2 :]
    for how, expected in (("bind", upper), ("no", allowed)):
        said = subprocess.check_output([sys.executable, "-c", script, str(tmp_path), how], env=environment, text=True)
        assert said.strip() == f"{expected} {len(upper)}"
