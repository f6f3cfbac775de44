"""What another host on the network can do to a run.

Nothing of one machine listens outside, the machines of several prove a shared secret, no pickle is read, and garbage on
an open port changes nothing.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed import distributed_c10d

import toy
from arriero.common.errors import UserError
from arriero.distributed.launch import auth_proxy, store
from arriero.distributed.launch.auth_proxy import (
    ANSWER,
    GREETING,
    NONCE,
    PROOF,
    AuthProxy,
    Forwarder,
    HandshakeFailed,
    compute_proof,
    serve,
    try_handshake,
)
from arriero.distributed.launch.pickle_guard import PICKLE_FUNCTIONS, PickledObject, refuse_pickled_objects
from arriero.distributed.launch.rendezvous import FixedRankRendezvous
from arriero.distributed.launch.secret import Secret
from arriero.distributed.parallel.config import ParallelConfig
from arriero.distributed.parallel.pipeline import stage_shapes
from programs import ARRIERO, free_port

pytestmark = pytest.mark.slow

KEY, OTHER = b"a secret of thirty-two bytes....", b"another secret of 32 bytes......"
REPLY = b"what the store answers"


def listen() -> socket.socket:
    return socket.create_server(("127.0.0.1", 0))


def port_of(listening: socket.socket) -> int:
    return int(listening.getsockname()[1])


def in_thread(handle: auth_proxy.ConnectionHandler, listening: socket.socket) -> int:
    threading.Thread(target=serve, args=(handle, [listening]), daemon=True).start()
    return port_of(listening)


@pytest.fixture
def seen() -> list[bytes]:
    """What has reached the store."""
    return []


@pytest.fixture
def proxy_port(seen: list[bytes]) -> int:
    """A proxy before a replacement of the store, which answers the first bytes of each connection."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await reader.read(100))
        writer.write(REPLY)
        await reader.read()
        writer.close()

    return in_thread(AuthProxy(KEY, in_thread(answer, listen())).handle, listen())


def visit(port: int) -> tuple[socket.socket, bytes]:
    """A connection to the proxy, and its nonce."""
    link = socket.create_connection(("127.0.0.1", port), timeout=20)
    greeting = link.recv(len(GREETING) + NONCE, socket.MSG_WAITALL)
    assert greeting.startswith(GREETING)
    return link, greeting[len(GREETING) :]


def answer(key: bytes, server_nonce: bytes, *, role: bytes = b"forwarder", node: int = 1, signed: int = 1) -> bytes:
    nonce = bytes(NONCE)
    return struct.pack(">I", node) + nonce + compute_proof(key, role, signed, server_nonce, nonce)


def is_closed(link: socket.socket) -> bool:
    try:
        return link.recv(1000) == b""
    except ConnectionError:
        return True


def test_a_client_with_the_secret_reaches_the_store(proxy_port: int, seen: list[bytes]) -> None:
    link, server_nonce = visit(proxy_port)
    link.sendall(answer(KEY, server_nonce) + b"at once")
    assert link.recv(PROOF, socket.MSG_WAITALL) == compute_proof(KEY, b"proxy", 1, server_nonce, bytes(NONCE))
    assert link.recv(len(REPLY), socket.MSG_WAITALL) == REPLY
    assert seen == [b"at once"]


def test_a_forwarder_relays_what_a_process_sends(proxy_port: int, seen: list[bytes]) -> None:
    found = try_handshake("127.0.0.1", proxy_port, lambda: KEY, 1)
    port = in_thread(Forwarder(found, lambda: KEY, 1).handle, listen())
    link = socket.create_connection(("127.0.0.1", port), timeout=20)
    link.sendall(b"a query")
    assert link.recv(len(REPLY), socket.MSG_WAITALL) == REPLY
    assert seen[-1] == b"a query"
    port = in_thread(Forwarder(found, lambda: OTHER, 1).handle, listen())
    link = socket.create_connection(("127.0.0.1", port), timeout=20)
    link.sendall(b"a query")
    assert is_closed(link)
    assert seen[-1] == b"a query"


