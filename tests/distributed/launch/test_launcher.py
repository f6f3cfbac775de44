from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_variables import STEP

from arriero.cli import launch_slurm
from arriero.cli.main import dispatch
from arriero.common.errors import UserError
from arriero.common.text import format_ranks
from arriero.distributed.launch.agreement import differences
from arriero.distributed.launch.config import LaunchConfig, resolve, resolve_launch_env
from arriero.distributed.launch.rendezvous import FixedRankRendezvous
from arriero.distributed.launch.secret import Secret
from arriero.distributed.launch.store import call_with_timeout, open_store
from programs import ARRIERO, arriero, clean_environment, free_port
from toy import write_data, write_recipe

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent


def start(
    *words: object, program: Sequence[object] = ARRIERO, **environment: str
) -> subprocess.Popen[str]:  # fmt: skip
    return subprocess.Popen(
        [*map(str, program), *map(str, words)], env=clean_environment(**environment), start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


@contextmanager
def killed_at_exit(*processes: subprocess.Popen[str]) -> Iterator[None]:
    """Kills the processes and their children at the end, however the test ends."""
    try:
        yield
    finally:
        for process in processes:
            for child in [*psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else []:
                child.kill()
            process.kill()
            process.wait()


def losses(run: Path) -> list[tuple[int, float]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(r["iteration"], r["lm_loss"]) for r in records if r["kind"] == "step"]


@pytest.mark.parametrize(
    ("flags", "environment", "message"),
    [
        ({"nodes": 2}, {}, "--nodes 2 without --node-rank"),
        ({"nodes": 2, "node_rank": 0}, {}, "--nodes 2 without --master-addr"),
        ({"nodes": 2, "node_rank": 0, "master_addr": " "}, {"MASTER_ADDR": " "}, "--nodes 2 without --master-addr"),
        ({"nodes": 2, "node_rank": 2, "master_addr": "h"}, {}, "number the 2 machines from 0 to 1"),
        ({"nodes": -1}, {}, "--nodes is -1"),
        ({"node_rank": 1}, {}, "--node-rank without --nodes has no effect"),
        ({"master_addr": "h", "master_port": 2000}, {}, "--master-addr, --master-port without --nodes"),
        ({"nodes": 2, "node_rank": 0, "master_addr": "h", "master_port": 80}, {}, "from 1024 to 65535"),
        ({"nodes": 2, "node_rank": 0, "master_addr": "h"}, {"MASTER_PORT": "1"}, "MASTER_PORT is 1"),
        ({"nproc_per_node": -1}, {}, "--nproc-per-node is -1"),
        ({"max_restarts": -1}, {}, "--max-restarts is -1"),
        ({"join_timeout": 0.0}, {}, "--join-timeout is 0"),
        ({"collective_timeout": float("nan")}, {}, "--collective-timeout is nan"),
        ({}, {"NNODES": "two"}, "NNODES is 'two'"),
        ({}, {"NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "h"}, "--node-rank is 2 of --nodes 2"),
    ],
)
def test_impossible_flags_are_errors(flags: dict[str, Any], environment: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        resolve(LaunchConfig(**flags), environment)


def test_ascendspeeds_environment_is_read_and_flags_take_precedence() -> None:
    environment = {"MASTER_ADDR": "ten", "MASTER_PORT": "6000", "NNODES": "4", "NODE_RANK": "3"}
    found = resolve(LaunchConfig(), environment)
    assert (found.nodes, found.node_rank, found.master_addr, found.master_port) == (4, 3, "ten", 6000)
    found = resolve(LaunchConfig(node_rank=1, master_addr="eleven", master_port=7000), environment)
    assert (found.nodes, found.node_rank, found.master_addr, found.master_port) == (4, 1, "eleven", 7000)


def test_one_machine_needs_nothing() -> None:
    found = resolve(LaunchConfig(), {"MASTER_ADDR": "left over", "MASTER_PORT": "6000"})
    assert (found.nodes, found.node_rank, found.master_addr, found.master_port) == (1, 0, "127.0.0.1", 0)


def test_flags_without_effect_under_torchrun_are_refused() -> None:
    with pytest.raises(UserError, match="--nodes, --max-restarts: no effect"):
        resolve_launch_env(LaunchConfig(nodes=2, max_restarts=1), {"RANK": "0", "WORLD_SIZE": "2"})


@given(st.sets(st.integers(0, 30), min_size=1))
def test_ranges_name_each_rank_once(ranks: set[int]) -> None:
    spans = re.findall(r"(\d+)(?:-(\d+))?", format_ranks(sorted(ranks)))
    assert [r for a, b in spans for r in range(int(a), int(b or a) + 1)] == sorted(ranks)


def test_a_difference_names_both_sides() -> None:
    facts = [{"a": "1", "b": "1"}, {"a": "1", "b": "2"}, {"a": "1", "b": "2"}, {"a": "1"}]
    expected = "  b: 1 on rank 0 (x); 2 on ranks 1-2 (x, y); nothing on rank 3 (y)"
    assert differences(facts, ["x", "x", "y", "y"]) == [expected]


def test_the_batch_file_is_whole_and_bash(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path)
    words = ["launch", "slurm", str(recipe), "--nodes", "2", "--gpus-per-node", "0", "--tasks-per-node", "2"]
    assert (
        dispatch([*words, "--partition", "big", "--cpus-per-task", "3", "--time", "1:00:00", "--train.steps", "3"]) == 0
    )
    text = capsys.readouterr().out
    for line in (
        "--nodes=2",
        "--ntasks-per-node=2",
        "--cpus-per-task=3",
        "--partition=big",
        "--time=1:00:00",
        "--requeue",
        "--signal=USR1@120",
    ):
        assert f"#SBATCH {line}\n" in text
    assert len(re.findall("^srun --cpus-per-task=.*pretrain .*--train.steps 3 --resume auto$", text, re.M)) == 1
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
    assert dispatch([*words, "--out", str(tmp_path / "job.sh")]) == 0
    assert (tmp_path / "job.sh").read_text().startswith("#!/bin/bash")


def test_a_batch_file_for_a_recipe_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    with pytest.raises(UserError, match="3 data-parallel"):
        launch_slurm.batch_file([str(recipe), "--nodes", "3", "--gpus-per-node", "1"])
    with pytest.raises(UserError, match="did you mean 'slurm'"):
        launch_slurm.LaunchArgs.from_words(["slrum"])


def rendezvous(port: int, *, node_rank: int = 0, address: str = "127.0.0.1") -> FixedRankRendezvous:
    return FixedRankRendezvous(
        nodes=3, node_rank=node_rank, address=address, port=port, processes=1, join_seconds=1.0, restarts=0
    )


def test_a_node_that_does_not_arrive_is_named() -> None:
    alone = rendezvous(free_port())
    with pytest.raises(UserError, match=r"1 of 3 nodes arrived in 1 s: node 0 \(.*\); missing: node 1, node 2"):
        alone.next_rendezvous()
    alone.close()


def test_nodes_that_start_different_numbers_of_processes_are_refused() -> None:
    first = FixedRankRendezvous(
        nodes=2, node_rank=0, address="127.0.0.1", port=free_port(), processes=2, join_seconds=600.0, restarts=0
    )
    second = FixedRankRendezvous(
        nodes=2, node_rank=1, address="127.0.0.1", port=first.port, processes=1, join_seconds=600.0, restarts=0
    )
    with ThreadPoolExecutor() as pool:
        answers = [pool.submit(m.next_rendezvous) for m in (first, second)]
        for answer in answers:
            with pytest.raises(UserError, match="node 0: 2, node 1: 1"):
                answer.result(timeout=900)
    first.close()


def test_a_call_that_the_store_blocks_ends_with_the_store() -> None:
    """A thread that stayed behind would abort the interpreter if it woke at exit."""
    store = open_store(1, 0, address="", port=0, seconds=60, secret=Secret())
    os.kill(store.process, signal.SIGSTOP)
    assert call_with_timeout(0.2, lambda: store.store.get("key")) is None
    blocked = [thread for thread in threading.enumerate() if thread.name == "call_with_timeout"]
    assert blocked
    store.close()
    assert not any(thread.is_alive() for thread in blocked)


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} is in use"):
            rendezvous(port)
        with pytest.raises(UserError, match="in 1 s: what answers there is not a run of arriero"):
            rendezvous(port, node_rank=1)


def test_a_wrong_address_is_named() -> None:
    with pytest.raises(UserError, match=r"192\.0\.2\.1 is not an address of this machine"):
        rendezvous(free_port(), address="192.0.2.1")
    with pytest.raises(UserError, match=r"cannot reach node 0 at .* in 1 s: Connection refused"):
        rendezvous(free_port(), node_rank=1)
    with pytest.raises(UserError, match=r"cannot reach node 0 at nowhere\.invalid"):
        rendezvous(free_port(), node_rank=1, address="nowhere.invalid")


@pytest.fixture(scope="module")
def failures() -> dict[str, dict[str, Any]]:
    command = [sys.executable, HERE / "run_failures.py", "well", "raise", "user", "kill", "stop", "hang"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    return {record["fault"]: record for record in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        ("well", "NoneType", "None"),
        ("raise", "ProcessFailed", r"process 1 failed \(exit 1\):\nTraceback[\s\S]*ValueError: the cause\n$"),
        ("user", "UserError", r"^the data is wrong\n  fix: correct it$"),
        ("kill", "ProcessFailed", "process 1 was killed by SIGKILL"),
        ("stop", "ProcessFailed", "process 1 was stopped .* for 2 s, so it was killed"),
        ("hang", "ProcessFailed", r"rank 1 did not answer\n[\s\S]*Timed out waiting 3000ms"),
    ],
)
def test_the_process_that_failed_first_is_shown(failures: dict[str, Any], fault: str, kind: str, message: str) -> None:
    assert failures[fault]["kind"] == kind
    assert re.search(message, failures[fault]["message"]), failures[fault]["message"]


def test_nodes_that_differ_end_with_the_difference(tmp_path: Path) -> None:
    recipe, port = write_recipe(tmp_path), free_port()
    other = write_data(tmp_path / "other", documents=150)
    both = [
        "pretrain",
        recipe,
        "--nodes",
        2,
        "--master-addr",
        "127.0.0.1",
        "--master-port",
        port,
        "--nproc-per-node",
        1,
    ]
    second = start(*both, "--node-rank", 1, "--data.prefix", other, "--schedule.lr", 0.5)
    with killed_at_exit(second):
        first = arriero(*both, "--node-rank", 0, code=2)
        output, _ = second.communicate(timeout=900)
        assert second.returncode == 2
    for text in (first, output):
        assert "schedule.lr: 0.01 on rank 0" in text
        assert re.search(r"data\[0\].idx: \d+ bytes, \w+ on rank 0 .*; \d+ bytes, \w+ on rank 1", text)
        assert "Traceback" not in text
    assert not (tmp_path / "run").exists()


def test_torchrun_and_srun_start_the_same_run(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    shown = re.search(r"^(torchrun .*) pretrain recipe\.toml$", (HERE.parents[2] / "docs/launch.md").read_text(), re.M)
    assert shown, "docs/launch.md shows no command with torchrun"
    torchrun = [Path(sys.executable).with_name("torchrun"), f"--master-port={free_port()}", *shown[1].split()[1:]]
    step = STEP | {"SLURM_STEP_NODELIST": "127.0.0.1,localhost", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
    step |= {"SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0", "MASTER_PORT": str(free_port())}
    words = ["pretrain", recipe, "--out"]
    started = [start(*words, tmp_path / "own", "--nproc-per-node", 2)]
    started += [start(*words, tmp_path / "torchrun", program=torchrun)]
    for i in range(2):
        started += [start(*words, tmp_path / "srun", **step | {"SLURM_PROCID": str(i), "SLURM_NODEID": str(i)})]
    with killed_at_exit(*started):
        for process in started:
            output, _ = process.communicate(timeout=900)
            assert process.returncode == 0, output
    assert losses(tmp_path / "own") == losses(tmp_path / "torchrun") == losses(tmp_path / "srun")
    assert not list(tmp_path.glob(".*.secret"))


def wait_for_step(run: Path, step: int, *processes: subprocess.Popen[str]) -> None:
    """Until a checkpoint of `step` or later is whole."""
    for _ in range(2400):
        done = [int(p.parent.name[-8:]) for p in run.glob("checkpoints/step-*/COMMITTED")]
        if max(done, default=0) >= step:
            return
        assert all(p.poll() is None for p in processes), [p.communicate()[0] for p in processes if p.poll() is not None]
        time.sleep(0.05)
    pytest.fail(f"no checkpoint of step {step}")


def test_a_lost_process_and_a_lost_machine_do_not_change_the_run(tmp_path: Path) -> None:
    recipe, port = write_recipe(tmp_path), free_port()
    long = ["pretrain", recipe, "--train.steps", 100, "--checkpoint.every", 5, "--log.every", 50]
    both = [*long, "--nodes", 2, "--master-addr", "127.0.0.1", "--master-port", port, "--max-restarts", 3]
    both += ["--nproc-per-node", 1]
    whole = start(*long, "--out", tmp_path / "whole", "--nproc-per-node", 2)
    nodes = [start(*both, "--node-rank", k) for k in range(2)]
    with killed_at_exit(whole, *nodes):
        wait_for_step(tmp_path / "run", 5, *nodes)
        psutil.Process(nodes[1].pid).children()[-1].send_signal(signal.SIGKILL)
        wait_for_step(tmp_path / "run", 25, *nodes)
        nodes[1].kill()  # its process dies with it
        nodes.append(start(*both, "--node-rank", 1))
        with killed_at_exit(nodes[2]):
            output = [node.communicate(timeout=900)[0] for node in (nodes[0], nodes[2])]
            assert [nodes[0].returncode, nodes[2].returncode] == [0, 0], output
        assert whole.wait(timeout=900) == 0
    resumed = [int(s) for s in re.findall(r"resumed from \S+ after step (\d+)", output[0])]
    assert len(resumed) == 2
    assert resumed[0] >= 5
    assert resumed[1] >= 25
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_polling_the_workers_takes_no_exit_code_from_the_agent() -> None:
    done = subprocess.run(
        [sys.executable, HERE / "repeat_launch.py", "5"], capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr
