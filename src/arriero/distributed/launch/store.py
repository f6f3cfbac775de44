"""The key-value store of a run: on the loopback of node 0, with an authenticating proxy for the other machines.

A process of its own hosts it on node 0, together with the proxy (auth_proxy.py). On each other machine a process of its
own forwards connections to that proxy.
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
from arriero.distributed.launch.auth_proxy import (
    LOOPBACK,
    NOT_ARRIERO,
    UNREACHABLE_FIX,
    AuthProxy,
    Forwarder,
    HandshakeFailed,
    serve,
    try_handshake,
)
from arriero.distributed.launch.secret import Secret, SecretMissing

T = TypeVar("T")
RETRY_INTERVAL = 0.2
"""Seconds between two tries to reach node 0."""


@dataclass(frozen=True)
class StoreConnection:
    """A client of the store, and the process of this machine that hosts the store or forwards to it."""

    store: Store
    port: int
    """Port on this machine's loopback at which its processes reach the store."""
    process: int
    """The process that listens there, until `close`."""

    def close(self) -> None:
        """Ends that process."""
        _kill(self.process)


def set_parent_death_signal() -> None:
    """Has the kernel kill this process when the one that forked it ends, however it ends."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def open_store(
    nodes: int, node_rank: int, *, address: str, port: int, seconds: float, secret: Secret, local_port: int = 0
) -> StoreConnection:
    """Hosts the store of a run on node 0, or connects to it from another node.

    Args:
        nodes: machines of the run; with one, nothing listens except on the loopback.
        node_rank: the number of this machine.
        address, port: where node 0's proxy listens.
        seconds: within which node 0 must be reached.
        secret: shared by the machines.
        local_port: port on the loopback of node 0; 0 for any.

    Raises:
        UserError: the port is taken, the address does not lead to node 0 in time, or the secret is not the run's.
    """
    if nodes > 1 and not secret.managed:
        secret.key()  # an unusable secret is reported before anybody waits
    proxies: list[socket.socket] = []
    if node_rank > 0:
        found = wait_for_proxy(address, port, seconds, secret, node_rank)
        listener = _listen(LOOPBACK, 0)
        work = partial(serve, Forwarder(found, secret.key, node_rank).handle, [listener])
    else:
        key = b""
        if nodes > 1:
            proxies = _listen_at(address, port)
            secret.create()
            key = secret.key()
        listener = _listen(LOOPBACK, local_port)
        work = partial(_host_store, listener, proxies, key, seconds)
    local_port = listener.getsockname()[1]
    process = start_store_process(work)
    for one in (listener, *proxies):
        one.close()
    try:
        store = connect_store(LOOPBACK, local_port, seconds, client=f"node {node_rank}", probe_port=False)
    except BaseException:
        _kill(process)
        raise
    return StoreConnection(store, local_port, process)


def _host_store(listener: socket.socket, proxies: list[socket.socket], key: bytes, seconds: float) -> None:
    """Hosts the store, and the proxy where other machines take part; never returns."""
    port = listener.getsockname()[1]
    store = TCPStore(
        LOOPBACK, port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=seconds),
        master_listen_fd=listener.detach(), use_libuv=True,
    )  # fmt: skip
    if proxies:
        serve(AuthProxy(key, port).handle, proxies)
    while store:
        signal.pause()


def start_store_process(work: Callable[[], None]) -> int:
    """Runs `work` in a forked process that ends with this one; returns its process id.

    Not on a thread of this process: the store's thread asks the resolver for the name of each client, and a worker
    that is forked in that moment inherits the resolver's lock and hangs (observed in one start of four, with 32 workers
    and a slow DNS). A training process may also wait for the store with the interpreter's lock held.
    """
    parent = os.getpid()
    process = os.fork()
    if process == 0:
        try:
            set_parent_death_signal()
            stderr = os.dup(2)
            for stream in (1, 2):  # torch logs what any client sends, and would block on a full pipe
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)  # it is needed until its parent has ended
            if os.getppid() == parent:
                work()
        except BaseException:
            os.write(stderr, traceback.format_exc().encode(errors="backslashreplace"))
        finally:
            os._exit(0)
    return process


def _listen(host: str, port: int, family: int = socket.AF_INET) -> socket.socket:
    """A listening socket. Raises UserError where the port is taken, OSError where it cannot be opened otherwise."""
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind((host, port))
        listener.listen(512)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            fix = "end the process that has it (`ss -ltnp` shows it), or give all nodes another --master-port"
            raise UserError(f"port {port} is in use on this machine ({socket.gethostname()})", fix) from None
        raise
    return listener


def _listen_at(address: str, port: int) -> list[socket.socket]:
    """Sockets that listen at each address of this machine to which `address` resolves.

    A host name that resolves to the loopback here, as Debian writes it into /etc/hosts, resolves to another address on
    the other machines: then one socket listens on all interfaces.

    Raises:
        UserError: it resolves to no address of this machine, or the port is taken.
    """
    try:
        found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        found = []
    if any(is_loopback(str(target[0])) for *_, target in found) and not is_loopback(address):
        return [_listen("", port)]
    listeners = []
    for family, _, _, _, target in dict.fromkeys(found):
        with contextlib.suppress(OSError):
            listeners.append(_listen(str(target[0]), port, family))
    if not listeners:
        fix = "give all nodes the address of node 0 as --master-addr, and this node its own --node-rank"
        raise UserError(f"--master-addr {address} is not an address of this machine, which is node 0", fix)
    return listeners


def is_loopback(address: str) -> bool:
    """Whether `address` is written as one that never leaves this machine: 127.0.0.1, ::1, localhost."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address.partition(".")[0] == "localhost"


def wait_for_proxy(
    address: str, port: int, seconds: float, secret: Secret, node: int
) -> tuple[socket.AddressFamily, Any]:
    """Waits until node 0's proxy admits this node; returns the family and the socket address that led to it.

    Raises:
        UserError: not within `seconds`: nothing answers, or another program, or the secrets differ.
    """

    def attempt(seconds_left: float) -> tuple[socket.AddressFamily, Any]:
        return try_handshake(address, port, secret.key, node, max(0.5, min(5.0, seconds_left)))

    return _retry(attempt, address, port, seconds, f"node {node}")


def connect_store(address: str, port: int, seconds: float, *, client: str, probe_port: bool = True) -> TCPStore:
    """Connects to the store on node 0, waiting until it listens there.

    Args:
        address, port: of the store.
        seconds: within which it must answer.
        client: name of this process, for the error.
        probe_port: first checks that the port is open, because torch's own error does not say why it is not.

    Raises:
        UserError: nothing answers within `seconds`, or it is no store; the text has the operating system's reason.
    """
    timeout = timedelta(seconds=seconds)

    def attempt(seconds_left: float) -> TCPStore:
        if probe_port:
            socket.create_connection((address, port), timeout=max(0.5, min(5.0, seconds_left))).close()
        store = call_with_timeout(
            seconds_left, lambda: TCPStore(address, port, wait_for_workers=False, timeout=timeout)
        )
        if store is None:
            raise HandshakeFailed(NOT_ARRIERO, UNREACHABLE_FIX)
        return store

    return _retry(attempt, address, port, seconds, client)


def _retry(attempt: Callable[[float], T], address: str, port: int, seconds: float, client: str) -> T:
    """Calls `attempt(seconds_left)` until it returns. Raises UserError with the last failure after `seconds`."""
    deadline, problem, fix = time.monotonic() + seconds, "", UNREACHABLE_FIX
    while (left := deadline - time.monotonic()) > 0:
        try:
            return attempt(left)
        except (HandshakeFailed, SecretMissing) as error:
            problem, fix = error.problem, error.fix
        except (OSError, UnicodeError, RuntimeError) as error:
            problem, fix = getattr(error, "strerror", "") or str(error).partition("\n")[0], UNREACHABLE_FIX
        time.sleep(RETRY_INTERVAL)
    where = f"{client} ({socket.gethostname()})"
    raise UserError(f"{where} cannot reach node 0 at {address}:{port} in {seconds:g} s: {problem}", fix)


_blocked_threads: list[threading.Thread] = []


def call_with_timeout(seconds: float, function: Callable[[], T]) -> T | None:
    """What `function()` returns or raises, or None when it has done neither in `seconds`.

    Its thread then stays blocked in a call to the store, until the store's process on this machine ends.
    """
    results: list[T] = []
    errors: list[Exception] = []

    def call() -> None:
        try:
            results.append(function())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=call, daemon=True, name="call_with_timeout")
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        _blocked_threads.append(thread)
    if errors:
        raise errors[0]
    return results[0] if results else None


def _kill(process: int) -> None:
    """Kills the store's process and joins the threads that it blocks: one that woke at exit would abort Python."""
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    while _blocked_threads:
        _blocked_threads.pop().join(5)
