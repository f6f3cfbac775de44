"""One process of several: its info, the store and the group it joins, and how it leaves when something fails."""

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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from arriero.common.device import BACKENDS, process_group_backend, tune_allocator
from arriero.common.environment import environment_number
from arriero.common.errors import EXIT_USAGE, CheckFailed, UserError, as_user_error
from arriero.common.signals import Interrupted, SignalListener
from arriero.common.text import escape_message, format_ranks
from arriero.distributed.launch.agreement import Disagreement, agree
from arriero.distributed.launch.cpu_affinity import set_cpu_affinity
from arriero.distributed.launch.objects import refuse_pickled_objects
from arriero.distributed.launch.secret import Secret

if TYPE_CHECKING:
    from torch.distributed import Store

T = TypeVar("T")
ROUND_VARIABLE = "ARRIERO_ROUND"
"""Environment of a process that arriero's own agent started: 0 at first, more after each restart of the job."""
PEER_ERROR_DELAY = 3.0
"""Seconds that a process which only lost touch with another waits, so that the one which failed is heard first."""
MAX_PROCESSES = 1_000_000
PEER_LOST_ERRORS = re.compile(
    rf"(?i){'|'.join(BACKENDS.values())}|timed out|connection (closed|reset|refused)|broken pipe|socket"
)


@dataclass(frozen=True)
class RankInfo:
    """Where a process stands among all, as torchrun tells it."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1

    @property
    def single_node(self) -> bool:
        """Whether all processes of the run are known to be on this machine."""
        return self.local_world_size == self.world_size and "LOCAL_WORLD_SIZE" in os.environ

    @classmethod
    def from_environment(cls) -> RankInfo:
        """Reads RANK and its kin; a lone process without them.

        Raises:
            UserError: one is missing, no number, or does not fit the others.
        """
        return cls.read(os.environ)

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> RankInfo:
        """Reads RANK and its kin from a mapping. Raises UserError, as `from_environment` does."""
        if "RANK" not in environment and "WORLD_SIZE" not in environment:
            return cls()
        fix = "torchrun sets RANK, WORLD_SIZE and their kin; where none has started the processes, unset them all"
        number = partial(environment_number, environment, fix=fix)
        world = number("WORLD_SIZE", 1, MAX_PROCESSES)
        local_world = number("LOCAL_WORLD_SIZE", 1, world, default=world)
        lone = 0 if world == 1 else None
        info = cls(
            number("RANK", 0, world - 1), number("LOCAL_RANK", 0, local_world - 1, default=lone), world, local_world
        )
        if world > 1:
            number("MASTER_PORT", 1, 2**16 - 1)
            if not environment.get("MASTER_ADDR"):
                raise UserError("MASTER_ADDR is missing in the environment", fix)
        return info


def is_launched_externally() -> bool:
    """Whether torchrun or its like has started this process as one of several."""
    return "RANK" in os.environ or "WORLD_SIZE" in os.environ


def exit_worker(error: BaseException) -> NoReturn:
    """Ends this process of several with its error told: to the agent's file, or on stderr where there is no agent."""
    info, agent = RankInfo.from_environment(), ROUND_VARIABLE in os.environ
    known = as_user_error(error) if isinstance(error, (UserError, OSError)) else None
    error, user = known or error, known is not None
    code = EXIT_USAGE if user else error.code if isinstance(error, Interrupted) else 1
    plain = user or isinstance(error, (CheckFailed, Interrupted))
    message = str(error) if plain else "".join(traceback.format_exception(error))
    lost_touch = isinstance(error, RuntimeError) and bool(PEER_LOST_ERRORS.search(str(error)))
    if lost_touch:
        message = unresponsive_ranks(info) + message
        time.sleep(PEER_ERROR_DELAY)
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with contextlib.suppress(OSError):  # a full disk: the launcher shows what it has, and the exit code
            handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            with open(handle, "w", encoding="utf-8", errors="backslashreplace") as writing:
                json.dump({"message": message, "timestamp": int(time.time()), "lost_touch": lost_touch}, writing)
    if agent and user:
        end_job(message, user=True)  # the same error would come again: no restart
    restarts = [_elastic_number(name) for name in ("RESTART_COUNT", "MAX_RESTARTS")]
    if not agent or (restarts[0] < restarts[1] and not user and not lost_touch):  # the agent tells of the last failure
        where = "" if isinstance(error, Disagreement) else f"process {info.rank} on {socket.gethostname()}: "
        if where or info.rank == 0:
            print(escape_message(f"arriero: {where}{message}"), file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)  # not sys.exit: the others may hang in a collective at clean-up