FORGERIES: dict[str, Callable[[bytes], bytes]] = {
    "another secret": lambda nonce: answer(OTHER, nonce),
    "an empty secret": lambda nonce: answer(b"", nonce),
    "the proxy's own role": lambda nonce: answer(KEY, nonce, role=b"proxy"),
    "signed for another node": lambda nonce: answer(KEY, nonce, node=2),
    "an answer of another connection": lambda nonce: answer(KEY, os.urandom(NONCE)),
    "zeros": lambda nonce: bytes(ANSWER),
    "the proxy's greeting": lambda nonce: (GREETING + nonce + bytes(ANSWER))[:ANSWER],
    "a web browser": lambda nonce: b"GET / HTTP/1.1\r\nHost: arriero\r\nAccept: */*\r\nUser-Agent: curl\r\n\r\n",
    "nothing": lambda nonce: b"",
    "a part": lambda nonce: answer(KEY, nonce)[:-1],
    "much": lambda nonce: bytes(1 << 20),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_client_without_the_secret_is_rejected(proxy_port: int, seen: list[bytes], forgery: str) -> None:
    link, server_nonce = visit(proxy_port)
    try:
        link.sendall(FORGERIES[forgery](server_nonce))
        link.sendall(b"set a key of the store")
    except ConnectionError:
        return
    assert is_closed(link)
    assert seen == []


@given(st.binary(max_size=200))
def test_no_bytes_but_the_proof_complete_the_handshake(message: bytes) -> None:
    async def admitted() -> bool:
        here, there = socket.socketpair()
        reader, writer = await asyncio.open_connection(sock=here)
        there.sendall(message)
        there.shutdown(socket.SHUT_WR)
        try:
            return await auth_proxy.server_handshake(reader, writer, KEY)
        except asyncio.IncompleteReadError:
            return False
        finally:
            writer.close()
            there.close()

    assert not asyncio.run(admitted())


def test_many_silent_connections_do_not_block_a_client(proxy_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth_proxy, "MAX_PENDING", 8)
    monkeypatch.setattr(auth_proxy, "HANDSHAKE_SECONDS", 1000.0)
    silent = [socket.create_connection(("127.0.0.1", proxy_port), timeout=20) for _ in range(50)]
    try_handshake("127.0.0.1", proxy_port, lambda: KEY, 1, 20)
    link, _ = visit(proxy_port)
    assert is_closed_in_time(silent[0])
    link.close()


def is_closed_in_time(link: socket.socket) -> bool:
    link.settimeout(20)
    while link.recv(1000):  # its greeting comes first
        pass
    return True


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"SSH-2.0-OpenSSH_9.2\r\n" + bytes(100), "not a run of arriero"),
        (GREETING + bytes(NONCE) + bytes(PROOF), "does not know this run's secret"),
        (GREETING + bytes(NONCE), "node 0 has another secret"),
    ],
)
def test_node_0_must_prove_the_secret_too(data: bytes, message: str) -> None:
    with listen() as false:

        def play() -> None:
            link, _ = false.accept()
            link.sendall(data)
            link.settimeout(20)
            link.recv(ANSWER, socket.MSG_WAITALL)
            link.close()

        threading.Thread(target=play, daemon=True).start()
        with pytest.raises(HandshakeFailed, match=message):
            try_handshake("127.0.0.1", port_of(false), lambda: KEY, 1, 20)


def test_the_secret_is_never_sent(proxy_port: int) -> None:
    with listen() as eavesdropper:
        recorded: list[bytes] = []

        def relay() -> None:
            link, _ = eavesdropper.accept()
            to_proxy, _ = socket.create_connection(("127.0.0.1", proxy_port), timeout=20), recorded.clear()
            for source, target, count in (
                (to_proxy, link, len(GREETING) + NONCE), (link, to_proxy, ANSWER), (to_proxy, link, PROOF),
            ):  # fmt: skip
                recorded.append(source.recv(count, socket.MSG_WAITALL))
                target.sendall(recorded[-1])

        threading.Thread(target=relay, daemon=True).start()
        try_handshake("127.0.0.1", port_of(eavesdropper), lambda: KEY, 1, 20)
        assert len(recorded) == 3
        assert not any(KEY[i : i + 8] in b"".join(recorded) for i in range(len(KEY) - 8))


def test_a_secret_is_found_in_the_order_of_the_docs(tmp_path: Path) -> None:
    file = tmp_path / "named"
    file.write_text("  from the file, sixteen\n")
    file.chmod(0o600)
    environment = {"ARRIERO_SECRET": "from the environment"}
    assert Secret.find(str(file), environment, tmp_path / "run").key() == b"from the file, sixteen"
    assert Secret.find("", environment, tmp_path / "run").key() == b"from the environment"
    made = Secret.find("", {"ARRIERO_SECRET": ""}, tmp_path / "deep" / "run")
    made.create()
    first = made.key()
    assert (tmp_path / "deep" / ".run.secret").stat().st_mode & 0o777 == 0o600
    made.create()
    assert len(first) == 64
    assert made.key() != first  # a secret that is left over is not valid
    made.remove()
    assert list((tmp_path / "deep").iterdir()) == []


