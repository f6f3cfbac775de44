"""The key-value store of a run: on the loopback of node 0, behind a gate for the other machines.

What hosts the store, and the gate before it (gate.py), is a process of its own on node 0.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import ipaddress
import os
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

from torch.distributed import Store, TCPStore

from arriero.common.errors import UserError
from arriero.distributed.launch.gate import LOOPBACK, NOT_A_RUN, Forwarder, Gate, Refused, serve, try_gate
from arriero.distributed.launch.secret import OTHERWISE, Secret, SecretMissing

T = TypeVar("T")
NOT_THERE = "start node 0 there, or mend --master-addr and --master-port; --join-timeout waits longer"
TRY_AGAIN = 0.2
"""Seconds between two tries to reach node 0."""


@dataclass(frozen=True)
class OpenStore:
    """The store as this process sees it."""

    store: Store
    port: int
    """Port on this machine's loopback at which its processes find it."""
    host: int = 0
    """Process that hosts it, or stands in for it, until `close`; 0 where a thread of this one does."""

    def close(self) -> None:
        """Ends the process beside this one."""
        if self.host:
            os.kill(self.host, signal.SIGKILL)
            os.waitpid(self.host, 0)


def set_parent_death_signal() -> None:
    """Has the kernel end this process when the one that forked it ends, however it ends."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def open_store(
    nodes: int, node_rank: int, *, address: str, port: int, seconds: float, secret: Secret, local_port: int = 0,
    apart: bool = False,
) -> OpenStore:  # fmt: skip
    """Hosts the store of a run, on node 0, or reaches it from another.

    Args:
        nodes: machines of the run; with one, nothing listens but on the loopback.
        node_rank: this one's number.
        address, port: where node 0's gate listens.
        seconds: in which node 0 must be reached.
        secret: what the machines share.
        local_port: port on the loopback of node 0; 0 for any.
        apart: whether what stands in for the store on another node is a process of its own, not a thread: for a
            process that trains, and may wait for the store with the interpreter's lock held.

    Raises:
        UserError: the port is taken, the address does not lead to node 0 in time, or the secret is not the run's.
    """
    who = f"node {node_rank}"
    if nodes > 1 and not secret.made:
        secret.key()  # what is wrong with it is known before anybody waits
    if node_rank > 0:
        forwarder = Forwarder(reach(address, port, seconds, secret, node_rank), secret.key, node_rank)
        door = _listen(LOOPBACK, 0)
        stand_in = partial(serve, forwarder.take, [door])
        if apart:
            return _opened(door, start_store_process(stand_in), seconds, who)
        here = door.getsockname()[1]
        os.register_at_fork(after_in_child=door.close)  # the workers do not listen
        threading.Thread(target=stand_in, daemon=True).start()
        return OpenStore(connect_store(LOOPBACK, here, seconds, who=who, knock=False), here)
    gates = _gate_sockets(address, port) if nodes > 1 else []
    key = b""
    if nodes > 1:
        secret.make()
        key = secret.key()
    door = _listen(LOOPBACK, local_port)

    def host() -> None:
        here = door.getsockname()[1]
        store = TCPStore(
            LOOPBACK, here, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=seconds),
            master_listen_fd=door.detach(), use_libuv=True,
        )  # fmt: skip
        if gates:
            serve(Gate(key, here).take, gates)
        while store:
            signal.pause()

    hosting = start_store_process(host)
    for gate in gates:
        gate.close()
    return _opened(door, hosting, seconds, who)


def _opened(door: socket.socket, host: int, seconds: float, who: str) -> OpenStore:
    port = door.getsockname()[1]
    try:
        door.close()
        return OpenStore(connect_store(LOOPBACK, port, seconds, who=who, knock=False), port, host)
    except BaseException:
        os.kill(host, signal.SIGKILL)
        os.waitpid(host, 0)
        raise


def start_store_process(work: Callable[[], None]) -> int:
    """Does `work` in a process of its own, which ends with this one; returns it.

    Not in this one: the store's thread asks the resolver for the name of each that connects, and a worker forked in
    that moment inherits the resolver's lock and hangs (seen in one start of four, with 32 workers and a slow DNS).
    """
    parent = os.getpid()
    host = os.fork()
    if host == 0:
        try:
            set_parent_death_signal()
            told = os.dup(2)
            for stream in (1, 2):  # torch logs what strangers send, and would wait where nobody reads it
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
            for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
                signal.signal(name, signal.SIG_IGN)  # it is needed until its parent has ended
            if os.getppid() == parent:
                work()
        except BaseException:
            os.write(told, traceback.format_exc().encode(errors="backslashreplace"))
        finally:
            os._exit(0)
    return host


def _listen(host: str, port: int, family: int = socket.AF_INET) -> socket.socket:
    """A listening socket. Raises UserError where the port is taken, OSError where it cannot be had otherwise."""
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listening.bind((host, port))
        listening.listen(512)
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRINUSE:
            fix = "end the process that has it (`ss -ltnp` shows it), or give all nodes another --master-port"
            raise UserError(f"port {port} is in use on this machine ({socket.gethostname()})", fix) from None
        raise
    return listening


def _gate_sockets(address: str, port: int) -> list[socket.socket]:
    """Sockets that listen at each address of this machine that `address` means.

    A host name that means the loopback here, as Debian writes it into /etc/hosts, means another address on the other
    machines: then the gate listens on all interfaces.

    Raises:
        UserError: it means no address of this machine, or the port is taken.
    """
    try:
        found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        found = []
    if any(is_loopback(str(where[0])) for *_, where in found) and not is_loopback(address):
        return [_listen("", port)]
    gates = []
    for family, _, _, _, where in dict.fromkeys(found):
        with contextlib.suppress(OSError):
            gates.append(_listen(str(where[0]), port, family))
    if not gates:
        fix = "give all nodes the address of node 0 as --master-addr, and this node its own --node-rank"
        raise UserError(f"--master-addr {address} is not an address of this machine, which is node 0", fix)
    return gates


def is_loopback(address: str) -> bool:
    """Whether `address` is written as one that never leaves this machine: 127.0.0.1, ::1, localhost."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address.partition(".")[0] == "localhost"


