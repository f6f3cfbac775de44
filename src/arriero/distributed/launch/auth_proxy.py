"""The authenticating proxy of the store, for a run on several machines: a client first proves that it has the secret.

torch's store authenticates nobody, so it listens on the loopback of node 0 alone, and this proxy listens on the
network. On each other machine a forwarder listens on the loopback, where the processes find it in the store's place.
For each connection, forwarder and proxy prove to each other that they have the secret; then bytes are relayed.

    proxy -> forwarder   GREETING, nonce of 32 bytes
    forwarder -> proxy   node number, 4 bytes; nonce of 32 bytes; HMAC-SHA256 of (forwarder, node, both nonces)
    proxy -> forwarder   HMAC-SHA256 of (proxy, node, both nonces)

The secret itself is never sent. A proof is valid for one connection, since both sides choose a fresh nonce, and for one
role, so that it cannot be sent back. What follows it is neither encrypted nor authenticated: docs/security.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import os
import socket
import struct
from collections.abc import Awaitable, Callable
from typing import Any

from arriero.common.errors import UserError
from arriero.distributed.launch.secret import SECRET_FIX

GREETING = b"arriero proxy 1\n"
NONCE, PROOF = 32, 32
ANSWER = 4 + NONCE + PROOF
HANDSHAKE_SECONDS = 5.0
"""Within which a connection must have completed the handshake."""
MAX_PENDING = 256
"""Connections that may be in the handshake; one more closes the oldest."""
CHUNK = 1 << 16
LOOPBACK = "127.0.0.1"
NOT_ARRIERO = "what answers there is not a run of arriero"
UNREACHABLE_FIX = "start node 0 there, or correct --master-addr and --master-port; --join-timeout waits longer"

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
KeyReader = Callable[[], bytes]
ConnectionHandler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class HandshakeFailed(UserError):  # noqa: N818 - a kind of UserError
    """The other side is not the proxy of this run, or does not have the secret; a later try may succeed."""


def compute_proof(key: bytes, role: bytes, node: int, server_nonce: bytes, nonce: bytes) -> bytes:
    """The proof that `role` has the secret, valid on the one connection that has these nonces."""
    return hmac.digest(key, GREETING + role + struct.pack(">I", node) + server_nonce + nonce, "sha256")


async def client_handshake(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, secret: KeyReader, node: int
) -> None:
    """The forwarder's side of the handshake.

    Raises:
        HandshakeFailed: no proxy answers, or it has another secret.
        UserError: the secret cannot be read; what answers is a proxy.
    """
    try:
        greeting = await reader.readexactly(len(GREETING) + NONCE)
    except asyncio.IncompleteReadError as error:
        if error.partial.startswith(GREETING[: len(error.partial)]):
            raise ConnectionResetError("closed at once") from None
        greeting = error.partial
    if not greeting.startswith(GREETING):
        raise HandshakeFailed(NOT_ARRIERO, UNREACHABLE_FIX)
    server_nonce, nonce, key = greeting[len(GREETING) :], os.urandom(NONCE), secret()
    writer.write(struct.pack(">I", node) + nonce + compute_proof(key, b"forwarder", node, server_nonce, nonce))
    try:
        proof = await reader.readexactly(PROOF)
    except (asyncio.IncompleteReadError, ConnectionError):
        raise HandshakeFailed("node 0 has another secret, and refuses this one", SECRET_FIX) from None
    if not hmac.compare_digest(proof, compute_proof(key, b"proxy", node, server_nonce, nonce)):
        raise HandshakeFailed("what answers there does not know this run's secret", SECRET_FIX)


async def server_handshake(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, key: bytes) -> bool:
    """The proxy's side of the handshake; whether the client has the secret."""
    server_nonce = os.urandom(NONCE)
    writer.write(GREETING + server_nonce)
    answer = await reader.readexactly(ANSWER)
    (node,), nonce = struct.unpack_from(">I", answer), answer[4 : 4 + NONCE]
    if not hmac.compare_digest(answer[4 + NONCE :], compute_proof(key, b"forwarder", node, server_nonce, nonce)):
        return False
    writer.write(compute_proof(key, b"proxy", node, server_nonce, nonce))
    return True


