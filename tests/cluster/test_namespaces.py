"""Four machines with addresses of their own, as network namespaces of this one, joined by a bridge."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from programs import arriero
from toy import write_recipe

pytestmark = pytest.mark.slow

NODES = 4
ADDRESS = "10.77.0.{}"


def ip(*words: str, check: bool = True) -> None:
    subprocess.run(["ip", *words], check=check, capture_output=not check)


def take_down() -> None:
    for k in range(NODES):
        ip("link", "del", f"arriero-v{k}", check=False)
        shown = subprocess.run(["ip", "netns", "pids", f"arriero{k}"], capture_output=True, text=True, check=False)
        for process in shown.stdout.split():  # a namespace lives as long as a process in it
            os.kill(int(process), signal.SIGKILL)
        ip("netns", "del", f"arriero{k}", check=False)
    ip("link", "del", "arriero-br", check=False)


@pytest.fixture
def machines() -> Iterator[None]:
    take_down()
    ip("link", "add", "arriero-br", "type", "bridge")
    ip("link", "set", "arriero-br", "up")
    for k in range(NODES):
        ip("netns", "add", f"arriero{k}")
        ip("link", "add", f"arriero-v{k}", "type", "veth", "peer", "name", "eth0", "netns", f"arriero{k}")
        ip("link", "set", f"arriero-v{k}", "master", "arriero-br", "up")
        ip("-n", f"arriero{k}", "addr", "add", ADDRESS.format(k + 1) + "/24", "dev", "eth0")
        ip("-n", f"arriero{k}", "link", "set", "eth0", "up")
        ip("-n", f"arriero{k}", "link", "set", "lo", "up")
    yield
    take_down()


def start(node: int, recipe: Path, *words: object) -> subprocess.Popen[str]:
    command = ["ip", "netns", "exec", f"arriero{node}", sys.executable, "-m", "arriero", "pretrain", str(recipe)]
    command += ["--nproc-per-node", "1", *map(str, words)]
    seed = {"MASTER_ADDR": ADDRESS.format(1), "MASTER_PORT": "6000", "NNODES": str(NODES), "NODE_RANK": str(node)}
    seed["ARRIERO_THREADS"] = "1"  # these machines share their cores
    return subprocess.Popen(command, env=os.environ | seed, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def losses(run: Path) -> list[float]:
    return [json.loads(line)["lm_loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_four_machines_train_the_run_of_one(machines: None, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    nodes = [start(k, recipe) for k in range(NODES)]
    said = [node.communicate(timeout=200)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0] * NODES, said
    arriero("pretrain", recipe, "--out", tmp_path / "one", "--nproc-per-node", NODES)
    assert losses(tmp_path / "run") == losses(tmp_path / "one")


def test_a_machine_that_is_cut_off_ends_the_job_by_name(machines: None, tmp_path: Path) -> None:
    nodes = [start(k, write_recipe(tmp_path), "--train.steps", 100000, "--checkpoint.every", 0) for k in range(NODES)]
    assert nodes[0].stdout is not None
    for line in nodes[0].stdout:
        if "iteration        3/" in line:
            break
    ip("link", "set", "arriero-v3", "down")
    said = [node.communicate(timeout=100)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [1] * NODES, said
    for text in said[:3]:
        assert re.search(r"node 3 \(.*\) sent no heartbeat for 15 s", text), text
    assert "which holds the store, is gone or cut off" in said[3], said[3]


def test_an_address_that_no_machine_has(machines: None, tmp_path: Path) -> None:
    node = start(1, write_recipe(tmp_path), "--master-addr", ADDRESS.format(99), "--join-timeout", 5)
    said, _ = node.communicate(timeout=60)
    assert node.returncode == 2
    assert f"cannot reach node 0 at {ADDRESS.format(99)}:6000 in 5 s" in said
