"""One process of several: the store and the process group it joins, and how it exits when something fails."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from arriero.common.device import DEVICES, process_group_backend, tune_allocator
from arriero.common.errors import EXIT_USAGE, CheckFailed, UserError, as_user_error
from arriero.common.signals import Interrupted, SignalListener
from arriero.common.text import escape_message, format_ranks
from arriero.distributed.launch.agreement import Disagreement, check_agreement
from arriero.distributed.launch.cpu_affinity import set_cpu_affinity
from arriero.distributed.launch.pickle_guard import refuse_pickled_objects
from arriero.distributed.launch.rank_info import (
    ROUND_VARIABLE,
    RankInfo,
    elastic_variable,
    restart_count,
    uses_agent_store,
)
from arriero.distributed.launch.secret import Secret

if TYPE_CHECKING:
    from torch.distributed import Store

T = TypeVar("T")
PEER_ERROR_DELAY = 3.0
"""Seconds that a process which only lost its connection to another waits, so that the failed one reports first."""
PEER_LOST_ERRORS = "timed out|connection (closed|reset|refused)|broken pipe|socket"
"""Messages of a RuntimeError whose cause is probably another process; those of a back end name it."""


def _names_lost_peer(message: str) -> bool:
    back_ends = "|".join(re.escape(name) for _, name in DEVICES.items())
    return bool(re.search(f"{back_ends}|{PEER_LOST_ERRORS}", message, re.IGNORECASE))


def exit_worker(error: BaseException) -> NoReturn:
    """Exits this process of several and reports its error: in the agent's error file, or on stderr without an agent."""
    info, own_agent = RankInfo.from_environment(), ROUND_VARIABLE in os.environ
    user_error = as_user_error(error) if isinstance(error, (UserError, OSError)) else None
    error, is_user_error = user_error or error, user_error is not None
    code = EXIT_USAGE if is_user_error else error.code if isinstance(error, Interrupted) else 1
    plain = is_user_error or isinstance(error, (CheckFailed, Interrupted))
    message = str(error) if plain else "".join(traceback.format_exception(error))
    peer_lost = isinstance(error, RuntimeError) and _names_lost_peer(str(error))
    if peer_lost:
        message = unresponsive_ranks(info) + message
        time.sleep(PEER_ERROR_DELAY)
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with contextlib.suppress(OSError):  # a full disk: the launcher still has the exit code
            handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            with open(handle, "w", encoding="utf-8", errors="backslashreplace") as writing:
                json.dump({"message": message, "timestamp": int(time.time()), "peer_lost": peer_lost}, writing)
    if own_agent and is_user_error:
        _publish_user_error(message)  # a restart would meet the same error
    restarts_left = elastic_variable("RESTART_COUNT") < elastic_variable("MAX_RESTARTS")
    if not own_agent or (restarts_left and not is_user_error and not peer_lost):  # the launcher reports the last one
        where = "" if isinstance(error, Disagreement) else f"process {info.rank} on {socket.gethostname()}: "
        if where or info.rank == 0:
            print(escape_message(f"arriero: {where}{message}"), file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)  # not sys.exit: clean-up may hang in a collective with the others


def exit_after_peers(code: int) -> int:
    """The exit code of this process after a requested stop, where torchrun or srun started it.

    They kill all processes as soon as one exits with an error code, and 75 counts as one: only rank 0 returns it, after
    the others have exited with 0.
    """
    info = RankInfo.from_environment()
    if info.world_size == 1 or not _stores:
        return code
    if info.rank > 0:
        sys.stdout.flush()
        _stores[1].set(f"exited/{info.rank}", "")
        os._exit(0)
    _stores[1].wait([f"exited/{r}" for r in range(1, info.world_size)], timedelta(seconds=60))
    time.sleep(0.5)
    return code


_stores: list[Store] = []
"""The job's store, and the same with the prefix of this start: still usable when a collective has failed."""


def _publish_user_error(message: str) -> None:
    """Ends the whole job: the agents of all nodes read this in the store (rendezvous.py)."""
    with contextlib.suppress(RuntimeError):  # node 0 has exited
        if _stores:
            _stores[0].compare_set("end", "-", json.dumps([message, True]))


def unresponsive_ranks(info: RankInfo) -> str:
    """After a collective that failed: the ranks that have not reported the failure, as the first line of the error."""
    if not _stores:
        return ""
    store = _stores[1]
    try:
        store.set_timeout(timedelta(seconds=2))
        store.set(f"peer-lost/{info.rank}", "")
        first = store.add("peer-lost", 1) == 1
        time.sleep(1 if first else 2)  # only the first checks, and its report is the one shown
        silent = [r for r in range(info.world_size) if first and not store.check([f"peer-lost/{r}"])]
        return f"{format_ranks(silent)} did not answer\n" if silent else ""
    except RuntimeError:
        return "rank 0, which holds the store, did not answer\n"


