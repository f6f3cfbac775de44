"""The key-value store on node 0 through which everything finds everything: hosted, connected to, or refused by name."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

from torch.distributed import DistNetworkError, Store, TCPStore

from arriero.common.errors import UserError

T = TypeVar("T")


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
