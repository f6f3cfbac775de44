"""Starts eight processes again and again, the watching thread looking without a pause: `launch_often.py TIMES`."""

from __future__ import annotations

import sys

import arriero.distributed.launch.launcher
import arriero.distributed.launch.worker_monitor


def nothing(_: None) -> None:
    import torch.distributed as dist

    dist.barrier()  # one that left before another has connected would be missed


if __name__ == "__main__":
    arriero.distributed.launch.worker_monitor.POLL_INTERVAL = 0.0003
    for _ in range(int(sys.argv[1])):
        arriero.distributed.launch.launcher.run_processes(nothing, None, 8)
