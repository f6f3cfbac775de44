"""Starts eight processes TIMES times while the monitor polls without a pause: `repeat_launch.py TIMES`."""

from __future__ import annotations

import sys

import arriero.distributed.launch.launcher
import arriero.distributed.launch.worker_monitor


def nothing(_: None) -> None:
    import torch.distributed as dist

    dist.barrier()  # a process that exits before another has connected would fail that one


if __name__ == "__main__":
    arriero.distributed.launch.worker_monitor.POLL_INTERVAL = 0.0003
    for _ in range(int(sys.argv[1])):
        arriero.distributed.launch.launcher.run_processes(nothing, None, 8)