@pytest.mark.parametrize(
    ("text", "mode", "message"),
    [
        (None, 0, "is not on this machine"),
        ("short", 0o600, "has 5 bytes, not 16 to 4096"),
        ("x" * 5000, 0o600, "has 4097 bytes"),
        ("x" * 32, 0o644, "others can read or change the secret .* .mode 644"),
        ("x" * 32, 0o620, "others can read or change"),
    ],
)
def test_an_unusable_secret_is_an_error(tmp_path: Path, text: str | None, mode: int, message: str) -> None:
    file = tmp_path / "secret"
    if text is not None:
        file.write_text(text)
        file.chmod(mode)
    with pytest.raises(UserError, match=message):
        Secret(file=file).key()


def test_a_managed_secret_that_is_a_link_or_of_another_user_is_rejected(tmp_path: Path) -> None:
    secret = Secret.find("", {}, tmp_path / "run")
    assert secret.file is not None
    (tmp_path / "known").write_text("known to another user")
    (tmp_path / "known").chmod(0o600)
    secret.file.symlink_to(tmp_path / "known")
    with pytest.raises(UserError, match="symbolic link"):
        secret.key()
    secret.create()  # node 0 replaces the link, and leaves its target
    assert secret.key() != (tmp_path / "known").read_bytes() == b"known to another user"
    secret.file.chmod(0o640)
    with pytest.raises(UserError, match="not this user's alone"):
        secret.key()


@pytest.fixture
def refusing() -> Iterator[None]:
    before = {name: getattr(distributed_c10d, name) for name in PICKLE_FUNCTIONS}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    refuse_pickled_objects()
    yield
    dist.destroy_process_group()
    for name, value in before.items():
        setattr(distributed_c10d, name, value)


def test_torch_can_neither_pickle_nor_unpickle_an_object(refusing: None) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: dist.broadcast_object_list([{}], src=0),
        lambda: dist.all_gather_object([None], {}),
        lambda: dist.gather_object({}, [None]),
        lambda: dist.scatter_object_list([None], [{}], src=0),
        lambda: distributed_c10d._tensor_to_object(torch.zeros(10, dtype=torch.uint8), 10, None),
    ]
    for call in calls:
        with pytest.raises(PickledObject):
            call()


