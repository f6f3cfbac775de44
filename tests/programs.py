"""Runs `arriero` and other programs as a user does: in processes of their own."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

import fork_server

ARRIERO = (sys.executable, "-m", "arriero")
IMPORTS = os.environ.get("PYTHONPATH")
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


def clean_environment(**changes: str) -> dict[str, str]:
    """This process's environment, without the variables that make a program one of several."""
    return {k: v for k, v in os.environ.items() if k not in RANK_VARIABLES} | changes


@functools.cache
def fork_server_socket() -> str:
    """The socket of this test session's fork server, which is started when it is first needed."""
    directory = Path(tempfile.mkdtemp(prefix="arriero-fork-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    path = directory / "socket"
    server = subprocess.Popen([sys.executable, fork_server.__file__, path], stdin=subprocess.DEVNULL)
    atexit.register(server.wait)
    atexit.register(server.kill)
    while not path.exists():
        assert server.poll() is None, "the fork server does not start"
        time.sleep(0.02)
    return str(path)


def arriero(*words: object, code: int = 0, cwd: Path | None = None) -> str:
    """Runs a command line in a process of its own; asserts its exit code, returns what it printed on either stream.

    The process comes from the fork server, or is a new interpreter where a test has changed what can be imported.

    Args:
        words: the verb and what follows it.
        code: the exit code that it must have.
        cwd: its working directory.
    """
    environment = clean_environment()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, open(os.devnull) as nothing:
        if environment.get("PYTHONPATH") == IMPORTS:
            ended = fork_server.request(
                fork_server_socket(), list(map(str, words)), cwd=str(cwd or Path.cwd()), environment=environment,
                streams=(nothing.fileno(), out.fileno(), err.fileno()),
            )  # fmt: skip
        else:
            command = [*ARRIERO, *map(str, words)]
            ended = subprocess.run(
                command, stdin=nothing, stdout=out, stderr=err, cwd=cwd, env=environment, timeout=1800, check=False
            ).returncode
        printed = content(out) + content(err)
    assert ended == code, f"exit {ended} instead of {code}:\n{printed}"
    return printed


def content(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace").replace("\r\n", "\n")


def free_port() -> int:
    """A TCP port that no process of this machine listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
