"""How the nodes of a run find each other, come together again after a loss, and tell each other why they end.

One store on node 0 holds it all; torch's elastic agent asks here before it starts or restarts the processes. Ranks
follow the node ranks that the user gave, so rank 0, which logs, is on node 0. Keys in the store:

    round               number of the meeting that is forming or running
    ROUND/node-K        who came to it as node K, and how often
    beat-K              node K's agent lives
    end                 why the whole job ends: a node that reads it stops its processes and repeats the reason
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import sys
import time
from pathlib import Path

from torch.distributed import DistNetworkError, DistStoreError, PrefixStore
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo

from arriero.common.errors import UserError
from arriero.distributed.launch.gate import LOOPBACK
from arriero.distributed.launch.secret import Secret
from arriero.distributed.launch.store import open_store, within

LOST_AFTER = 15.0
"""Seconds without a sign of life after which a node counts as lost."""


class JobEnded(Exception):  # noqa: N818 - a message from another node
    """Another node has ended the job; the text is its reason."""


_names = itertools.count()


class FixedRankRendezvous(RendezvousHandler):
    """All nodes of a run, by their given ranks. Made once in each node's agent."""

    def __init__(
        self, *, nodes: int, node_rank: int, address: str, port: int, processes: int, join_seconds: float,
        restarts: int, secret: Secret | None = None,
    ) -> None:  # fmt: skip
        """`secret`: what the machines share; by default as Secret.find finds it for the working directory."""
        self.name = f"arriero-{next(_names)}"  # under which the agent finds it
        self.nodes, self.node_rank, self.address, self.processes = nodes, node_rank, address, processes
        self.port, self.join_seconds, self.restarts = port, join_seconds, restarts
        self.secret = secret or Secret.find("", os.environ, Path("arriero"))
        self._opened = open_store(
            nodes, node_rank, address=address, port=port, seconds=join_seconds, secret=self.secret
        )
        self.store, self._closed = self._opened.store, False
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
        info = self._wait_for_collective(range(self.nodes))
        processes = {k: self._who(k)["processes"] for k in info}
        if len(set(processes.values())) > 1:
            text = ", ".join(f"node {k}: {n}" for k, n in processes.items())
            raise UserError(f"the nodes start different numbers of processes: {text}", "give all one --nproc-per-node")
        if self.round > 0:
            print(
                f"arriero: start {self.round + 1} of the job, from its newest checkpoint", file=sys.stderr, flush=True
            )
        self._beats.clear()
        self._looked = 0.0
        store = PrefixStore(f"agents-{self.round}", self.store)
        return RendezvousInfo(store, self.node_rank, self.nodes, RendezvousStoreInfo(LOOPBACK, self._opened.port))

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

    def _wait_for_collective(self, ranks: range) -> list[int]:
        return [k for k in ranks if self.store.check([f"{self.round}/node-{k}"])]

    def _who(self, node: int) -> dict[str, object]:
        found: dict[str, object] = json.loads(self.store.get(f"{self.round}/node-{node}"))
        return found

    def _missing(self) -> UserError:
        here = self._wait_for_collective(range(self.nodes))
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
        """Ends the store, or what stands in for it here, and removes the secret that was made."""
        if not self._closed:
            self._closed = True
            self._opened.close()
            if self.node_rank == 0 and self.nodes > 1:
                self.secret.remove()

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
