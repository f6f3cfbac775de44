"""Runs processes with one fault each: `python run_failures.py FAULT ...`; a line of JSON for each fault.

Three processes run collectives; process 1 has the fault while the others wait for it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from arriero.common.errors import UserError
from arriero.distributed.launch import worker_monitor
from arriero.distributed.launch.config import LaunchConfig, resolve
from arriero.distributed.launch.launcher import run_processes


def work(fault: str) -> None:
    dist.all_reduce(torch.ones(1))
    if fault == "hang":  # from here on: a busy machine may start one process seconds after another
        distributed_c10d._set_pg_timeout(timedelta(seconds=3))
    if dist.get_rank() == 1:
        if fault == "raise":
            raise ValueError("the cause")
        if fault == "user":
            raise UserError("the data is wrong", "correct it")
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if fault == "hang":
            time.sleep(600)
    dist.all_reduce(torch.ones(1))


if __name__ == "__main__":
    worker_monitor.STOPPED_TIMEOUT = 2
    for fault in sys.argv[1:]:
        config = replace(resolve(LaunchConfig(), {}), collective_timeout=600)
        raised = None
        try:
            run_processes(work, fault, 3, launch=config)
        except Exception as error:
            raised = error
        print(
            json.dumps({"fault": fault, "kind": type(raised).__name__, "message": str(raised)}),
            flush=True,
        )
