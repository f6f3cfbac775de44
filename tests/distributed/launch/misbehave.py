"""Runs processes that fail in one way each: `python misbehave.py WAY ...`; a line of JSON for each way.

Three processes meet in collectives; process 1 misbehaves while the others wait for it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import replace

import torch
import torch.distributed as dist

from arriero.common.errors import UserError
from arriero.distributed.launch import launcher as launch
from arriero.distributed.launch.config import LaunchConfig, resolve


def work(way: str) -> None:
    dist.all_reduce(torch.ones(1))
    if dist.get_rank() == 1:
        if way == "raise":
            raise ValueError("the cause")
        if way == "user":
            raise UserError("the data is wrong", "mend it")
        if way == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if way == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if way == "hang":
            time.sleep(600)
    dist.all_reduce(torch.ones(1))


if __name__ == "__main__":
    launch.STOPPED_AFTER = 2
    for way in sys.argv[1:]:
        config = replace(resolve(LaunchConfig(), {}), collective_timeout=3 if way == "hang" else 60)
        began, said = time.monotonic(), None
        try:
            launch.run_processes(work, way, 3, launch=config)
        except Exception as error:
            said = error
        seconds = time.monotonic() - began
        print(json.dumps({"way": way, "kind": type(said).__name__, "said": str(said), "seconds": seconds}), flush=True)