def run_in_process_group(
    function: Callable[[Any], T], argument: Any, *, facts: Callable[[Any], dict[str, str]] | None = None,
    join_seconds: float = 30.0, collective_seconds: float = 600.0, saves: bool = False, secret: Secret | None = None,
    master_addr: str = "",
) -> T:  # fmt: skip
    """Calls `function(argument)` with the rank of the environment, within the process group of all; returns its result.

    Args:
        function: what this process does.
        argument: its argument; an attribute `device_kind` chooses the back end.
        facts: of `argument`, on which all processes must agree before they form the group.
        join_seconds: within which all must arrive.
        collective_seconds: time-out of a collective.
        saves: whether `function` saves and returns when `signals.stop_requested`; else a signal ends it.
        secret: shared by the machines, where neither arriero's nor torchrun's agent has started this process.
        master_addr: address of node 0, where MASTER_ADDR is that of the store on this machine's loopback.

    Raises:
        UserError: the processes do not find each other or do not agree.
        Interrupted: a signal has ended it before there was something to save.
    """
    info = RankInfo.from_environment()
    main = threading.current_thread() is threading.main_thread()
    tune_allocator()
    kind = getattr(argument, "device_kind", "cpu")
    set_cpu_affinity(info.local_rank, info.local_world_size, bind=kind == "cpu")
    with contextlib.ExitStack() as stack:
        if saves and main and ROUND_VARIABLE not in os.environ:  # the launcher's workers have a signal thread
            stack.enter_context(SignalListener(verbose=info.rank == 0))
        if info.world_size == 1:
            return function(argument)
        secret = secret or Secret.find("", os.environ, Path("arriero"))
        try:
            store = open_job_store(info, join_seconds, secret)
            if facts is not None:
                check_agreement(store, info.rank, info.world_size, facts(argument), seconds=join_seconds)
            refuse_pickled_objects()
            bind_gloo_interface("127.0.0.1" if info.single_node else master_addr or os.environ["MASTER_ADDR"])
            import torch.distributed as dist

            dist.init_process_group(
                process_group_backend(kind), store=store, rank=info.rank, world_size=info.world_size,
                timeout=timedelta(seconds=collective_seconds),
            )  # fmt: skip
        finally:
            if info.rank == 0 and ROUND_VARIABLE not in os.environ:
                secret.remove()  # no more processes will join
        result = function(argument)
        sys.stdout.flush()
        dist.destroy_process_group()
        return result


def open_job_store(info: RankInfo, seconds: float, secret: Secret) -> Store:
    """The store through which the processes of this start find each other.

    Raises:
        UserError: the port is taken, the address does not lead to it, or the secret is not the run's.
    """
    from torch.distributed import PrefixStore

    from arriero.distributed.launch.store import connect_store, open_store

    address, port, client = os.environ["MASTER_ADDR"].strip(), int(os.environ["MASTER_PORT"]), f"rank {info.rank}"
    if uses_agent_store(os.environ):
        probe_port = ROUND_VARIABLE not in os.environ
        store: Store = connect_store(address, port, seconds, client=client, probe_port=probe_port)
    elif info.single_node and info.rank > 0:
        store = connect_store("127.0.0.1", port, seconds, client=client)
    elif info.single_node:
        store = open_store(1, 0, address=address, port=0, seconds=seconds, secret=secret, local_port=port).store
    else:  # each process connects to node 0 itself, as a node of its own
        nodes, node_rank = info.world_size, info.rank
        store = open_store(nodes, node_rank, address=address, port=port, seconds=seconds, secret=secret).store
    _stores[:] = [store, PrefixStore(f"start-{restart_count()}", store)]
    return _stores[1]


def bind_gloo_interface(address: str) -> None:
    """Binds gloo to the network interface that leads to `address`; its default is the one of the host name."""
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))  # sends nothing
        own_address = socket.inet_aton(probe.getsockname()[0])
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # an interface without an address
                found = fcntl.ioctl(probe, 0x8915, struct.pack("256s", name.encode()[:15]))  # SIOCGIFADDR
                if found[20:24] == own_address:
                    os.environ["GLOO_SOCKET_IFNAME"] = name


class _Clock:
    start = time.monotonic()


def restart_clock() -> None:
    """Counts `seconds_since_start` from now: for a process that trains several runs."""
    _Clock.start = time.monotonic()


def seconds_since_start() -> float:
    """Seconds since this process, or the one from which it was forked, imported this module or restarted the clock."""
    return time.monotonic() - _Clock.start
