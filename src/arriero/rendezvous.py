"""How the nodes of a run find each other, come together again after a loss, and tell each other why they end.

One store on node 0 holds it all; torch's elastic agent asks here before it starts or restarts the processes. Ranks
follow the node ranks that the user gave, so rank 0, which logs, is on node 0. Keys in the store:

    round               number of the meeting that is forming or running
    ROUND/node-K        who came to it as node K, and how often
    beat-K              node K's agent lives
    end                 why the whole job ends: a node that reads it stops its processes and repeats the reason
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

from torch.distributed import DistNetworkError, DistStoreError, PrefixStore, Store, TCPStore
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo

from arriero.errors import UserError
from arriero.process import ROUND

LOST_AFTER = 15.0
"""Seconds without a sign of life after which a node counts as lost."""


class JobEnded(Exception):  # noqa: N818 - a message from another node
    """Another node has ended the job; the text is its reason."""


T = TypeVar("T")
_names = itertools.count()


class Meeting(RendezvousHandler):
    """All nodes of a run, by their given ranks. Made once in each node's agent."""

    def __init__(
        self, *, nodes: int, node_rank: int, address: str, port: int, processes: int, join_seconds: float,
        restarts: int,
    ) -> None:  # fmt: skip
        self.name = f"arriero-{next(_names)}"  # under which the agent finds it
        self.nodes, self.node_rank, self.address, self.processes = nodes, node_rank, address, processes
        self.join_seconds, self.restarts = join_seconds, restarts
        self.store, self.port, self._host = open_store(nodes, node_rank, address, port, join_seconds)
        self.store.compare_set("round", "", "0")
        self.store.compare_set("end", "", "-")
        self.round = -1
        self._looked = 0.0
        self.lost = False  # the store no longer answers
        self._beats: dict[int, tuple[int, float]] = {}

    @property
    def use_agent_store(self) -> bool:
        """The workers use this store too: it outlives any of them."""
        return True

    def get_backend(self) -> str:
        """The name under which the agent knows it."""
        return self.name

    def get_run_id(self) -> str:
        """The agent's word for its job."""
        return "arriero"

    def is_closed(self) -> bool:
        """Whether the job has ended."""
        return self.store.get("end") != b"-"

    def set_closed(self) -> None:
        """The agent has no reason to give; `end` has."""

    def shutdown(self) -> bool:
        """Nothing to undo: the store ends with its process."""
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """Waits until every node is here.

        Raises:
            UserError: some did not come in time, each named; or they start different numbers of processes.
            JobEnded: another node gave up.
        """
        deadline = time.monotonic() + self.join_seconds
        while not self._join(deadline):
            pass
        info = self._arrived(range(self.nodes))
        processes = {k: self._who(k)["processes"] for k in info}
        if len(set(processes.values())) > 1:
            text = ", ".join(f"node {k}: {n}" for k, n in processes.items())
            raise UserError(f"the nodes start different numbers of processes: {text}", "give all one --nproc-per-node")
        os.environ[ROUND] = str(self.round)  # inherited by the workers
        if self.round > 0:
            print(
                f"arriero: start {self.round + 1} of the job, from its newest checkpoint", file=sys.stderr, flush=True
            )
        self._beats.clear()
        self._looked = 0.0
        store = PrefixStore(f"agents-{self.round}", self.store)
        return RendezvousInfo(store, self.node_rank, self.nodes, RendezvousStoreInfo(self.address, self.port))

    def _join(self, deadline: float) -> bool:
        """Comes to the present round and waits for the others; False when that round is spent."""
        present = int(self.store.get("round"))
        me = {"host": socket.gethostname(), "processes": self.processes}
        if present == self.round or self.store.add(f"{present}/count-{self.node_rank}", 1) > 1:
            self.store.compare_set("round", str(present), str(present + 1))  # I, or whom I replace, was in it
            return False
        self.store.set(f"{present}/node-{self.node_rank}", json.dumps(me))
        self.round = present
        while True:
            self._raise_if_ended()
            if self.store.check([f"{present}/node-{k}" for k in range(self.nodes)]):
                return True
            if int(self.store.get("round")) != present:
                return False
            if time.monotonic() > deadline:
                raise self._missing()
            time.sleep(0.1)

    def _arrived(self, ranks: range) -> list[int]:
        return [k for k in ranks if self.store.check([f"{self.round}/node-{k}"])]

    def _who(self, node: int) -> dict[str, object]:
        found: dict[str, object] = json.loads(self.store.get(f"{self.round}/node-{node}"))
        return found

    def _missing(self) -> UserError:
        here = self._arrived(range(self.nodes))
        missing = ", ".join(f"node {k}" for k in range(self.nodes) if k not in here)
        hosts = ", ".join(f"node {k} ({self._who(k)['host']})" for k in here)
        return UserError(
            f"{len(here)} of {self.nodes} nodes arrived in {self.join_seconds:g} s: {hosts}; missing: {missing}",
            f"start the missing with --master-addr {self.address} --master-port {self.port} and their --node-rank, or "
            "wait longer with --join-timeout",
        )

    def num_nodes_waiting(self) -> int:
        """Asked by the agent ten times a second while all is well; above 0 makes it restart its processes.

        Raises:
            JobEnded: another node ended the job, or one is lost and no restart is allowed.
        """
        if self.nodes == 1 or time.monotonic() - self._looked < 0.5:
            return 0
        self._looked = time.monotonic()
        try:  # in a thread: over a line that was cut, the store's answer never comes
            waiting = within(LOST_AFTER, self._look)
        except (DistNetworkError, DistStoreError):
            waiting = None
        if waiting is None:
            self.lost = True
            raise JobEnded(f"node 0 ({self.address}:{self.port}), which holds the store, is gone or cut off")
        return waiting

    def _look(self) -> int:
        self.store.add(f"beat-{self.node_rank}", 1)
        self._raise_if_ended()
        if self.node_rank == 0:
            self._look_for_the_lost()
        return int(int(self.store.get("round")) != self.round)

    def _look_for_the_lost(self) -> None:
        now = time.monotonic()
        for k in range(1, self.nodes):
            beat = self.store.add(f"beat-{k}", 0)
            last, since = self._beats.get(k, (-1, now))
            self._beats[k] = (beat, now if beat != last else since)
            if now - self._beats[k][1] > LOST_AFTER:
                if self.restarts == 0:
                    raise JobEnded(f"node {k} ({self._who(k)['host']}) gave no sign of life for {LOST_AFTER:g} s")
                self.store.compare_set("round", str(self.round), str(self.round + 1))

    def close(self) -> None:
        """Ends the store, on node 0."""
        if self._host:
            os.kill(self._host, signal.SIGKILL)
            os.waitpid(self._host, 0)
            self._host = 0

    def _raise_if_ended(self) -> None:
        said = self.store.get("end")
        if said != b"-":
            reason, user = json.loads(said)
            raise UserError(reason) if user else JobEnded(reason)

    def reason(self, seconds: float) -> Exception | None:
        """Why another node ended the job, if it says so within `seconds`."""
        deadline = time.monotonic() + seconds
        try:
            while self.nodes > 1 and not self.lost and time.monotonic() < deadline:
                self._raise_if_ended()
                time.sleep(0.1)
        except (JobEnded, UserError) as said:
            return said
        except (DistNetworkError, DistStoreError):
            pass
        return None

    def end(self, reason: str, *, user: bool = False) -> None:
        """Tells the other nodes why the job ends; the first reason stays. Node 0 stays for them to read it."""
        if self.lost:
            return
        try:
            self.store.compare_set("end", "-", json.dumps([reason, user]))
            if self.node_rank == 0 and self.nodes > 1:
                time.sleep(2)
        except (DistNetworkError, DistStoreError):
            pass