def exit_after_peers(code: int) -> int:
    """The exit code of this process after a run that was asked to stop, where torchrun or srun started it.

    They end all processes as soon as one leaves with an error code, and 75 counts as one: so rank 0 alone has it, and
    leaves when the others have gone.
    """
    info = RankInfo.from_environment()
    if info.world_size == 1 or not _stores:
        return code
    if info.rank > 0:
        sys.stdout.flush()
        _stores[1].set(f"gone/{info.rank}", "")
        os._exit(0)
    _stores[1].wait([f"gone/{r}" for r in range(1, info.world_size)], timedelta(seconds=60))
    time.sleep(0.5)
    return code


def end_job(reason: str, *, user: bool) -> None:
    """Writes into the store of the agents why the whole job ends; the first reason stays."""
    try:
        if _stores:
            _stores[0].compare_set("end", "-", json.dumps([reason, user]))
    except RuntimeError:
        pass  # node 0 has gone first


_stores: list[Store] = []
"""The job's store as it is, and with the prefix of this start: the last thing that a failing process can talk to."""


def unresponsive_ranks(info: RankInfo) -> str:
    """After a collective that did not end: which processes have not noticed, as the first line of the error."""
    if not _stores:
        return ""
    store = _stores[1]
    try:
        store.set_timeout(timedelta(seconds=2))
        store.set(f"lost-touch/{info.rank}", "")
        first = store.add("lost-touch", 1) == 1
        time.sleep(1 if first else 2)  # the first looks, and is heard first
        silent = [r for r in range(info.world_size) if first and not store.check([f"lost-touch/{r}"])]
        return f"{format_ranks(silent)} did not answer\n" if silent else ""
    except RuntimeError:
        return "rank 0, which holds the store, did not answer\n"


def run_in_process_group(
    function: Callable[[Any], T], argument: Any, *, facts: Callable[[Any], dict[str, str]] | None = None,
    join_seconds: float = 30.0, collective_seconds: float = 600.0, saves: bool = False, secret: Secret | None = None,
    towards: str = "",
) -> T:  # fmt: skip
    """Calls `function(argument)` as the process that the environment says, within the group of all; returns its result.

    Args:
        function: what this process does.
        argument: handed to it; its `device_kind`, where it has one, chooses the back end.
        facts: of `argument`, what all processes must agree on before they form the group.
        join_seconds: in which all must have come.
        collective_seconds: that one waits for the others in a collective.
        saves: whether `function` saves and returns when `signals.stop_requested`; else a signal ends it.
        secret: what the machines share, where neither arriero's nor torchrun's agent has started this process.
        towards: address of node 0, where MASTER_ADDR is that of the store on this machine's loopback.

    Raises:
        UserError: the processes do not find each other or do not agree.
        Interrupted: a signal has ended it before there was something to save.
    """
    info = RankInfo.from_environment()
    main = threading.current_thread() is threading.main_thread()
    secret = secret or Secret.find("", os.environ, Path("arriero"))
    run = partial(
        _run_in_process_group, function, argument, facts=facts, join_seconds=join_seconds,
        collective_seconds=collective_seconds, secret=secret, towards=towards,
    )  # fmt: skip
    if (
        saves and main and ROUND_VARIABLE not in os.environ
    ):  # arriero's launcher has its workers listen from their first moment
        with SignalListener(speaks=info.rank == 0):
            return run()
    return run()


