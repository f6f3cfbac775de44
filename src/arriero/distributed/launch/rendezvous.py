"""The rendezvous of a run's nodes: ranks fixed by --node-rank, missing nodes named, restarts after a loss.

torch's elastic agent calls it before it starts or restarts the workers. Its state is in one store on node 0. Ranks
follow the given node ranks, so rank 0, which logs, is on node 0. Keys in the store:

    round               number of the rendezvous round that is forming or running
    ROUND/node-K        host and process count of node K in that round
    ROUND/count-K       how often node K joined that round
    heartbeat-K         counter that node K's agent increments
    end                 why the whole job ends: a node that reads it stops its workers and reports the same reason
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

from torch.distributed import DistNetworkError, DistStoreError, PrefixStore
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo

from arriero.common.errors import UserError
from arriero.distributed.launch.auth_proxy import LOOPBACK
from arriero.distributed.launch.secret import Secret
from arriero.distributed.launch.store import call_with_timeout, open_store

HEARTBEAT_TIMEOUT = 15.0
"""Seconds without a heartbeat after which a node counts as lost."""
HEARTBEAT_INTERVAL = 0.5
STORE_ERRORS = (DistNetworkError, DistStoreError)


class JobEnded(Exception):  # noqa: N818 - the end of the job, not a fault of this node
    """Another node has ended the job; the text is its reason."""


_instances = itertools.count()


class FixedRankRendezvous(RendezvousHandler):
    """All nodes of a run, by their given ranks. One per node, in the launcher."""

    def __init__(
        self, *, nodes: int, node_rank: int, address: str, port: int, processes: int, join_seconds: float,
        restarts: int, secret: Secret | None = None,
    ) -> None:  # fmt: skip
        """`secret`: shared by the machines; by default the one that Secret.find finds for the working directory."""
        self.name = f"arriero-{next(_instances)}"  # in torch's registry of rendezvous handlers
        self.nodes, self.node_rank, self.address, self.processes = nodes, node_rank, address, processes
        self.port, self.join_seconds, self.restarts = port, join_seconds, restarts
        self.secret = secret or Secret.find("", os.environ, Path("arriero"))
        self.on_poll: Callable[[], None] = lambda: None
        """Called ten times a second in the launcher's main thread; may raise to end the agent."""
        self._connection = open_store(
            nodes, node_rank, address=address, port=port, seconds=join_seconds, secret=self.secret
        )
        self.store, self._closed = self._connection.store, False
        self.store.compare_set("round", "", "0")
        self.store.compare_set("end", "", "-")
        self.round = -1
        self.store_lost = False
        self._last_heartbeat = 0.0
        self._heartbeats: dict[int, tuple[int, float]] = {}  # of each node: count, and time of its last change

    @property
    def use_agent_store(self) -> bool:
        """The workers use this store as well: it outlives any of them."""
        return True

    def get_backend(self) -> str:
        """The name in torch's registry."""
        return self.name

    def get_run_id(self) -> str:
        """The agent's name for the job."""
        return "arriero"

    def is_closed(self) -> bool:
        """Whether the job has ended."""
        return self.store.get("end") != b"-"

    def set_closed(self) -> None:
        """Does nothing: the agent gives no reason; `publish_end` does."""

    def shutdown(self) -> bool:
        """Does nothing: `close` ends the store."""
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """Waits until every node has joined.

        Raises:
            UserError: some did not join in time, each named; or they start different numbers of processes.
            JobEnded: another node ended the job.
        """
        deadline = time.monotonic() + self.join_seconds
        while not self._join(deadline):
            pass
        processes = {node: self._node_info(node)["processes"] for node in range(self.nodes)}
        if len(set(processes.values())) > 1:
            text = ", ".join(f"node {k}: {n}" for k, n in processes.items())
            raise UserError(f"the nodes start different numbers of processes: {text}", "give all one --nproc-per-node")
        if self.round > 0:
            text = f"arriero: start {self.round + 1} of the job, from its newest checkpoint"
            print(text, file=sys.stderr, flush=True)
        self._heartbeats.clear()
        self._last_heartbeat = 0.0
        store = PrefixStore(f"agents-{self.round}", self.store)
        bootstrap = RendezvousStoreInfo(LOOPBACK, self._connection.port)
        return RendezvousInfo(store, self.node_rank, self.nodes, bootstrap)

    def _join(self, deadline: float) -> bool:
        """Joins the current round and waits for the others; False when another round has begun."""
        self.on_poll()
        current = int(self.store.get("round"))
        if current == self.round or self.store.add(f"{current}/count-{self.node_rank}", 1) > 1:
            self.store.compare_set("round", str(current), str(current + 1))  # this node, or the one it replaces, was in
            return False
        info = {"host": socket.gethostname(), "processes": self.processes}
        self.store.set(f"{current}/node-{self.node_rank}", json.dumps(info))
        self.round = current
        while not self.store.check([f"{current}/node-{k}" for k in range(self.nodes)]):
            self.on_poll()
            self._raise_if_ended()
            if int(self.store.get("round")) != current:
                return False
            if time.monotonic() > deadline:
                raise self._missing_nodes_error()
            time.sleep(0.1)
        self._raise_if_ended()
        return True

    def _node_info(self, node: int) -> dict[str, object]:
        info: dict[str, object] = json.loads(self.store.get(f"{self.round}/node-{node}"))
        return info

    def _missing_nodes_error(self) -> UserError:
        joined = [k for k in range(self.nodes) if self.store.check([f"{self.round}/node-{k}"])]
        missing = ", ".join(f"node {k}" for k in range(self.nodes) if k not in joined)
        hosts = ", ".join(f"node {k} ({self._node_info(k)['host']})" for k in joined)
        return UserError(
            f"{len(joined)} of {self.nodes} nodes arrived in {self.join_seconds:g} s: {hosts}; missing: {missing}",
            f"start the missing with --master-addr {self.address} --master-port {self.port} and their --node-rank, or "
            "wait longer with --join-timeout",
        )

    def num_nodes_waiting(self) -> int:
        """Called by the agent ten times a second while its workers run; above 0 makes it restart them.

        Raises:
            JobEnded: another node ended the job, or one is lost and no restart is allowed.
        """
        self.on_poll()
        if self.nodes == 1 or time.monotonic() - self._last_heartbeat < HEARTBEAT_INTERVAL:
            return 0
        self._last_heartbeat = time.monotonic()
        try:  # over a connection that was cut, the store never answers
            waiting = call_with_timeout(HEARTBEAT_TIMEOUT, self._exchange_heartbeats)
        except STORE_ERRORS:
            waiting = None
        if waiting is None:
            self.store_lost = True
            raise JobEnded(f"node 0 ({self.address}:{self.port}), which holds the store, is gone or cut off")
        return waiting

    def _exchange_heartbeats(self) -> int:
        """Sends this node's heartbeat, on node 0 checks the others'; 1 if a new round has begun, else 0."""
        self.store.add(f"heartbeat-{self.node_rank}", 1)
        self._raise_if_ended()
        if self.node_rank == 0:
            for node in range(1, self.nodes):
                self._check_heartbeat(node)
        return int(int(self.store.get("round")) != self.round)

    def _check_heartbeat(self, node: int) -> None:
        """Begins a new round when `node` is lost; raises JobEnded where no restart is allowed."""
        now, count = time.monotonic(), self.store.add(f"heartbeat-{node}", 0)
        last_count, changed_at = self._heartbeats.get(node, (-1, now))
        changed_at = now if count != last_count else changed_at
        self._heartbeats[node] = (count, changed_at)
        if now - changed_at > HEARTBEAT_TIMEOUT:
            if self.restarts == 0:
                host = self._node_info(node)["host"]
                raise JobEnded(f"node {node} ({host}) sent no heartbeat for {HEARTBEAT_TIMEOUT:g} s")
            self.store.compare_set("round", str(self.round), str(self.round + 1))

    def close(self) -> None:
        """Closes the store, or this node's connection to it, and removes a secret that arriero created."""
        if not self._closed:
            self._closed = True
            self._connection.close()
            if self.node_rank == 0 and self.nodes > 1:
                self.secret.remove()

    def _raise_if_ended(self) -> None:
        message = self.store.get("end")
        if message != b"-":
            reason, is_user_error = json.loads(message)
            raise UserError(reason) if is_user_error else JobEnded(reason)

    def wait_for_end(self, seconds: float) -> Exception | None:
        """Why another node ended the job, if it publishes a reason within `seconds`."""
        deadline = time.monotonic() + seconds
        try:
            while self.nodes > 1 and not self.store_lost and time.monotonic() < deadline:
                self._raise_if_ended()
                time.sleep(0.1)
        except (JobEnded, UserError) as reason:
            return reason
        except STORE_ERRORS:
            pass
        return None

    def publish_end(self, reason: str, *, is_user_error: bool = False) -> None:
        """Publishes why the job ends, unless another node has. Node 0 waits until the others have read it."""
        if self.store_lost:
            return
        try:
            self.store.compare_set("end", "-", json.dumps([reason, is_user_error]))
            if self.node_rank == 0 and self.nodes > 1:
                time.sleep(2)
        except STORE_ERRORS:
            pass
