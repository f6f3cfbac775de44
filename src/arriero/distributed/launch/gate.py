"""The gate before the store of a run on several machines: whoever connects proves first that it knows the secret.

torch's store asks nobody for anything, so it listens on the loopback of node 0 alone. What listens on the network is
the gate. On each other machine a forwarder listens on the loopback, where the processes find it in the store's place;
it proves the secret to the gate for each connection, has the gate prove it too, and then passes bytes on.

    gate -> forwarder   GREETING, nonce of 32 bytes
    forwarder -> gate   node number, 4 bytes; nonce of 32 bytes; HMAC-SHA256 of (forwarder, node, both nonces)
    gate -> forwarder   HMAC-SHA256 of (gate, node, both nonces)

The secret itself never travels. A proof holds for one connection, since both sides choose a nonce anew, and for one
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

GREETING = b"arriero gate 1\n"
NONCE, PROOF = 32, 32
ANSWER = 4 + NONCE + PROOF
HANDSHAKE_SECONDS = 5.0
"""In which a connection must have proved the secret."""
PENDING = 256
"""Connections that may be about to prove it; one more ends the oldest."""
CHUNK = 1 << 16
LOOPBACK = "127.0.0.1"
NOT_A_RUN = "what answers there is not a run of arriero"

Ends = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Key = Callable[[], bytes]
Taker = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Refused(Exception):  # noqa: N818 - what happened
    """The other side is no gate of this run, or does not know the secret; the text says which."""


def prove(key: bytes, role: bytes, node: int, gate_nonce: bytes, nonce: bytes) -> bytes:
    """What shows that `role` knows the secret, on the one connection that has these nonces."""
    return hmac.digest(key, GREETING + role + struct.pack(">I", node) + gate_nonce + nonce, "sha256")


async def enter(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, secret: Key, node: int) -> None:
    """The forwarder's side of the handshake.

    Raises:
        Refused: no gate is there, or it has another secret.
        UserError: the secret cannot be read; what answers is a gate.
    """
    try:
        greeting = await reader.readexactly(len(GREETING) + NONCE)
    except asyncio.IncompleteReadError as error:
        if error.partial.startswith(GREETING[: len(error.partial)]):
            raise ConnectionResetError("closed at once") from None
        greeting = error.partial
    if not greeting.startswith(GREETING):
        raise Refused(NOT_A_RUN)
    gate_nonce, nonce, key = greeting[len(GREETING) :], os.urandom(NONCE), secret()
    writer.write(struct.pack(">I", node) + nonce + prove(key, b"forwarder", node, gate_nonce, nonce))
    try:
        proof = await reader.readexactly(PROOF)
    except (asyncio.IncompleteReadError, ConnectionError):
        raise Refused("node 0 has another secret, and refuses this one") from None
    if not hmac.compare_digest(proof, prove(key, b"gate", node, gate_nonce, nonce)):
        raise Refused("what answers there does not know this run's secret")


async def admit(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, key: bytes) -> bool:
    """The gate's side of the handshake; whether the other side knows the secret."""
    gate_nonce = os.urandom(NONCE)
    writer.write(GREETING + gate_nonce)
    answer = await reader.readexactly(ANSWER)
    (node,), nonce = struct.unpack_from(">I", answer), answer[4 : 4 + NONCE]
    if not hmac.compare_digest(answer[4 + NONCE :], prove(key, b"forwarder", node, gate_nonce, nonce)):
        return False
    writer.write(prove(key, b"gate", node, gate_nonce, nonce))
    return True


async def connect(link: socket.socket, secret: Key, node: int, seconds: float = HANDSHAKE_SECONDS) -> Ends:
    """Proves the secret to the gate that `link` leads to, and has it prove it; the streams of the connection.

    Raises:
        OSError: the connection has ended.
        Refused: no gate of this run is there.
        UserError: the secret cannot be read.
    """
    reader, writer = await asyncio.open_connection(sock=link, limit=CHUNK)
    try:
        async with asyncio.timeout(seconds):
            await enter(reader, writer, secret, node)
    except TimeoutError:
        writer.transport.abort()
        raise Refused(NOT_A_RUN) from None
    except BaseException:
        writer.transport.abort()
        raise
    return reader, writer


def try_gate(
    address: str, port: int, secret: Key, node: int, seconds: float = HANDSHAKE_SECONDS
) -> tuple[socket.AddressFamily, Any]:
    """Tries the gate once; returns the family and the socket address that led to it. Raises as `connect` does."""

    async def once() -> None:
        _, writer = await connect(link, secret, node, seconds)
        writer.close()

    with socket.create_connection((address, port), timeout=seconds) as link:
        found = (socket.AddressFamily(link.family), link.getpeername())
        link.setblocking(False)
        asyncio.run(once())
    return found


class Gate:
    """Lets in who proves the secret, and passes their bytes to the store on this machine's loopback."""

    def __init__(self, key: bytes, store_port: int) -> None:
        self.key, self.store_port = key, store_port
        self._pending: dict[asyncio.StreamWriter, None] = {}  # in order of arrival

    async def take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, from its arrival to its end."""
        if len(self._pending) >= PENDING:
            next(iter(self._pending)).transport.abort()
        self._pending[writer] = None
        try:
            async with asyncio.timeout(HANDSHAKE_SECONDS):
                known = await admit(reader, writer, self.key)
            self._pending.pop(writer, None)
            if known:
                store = await asyncio.open_connection(LOOPBACK, self.store_port, limit=CHUNK)
                return await relay((reader, writer), store)
        except (OSError, EOFError, asyncio.CancelledError):  # timed out, cut off, or ended to make room
            pass
        self._pending.pop(writer, None)
        writer.transport.abort()


class Forwarder:
    """Stands in for the store on another machine's loopback.

    It asks no resolver: a process that is forked in that moment would inherit the resolver's lock.
    """

    def __init__(self, gate: tuple[socket.AddressFamily, Any], secret: Key, node: int) -> None:
        self.gate, self.secret, self.node = gate, secret, node

    async def take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection of a process of this machine."""
        try:
            family, address = self.gate
            link = socket.socket(family, socket.SOCK_STREAM)
            link.setblocking(False)
            async with asyncio.timeout(HANDSHAKE_SECONDS):
                await asyncio.get_running_loop().sock_connect(link, address)
            return await relay((reader, writer), await connect(link, self.secret, self.node))
        except (OSError, EOFError, Refused, UserError, asyncio.CancelledError):
            writer.transport.abort()


async def relay(one: Ends, other: Ends) -> None:
    """Passes bytes both ways until either side ends; then ends both."""

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(CHUNK):
                writer.write(data)
                await writer.drain()

    for _, writer in (one, other):
        link = writer.get_extra_info("socket")
        link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    pumps = [asyncio.ensure_future(pump(one[0], other[1])), asyncio.ensure_future(pump(other[0], one[1]))]
    try:
        await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in pumps:
            task.cancel()
        for _, writer in (one, other):
            writer.close()  # sends what is written first


def serve(take: Taker, listening: list[socket.socket]) -> None:
    """Hands every connection to `take`, for ever."""

    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # what strangers send is no news

    async def forever() -> None:
        servers = [await asyncio.start_server(take, sock=one, limit=CHUNK, backlog=512) for one in listening]
        await asyncio.gather(*(server.serve_forever() for server in servers))

    asyncio.run(forever())