def reach(address: str, port: int, seconds: float, secret: Secret, node: int) -> tuple[socket.AddressFamily, Any]:
    """Waits until node 0 lets this one in; returns the family and the socket address that led to it.

    Raises:
        UserError: not within `seconds`: nobody answers, or another program, or with another secret.
    """
    deadline, said = time.monotonic() + seconds, ""
    while (left := deadline - time.monotonic()) > 0:
        try:
            return try_gate(address, port, secret.key, node, max(0.5, min(5.0, left)))
        except SecretMissing as error:
            said, fix = error.problem, error.fix
        except Refused as error:
            said, fix = str(error), NOT_THERE if str(error) == NOT_A_RUN else OTHERWISE
        except (OSError, UnicodeError) as error:
            said, fix = getattr(error, "strerror", "") or str(error), NOT_THERE
        time.sleep(TRY_AGAIN)
    where = f"node {node} ({socket.gethostname()})"
    raise UserError(f"{where} cannot reach node 0 at {address}:{port} in {seconds:g} s: {said}", fix)


def connect_store(address: str, port: int, seconds: float, *, who: str, knock: bool = True) -> TCPStore:
    """Connects to the store on node 0, waiting until somebody listens there, as torchrun has opened it.

    `knock` looks first whether the port is open, because torch's own error does not say why it is not.

    Raises:
        UserError: nobody does within `seconds`, or it is no store; the text has the network's own word for it.
    """
    where, deadline, said = f"{who} ({socket.gethostname()})", time.monotonic() + seconds, ""
    timeout = timedelta(seconds=seconds)
    while (left := deadline - time.monotonic()) > 0:
        try:
            if knock:
                socket.create_connection((address, port), timeout=max(0.5, min(5.0, left))).close()
            store = within(left, lambda: TCPStore(address, port, wait_for_workers=False, timeout=timeout))
            if store is not None:
                return store
            said = NOT_A_RUN
        except OSError as error:
            said = error.strerror or str(error)
        except RuntimeError as error:
            said = str(error).partition("\n")[0]
        time.sleep(0.2)
    raise UserError(f"{where} cannot reach node 0 at {address}:{port} in {seconds:g} s: {said}", NOT_THERE)


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