def _run_in_process_group(
    function: Callable[[Any], T], argument: Any, *, facts: Callable[[Any], dict[str, str]] | None, join_seconds: float,
    collective_seconds: float, secret: Secret, towards: str,
) -> T:  # fmt: skip
    import torch.distributed as dist

    info = RankInfo.from_environment()
    tune_allocator()
    kind = getattr(argument, "device_kind", "cpu")
    set_cpu_affinity(info.local_rank, info.local_world_size, bind=kind == "cpu")
    if info.world_size == 1:
        return function(argument)
    try:
        store = open_job_store(info, join_seconds, secret)
        if facts is not None:
            agree(store, info.rank, info.world_size, facts(argument), seconds=join_seconds)
        refuse_pickled_objects()
        bind_gloo_interface("127.0.0.1" if info.single_node else towards or os.environ["MASTER_ADDR"])
        dist.init_process_group(
            process_group_backend(kind), store=store, rank=info.rank, world_size=info.world_size,
            timeout=timedelta(seconds=collective_seconds),
        )  # fmt: skip
    finally:
        if info.rank == 0 and ROUND_VARIABLE not in os.environ:
            secret.remove()  # all are in, or none will be
    result = function(argument)
    sys.stdout.flush()
    dist.destroy_process_group()
    return result


def uses_agent_store(environment: Mapping[str, str]) -> bool:
    """Whether the store is there already: arriero's launcher has opened it, or torchrun."""
    return environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def open_job_store(info: RankInfo, seconds: float, secret: Secret) -> Store:
    """The store through which the processes of this start find each other.

    Raises:
        UserError: the port is taken, the address does not lead to it, or the secret is not the run's.
    """
    from torch.distributed import PrefixStore

    from arriero.distributed.launch.store import connect_store, open_store

    address, port, who = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), f"rank {info.rank}"
    if uses_agent_store(os.environ):
        store: Store = connect_store(address, port, seconds, who=who, knock=ROUND_VARIABLE not in os.environ)
    elif info.single_node and info.rank > 0:
        store = connect_store("127.0.0.1", port, seconds, who=who)
    elif info.single_node:
        store = open_store(1, 0, address=address, port=0, seconds=seconds, secret=secret, local_port=port).store
    else:  # each process reaches node 0 by itself, as if it were a machine
        store = open_store(
            info.world_size, info.rank, address=address, port=port, seconds=seconds, secret=secret, apart=True
        ).store
    _stores[:] = [store, PrefixStore(f"start-{restart_count()}", store)]
    return _stores[1]


def bind_gloo_interface(address: str) -> None:
    """Binds gloo to the network interface that leads to node 0; by itself it takes whatever the host name means."""
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))  # sends nothing
            mine = socket.inet_aton(probe.getsockname()[0])
            for _, name in socket.if_nameindex():
                try:
                    found = fcntl.ioctl(probe, 0x8915, struct.pack("256s", name.encode()[:15]))  # SIOCGIFADDR
                except OSError:  # an interface without an address
                    continue
                if found[20:24] == mine:
                    os.environ["GLOO_SOCKET_IFNAME"] = name
    except OSError:
        return


_begun = time.monotonic()


def seconds_since_start() -> float:
    """Since this process, or the one that it was forked from, began."""
    return time.monotonic() - _begun


def restart_count() -> int:
    """0 in the first start of a job, more after each restart that a loss made necessary."""
    own = environment_number(os.environ, ROUND_VARIABLE, 0, 10**9, fix=f"unset {ROUND_VARIABLE}", default=-1)
    return own if own >= 0 else _elastic_number("RESTART_COUNT")


def _elastic_number(name: str) -> int:
    full = f"TORCHELASTIC_{name}"
    return environment_number(os.environ, full, 0, 10**9, fix=f"torchrun sets it; elsewhere unset {full}", default=0)
