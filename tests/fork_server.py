"""Runs `arriero` command lines in processes forked from one that has imported torch and all of the package.

Importing them costs 3 to 5 CPU seconds a process; a fork costs milliseconds. A forked process has the client's
arguments, working directory, environment, standard streams and exit code, and ends as an interpreter does.

What it does not prove: that the installed script starts, that a module is imported where it is needed, and the effect
of variables that torch reads when it is imported. Signals are not passed on; if a client ends early, its command is
killed.

    python fork_server.py SOCKET                  the server; it ends with the process that started it
    python -IS fork_server.py SOCKET WORD ...     a client, for the shell: `arriero WORD ...`
"""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import struct
import sys
from typing import Any

SIZE = struct.Struct("!I")


def request(
    path: str, words: list[str], *, cwd: str, environment: dict[str, str], streams: tuple[int, int, int] = (0, 1, 2)
) -> int:
    """Runs a command line in a process that the server forks; returns its exit code, negative for a signal."""
    body = json.dumps({"words": words, "cwd": cwd, "environment": environment}).encode()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        socket.send_fds(connection, [SIZE.pack(len(body))], list(streams))
        connection.sendall(body)
        answer = connection.recv(SIZE.size, socket.MSG_WAITALL)
    if len(answer) < SIZE.size:
        raise RuntimeError("the fork server ended before the command")
    return int.from_bytes(answer, "big", signed=True)


def next_command(listener: socket.socket) -> list[str]:
    """Serves clients for ever; returns, in each forked process, the command line that it is to run."""
    signal.signal(signal.SIGCHLD, lambda *_: wait_for_children())
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            break
        connection.close()
    die_with_parent()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    header, streams, _, _ = socket.recv_fds(connection, SIZE.size, 3)
    size = SIZE.unpack(header)[0]
    given: dict[str, Any] = json.loads(connection.recv(size, socket.MSG_WAITALL))
    child = os.fork()
    if child:
        for stream in streams:
            os.close(stream)
        serve_client(connection, child)
    connection.close()
    become(given, streams)
    return list(given["words"])


def wait_for_children() -> None:
    """Takes the exit codes of all children that have ended, so that their CPU time counts as this process's."""
    try:
        while os.waitpid(-1, os.WNOHANG) != (0, 0):
            pass
    except ChildProcessError:
        pass


def serve_client(connection: socket.socket, child: int) -> None:
    """Sends the child's exit code when it ends, and kills it when the client closes its end. Ends the process."""
    import select

    handle = os.pidfd_open(child)
    ready, _, _ = select.select([handle, connection], [], [])
    if handle not in ready:
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        connection.sendall(code.to_bytes(SIZE.size, "big", signed=True))
    finally:
        os._exit(0)


def become(given: dict[str, Any], streams: list[int]) -> None:
    """Gives this process what a client's own process would have."""
    import tempfile

    die_with_parent()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(given["cwd"])
    os.environ.clear()
    os.environ.update(given["environment"])
    tempfile.tempdir = None
    old = sys.stdin, sys.stdout, sys.stderr
    for number, (name, mode) in enumerate((("stdin", "rb"), ("stdout", "wb"), ("stderr", "wb"))):
        raw = os.fdopen(number, mode, closefd=False)
        coding = {"encoding": old[number].encoding, "errors": old[number].errors}
        setattr(sys, name, io.TextIOWrapper(raw, **coding, line_buffering=name == "stderr"))
    sys.argv = ["arriero", *given["words"]]


def die_with_parent() -> None:
    """Has the kernel end this process when the one that forked it ends."""
    import ctypes

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def serve(path: str) -> None:
    die_with_parent()
    import importlib
    import pkgutil

    import arriero
    from arriero.cli.main import main

    for module in pkgutil.walk_packages(arriero.__path__, "arriero."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, f"a fork would lose {len(threads) - 1} threads"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        words = next_command(listener)
    main(words)


if __name__ == "__main__":
    if len(sys.argv) == 2:
        serve(sys.argv[1])
    else:
        ended = request(sys.argv[1], sys.argv[2:], cwd=os.getcwd(), environment=dict(os.environ))
        if ended < 0:
            os.kill(os.getpid(), -ended)
        sys.exit(ended)