def die_with_parent() -> None:
    """Has the kernel end this process when the one that forked it ends, however it ends."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def open_store(nodes: int, node_rank: int, address: str, port: int, seconds: float) -> tuple[Store, int, int]:
    """The store on node 0: hosted there, connected to elsewhere; its port; the process that hosts it, or 0.

    Raises:
        UserError: the port is taken, or the address does not lead there within `seconds`.
    """
    if node_rank > 0:
        return connect_store(address, port, seconds, who=f"node {node_rank}"), port, 0
    if nodes > 1 and not is_here(address):
        fix = "give all nodes the address of node 0 as --master-addr, and this node its own --node-rank"
        raise UserError(f"--master-addr {address} is not an address of this machine, which is node 0", fix)
    port, host = host_apart(address, port, seconds)
    try:
        return connect_store(address, port, seconds, who="node 0", knock=False), port, host
    except UserError:
        os.kill(host, signal.SIGKILL)
        raise


def host_apart(address: str, port: int, seconds: float) -> tuple[int, int]:
    """Hosts a store in a process of its own; returns its port and its process.

    Not in this one: the store's thread asks the resolver for the name of each that connects, and a worker forked in
    that moment inherits the resolver's lock and hangs (seen in one start of four, with 32 workers and a slow DNS).
    """
    reader, writer = os.pipe()
    host = os.fork()
    if host == 0:
        try:
            die_with_parent()
            for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
                signal.signal(name, signal.SIG_IGN)  # it is needed until its parent has ended
            store, port = host_store(address, port, seconds)
            os.write(writer, json.dumps([port]).encode())
            while store:
                signal.pause()
        except UserError as error:
            os.write(writer, json.dumps([0, error.problem, error.fix]).encode())
        finally:
            os._exit(0)
    os.close(writer)
    text = os.read(reader, 1 << 16).decode()
    os.close(reader)
    port, *problem = json.loads(text or '[0, "the store did not start", ""]')
    if problem:
        os.waitpid(host, 0)
        raise UserError(*problem)
    return port, host


def host_store(address: str, port: int, seconds: float) -> tuple[TCPStore, int]:
    """Hosts a store for others and returns it with its port.

    Raises:
        UserError: the port is taken.
    """
    try:
        store = TCPStore(
            address, port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=seconds),
        )  # fmt: skip
    except DistNetworkError as error:
        text = str(error).partition("\n")[0]
        if "EADDRINUSE" in text or "in use" in text:
            fix = "end the process that has it (`ss -ltnp` shows it), or give all nodes another --master-port"
            raise UserError(f"port {port} is in use on this machine ({socket.gethostname()})", fix) from None
        raise UserError(f"no store can be opened at {address}:{port}: {text}", "mend --master-addr") from None
    return store, store.port


def is_here(address: str) -> bool:
    """Whether `address` leads to this machine; an address that cannot be resolved does not."""
    try:
        family, kind, _, _, where = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.bind(where)
    except OSError:
        return False
    return True


def connect_store(address: str, port: int, seconds: float, *, who: str, knock: bool = True) -> TCPStore:
    """Connects to the store on node 0, waiting until somebody listens there.

    `knock` looks first whether the port is open, because torch's own error does not say why it is not.

    Raises:
        UserError: nobody does within `seconds`, or it is no store; the text has the network's own word for it.
    """
    where, deadline, said = f"{who} ({socket.gethostname()})", time.monotonic() + seconds, ""
    fix = "start node 0 there, or mend --master-addr and --master-port; --join-timeout waits longer"
    timeout = timedelta(seconds=seconds)
    while (left := deadline - time.monotonic()) > 0:
        try:
            if knock:
                socket.create_connection((address, port), timeout=max(0.5, min(5.0, left))).close()
            store = within(left, lambda: TCPStore(address, port, wait_for_workers=False, timeout=timeout))
            if store is not None:
                return store
            said = "what answers there is not a run of arriero"
        except OSError as error:
            said = error.strerror or str(error)
        except RuntimeError as error:
            said = str(error).partition("\n")[0]
        time.sleep(0.2)
    raise UserError(f"{where} cannot reach node 0 at {address}:{port} in {seconds:g} s: {said}", fix)


def within(seconds: float, function: Callable[[], T]) -> T | None:
    """What `function()` returns or raises, or None when it has done neither in `seconds`; its thread is left behind."""
    done: list[T] = []
    failed: list[Exception] = []

    def call() -> None:
        try:
            done.append(function())
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    if failed:
        raise failed[0]
    return done[0] if done else None