async def connect(link: socket.socket, secret: KeyReader, node: int, seconds: float = HANDSHAKE_SECONDS) -> Streams:
    """Completes the handshake with the proxy that `link` leads to; returns the streams of the connection.

    Raises:
        OSError: the connection has ended.
        HandshakeFailed: no proxy of this run answers.
        UserError: the secret cannot be read.
    """
    reader, writer = await asyncio.open_connection(sock=link, limit=CHUNK)
    try:
        async with asyncio.timeout(seconds):
            await client_handshake(reader, writer, secret, node)
    except TimeoutError:
        writer.transport.abort()
        raise HandshakeFailed(NOT_ARRIERO, UNREACHABLE_FIX) from None
    except BaseException:
        writer.transport.abort()
        raise
    return reader, writer


def try_handshake(
    address: str, port: int, secret: KeyReader, node: int, seconds: float = HANDSHAKE_SECONDS
) -> tuple[socket.AddressFamily, Any]:
    """Connects once; returns the family and the socket address that led to the proxy. Raises as `connect` does."""

    async def once() -> None:
        _, writer = await connect(link, secret, node, seconds)
        writer.close()

    with socket.create_connection((address, port), timeout=seconds) as link:
        found = (socket.AddressFamily(link.family), link.getpeername())
        link.setblocking(False)
        asyncio.run(once())
    return found


class AuthProxy:
    """Relays the connections of clients that have the secret to the store on this machine's loopback."""

    def __init__(self, key: bytes, store_port: int) -> None:
        self.key, self.store_port = key, store_port
        self._pending: dict[asyncio.StreamWriter, None] = {}  # in order of arrival

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Handles one connection, from its arrival to its end."""
        if len(self._pending) >= MAX_PENDING:
            next(iter(self._pending)).transport.abort()
        self._pending[writer] = None
        try:
            async with asyncio.timeout(HANDSHAKE_SECONDS):
                admitted = await server_handshake(reader, writer, self.key)
            self._pending.pop(writer, None)
            if admitted:
                store = await asyncio.open_connection(LOOPBACK, self.store_port, limit=CHUNK)
                return await relay((reader, writer), store)
        except (OSError, EOFError, asyncio.CancelledError):  # timed out, closed, or dropped as the oldest
            pass
        self._pending.pop(writer, None)
        writer.transport.abort()


class Forwarder:
    """Relays connections from another machine's loopback to the proxy."""

    def __init__(self, proxy: tuple[socket.AddressFamily, Any], secret: KeyReader, node: int) -> None:
        self.proxy, self.secret, self.node = proxy, secret, node

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Handles one connection of a process of this machine."""
        try:
            family, address = self.proxy
            link = socket.socket(family, socket.SOCK_STREAM)
            link.setblocking(False)
            async with asyncio.timeout(HANDSHAKE_SECONDS):
                await asyncio.get_running_loop().sock_connect(link, address)
            return await relay((reader, writer), await connect(link, self.secret, self.node))
        except (OSError, EOFError, UserError, asyncio.CancelledError):
            writer.transport.abort()


async def relay(one: Streams, other: Streams) -> None:
    """Copies bytes both ways until either side closes; then closes both."""

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(CHUNK):
                writer.write(data)
                await writer.drain()

    for _, writer in (one, other):
        link = writer.get_extra_info("socket")
        link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    tasks = [asyncio.ensure_future(copy(one[0], other[1])), asyncio.ensure_future(copy(other[0], one[1]))]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        for _, writer in (one, other):
            writer.close()  # after the buffer is sent


def serve(handle: ConnectionHandler, listeners: list[socket.socket]) -> None:
    """Calls `handle` for every connection; never returns."""

    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # invalid data from outside is not worth a log line

    async def forever() -> None:
        servers = [await asyncio.start_server(handle, sock=one, limit=CHUNK, backlog=512) for one in listeners]
        await asyncio.gather(*(server.serve_forever() for server in servers))

    asyncio.run(forever())