@pytest.mark.parametrize(
    ("config", "takes", "gives"),
    [
        (ParallelConfig(pipeline_parallel=2), (4, 32), (4, 32, 8)),
        (ParallelConfig(pipeline_parallel=2, context_parallel=2), (4, 16), (4, 16, 8)),
        (ParallelConfig(pipeline_parallel=2, tensor_parallel=2), (4, 32), (4, 32, 8)),
        (
            ParallelConfig(pipeline_parallel=2, context_parallel=2, tensor_parallel=2, sequence_parallel=True),
            (4, 16), (4, 8, 8),
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_shapes_of_stages(config: ParallelConfig, takes: Any, gives: Any, dtype: torch.dtype) -> None:
    first, last = (stage_shapes(i, config, rows=4, length=32, width=8, compute=dtype) for i in (0, 1))
    assert (first[0].shape, first[0].dtype) == (takes, torch.int64)
    assert (first[1].shape, first[1].dtype) == (last[0].shape, last[0].dtype) == (gives, dtype)
    assert (last[1].shape, last[1].dtype) == ((1,), torch.float64 if dtype == torch.float64 else torch.float32)


def secret_of(key: bytes) -> Secret:
    return Secret(text=key.decode())


def test_a_forged_node_does_not_join(monkeypatch: pytest.MonkeyPatch) -> None:
    """An attack that once succeeded: a stranger impersonates node 1, and node 0 reads what it stores."""
    monkeypatch.setattr(store, "RETRY_INTERVAL", 0.05)
    with listen() as probe:
        port = port_of(probe)
    place = {"nodes": 2, "address": "127.0.0.1", "port": port, "processes": 1, "restarts": 0}
    node_0 = FixedRankRendezvous(node_rank=0, join_seconds=600, secret=secret_of(KEY), **place)
    try:
        with pytest.raises(UserError, match="node 0 has another secret"):
            FixedRankRendezvous(node_rank=1, join_seconds=1, secret=secret_of(OTHER), **place)
        with pytest.raises(RuntimeError):  # a client of torch's own store
            dist.TCPStore("127.0.0.1", port, wait_for_workers=False, timeout=timedelta(seconds=1))
        assert not node_0.store.check(["0/node-1"])
        with ThreadPoolExecutor() as pool:
            both = [node_0, FixedRankRendezvous(node_rank=1, join_seconds=600, secret=secret_of(KEY), **place)]
            assert [a.result(900).world_size for a in [pool.submit(m.next_rendezvous) for m in both]] == [2, 2]
    finally:
        node_0.close()


@pytest.mark.parametrize(
    ("address", "expected"), [("127.0.0.1", {"127.0.0.1"}), ("localhost", {"127.0.0.1"}), ("debian", {"0.0.0.0"})]
)
def test_where_the_proxy_listens(monkeypatch: pytest.MonkeyPatch, address: str, expected: set[str]) -> None:
    whole = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: whole)
    gates = store._listen_at(address, 0)
    assert {one.getsockname()[0] for one in gates} == expected
    for one in gates:
        one.close()


def listening_of(process: psutil.Process) -> set[tuple[str, int]]:
    """Addresses at which a process and those that it has started listen."""
    found = set()
    for one in (process, *process.children(recursive=True)):
        try:
            connections = one.net_connections("tcp")
        except psutil.Error:
            continue
        found |= {(c.laddr.ip, c.laddr.port) for c in connections if c.status == psutil.CONN_LISTEN}
    return found


GARBAGE = (
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"", b"\0", b"\xff" * 8, b"\xff" * 5000, bytes.fromhex("00ce f785 3c"),
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"x" * 400, random.Random(0).randbytes(100_000),
)  # fmt: skip
"""HTTP, TLS, the first bytes of torch's store, random bytes, and nothing at all."""


def disturb(ports: set[tuple[str, int]], kept: list[socket.socket]) -> int:
    """Sends garbage to all of them; half of the connections stay open."""
    sent = 0
    for where in ports:
        for data in GARBAGE:
            try:
                link = socket.create_connection(where, timeout=2)
                link.sendall(data)
            except OSError:
                continue
            sent += 1
            if sent % 2 and len(kept) < 400:
                kept.append(link)
            else:
                link.close()
    return sent


def losses(run: Path) -> list[float]:
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [record["lm_loss"] for record in records if record["kind"] == "step"]


def start_node(recipe: Path, *words: object) -> subprocess.Popen[str]:
    command = [*ARRIERO, "pretrain", recipe, "--train.steps", 12, *words]
    return subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run_disturbed(nodes: list[subprocess.Popen[str]]) -> tuple[set[tuple[str, int]], int]:
    """Sends garbage to every port of the nodes from when it opens until they end; which they were, and how often."""
    seen: set[tuple[str, int]] = set()
    kept: list[socket.socket] = []
    sent = 0
    try:
        for node in nodes:
            while node.poll() is None:
                ports = set().union(*(listening_of(psutil.Process(n.pid)) for n in nodes if n.poll() is None))
                sent += disturb(ports, kept)
                seen |= ports
                time.sleep(0.2)
        for node in nodes:
            message, _ = node.communicate(timeout=900)
            assert node.returncode == 0, message
    finally:
        for node in nodes:
            node.kill()
        for link in kept:
            link.close()
    return seen, sent


@pytest.mark.timeout(900)
def test_garbage_on_every_port_changes_nothing(tmp_path: Path) -> None:
    recipe = toy.write_recipe(tmp_path)
    alone, sent = run_disturbed([start_node(recipe, "--out", tmp_path / "one", "--nproc-per-node", 2)])
    assert {address for address, _ in alone} == {"127.0.0.1"}  # nothing of a run on one machine listens outside
    assert len(alone) > 2  # the store and each process's gloo
    assert sent > 0
    port = free_port()
    both = ["--nodes", 2, "--master-addr", "127.0.0.1", "--master-port", port, "--nproc-per-node", 1]
    both += ["--out", tmp_path / "two"]
    several, _ = run_disturbed([start_node(recipe, *both, "--node-rank", k) for k in range(2)])
    assert ("127.0.0.1", port) in several
    assert losses(tmp_path / "one") == losses(tmp_path / "two")
    assert len(losses(tmp_path / "one")) == 12
    assert not list(tmp_path.glob(".*.secret"))
