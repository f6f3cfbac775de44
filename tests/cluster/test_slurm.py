"""A real SLURM of two nodes on this machine: the batch file that arriero prints, and srun alone."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from programs import arriero
from toy import write_recipe

pytestmark = pytest.mark.slow

CONFIG = """ClusterName=arriero
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/none
CredType=cred/none
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
SlurmctldPort=26817
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
MinJobAge=3600
NodeName=arriero-n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[26818-26819] CPUs=2
PartitionName=all Nodes=ALL Default=YES State=UP
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment in which sbatch and srun find the cluster."""
    root = tmp_path_factory.mktemp("slurm")
    (root / "state").mkdir()
    (root / "slurm.conf").write_text(CONFIG.format(host=socket.gethostname(), root=root))
    (root / "hosts").write_text(Path("/etc/hosts").read_text() + "\n127.0.0.1 arriero-n1 arriero-n2\n")
    environment = os.environ | {"SLURM_CONF": str(root / "slurm.conf"), "ARRIERO_THREADS": "1"}
    daemons = [["slurmctld", "-D"], ["slurmd", "-D", "-N", "arriero-n1"], ["slurmd", "-D", "-N", "arriero-n2"]]
    inside = f"mount --bind {root}/hosts /etc/hosts && exec "  # the nodes' names mean something to them alone
    started = [
        subprocess.Popen(["unshare", "--mount", "bash", "-c", inside + " ".join(d)], env=environment) for d in daemons
    ]
    try:
        for _ in range(300):
            shown = subprocess.run(
                ["sinfo", "-h", "-o", "%T %D"], env=environment, capture_output=True, text=True, check=False
            )
            if shown.stdout.strip() == "idle 2":
                break
            time.sleep(0.2)
        assert shown.stdout.strip() == "idle 2", shown.stdout + (root / "slurmctld.log").read_text()
        yield environment
    finally:
        for daemon in reversed(started):
            daemon.send_signal(signal.SIGTERM)
            daemon.wait(timeout=30)


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["lm_loss"] for line in lines if line["kind"] == "step"]


def batch_file(directory: Path, *words: object) -> Path:
    recipe, path = write_recipe(directory), directory / "job.sh"
    nodes = ["--nodes", 2, "--gpus-per-node", 0, "--tasks-per-node", 2, "--time", "10:00"]
    arriero("launch", "slurm", recipe, *nodes, "--out", path, *words)
    return path


def test_the_batch_file_trains_the_run_of_one_machine(slurm: dict[str, str], tmp_path: Path) -> None:
    job = batch_file(tmp_path)
    subprocess.run(["sbatch", "--wait", job], cwd=tmp_path, env=slurm, check=False, timeout=250)
    log = next(tmp_path.glob("*.log")).read_text()
    assert "saved checkpoint" in log, log
    arriero("pretrain", tmp_path / "toy.toml", "--out", tmp_path / "one", "--nproc-per-node", 4)
    assert losses(tmp_path / "run") == losses(tmp_path / "one")


@pytest.mark.timeout(600)  # SLURM waits two minutes before it starts a requeued job
def test_a_requeued_job_goes_on(slurm: dict[str, str], tmp_path: Path) -> None:
    job = batch_file(tmp_path, "--train.steps", 150, "--checkpoint.every", 10)
    number = subprocess.check_output(["sbatch", "--parsable", job], cwd=tmp_path, env=slurm, text=True).strip()
    run = tmp_path / "run"
    for _ in range(1000):
        if list(run.glob("checkpoints/*/COMMITTED")):
            break
        time.sleep(0.1)
    subprocess.run(["scontrol", "requeue", number], env=slurm, check=True)
    for _ in range(4500):
        if len(losses(run)) == 150:
            break
        time.sleep(0.1)
    log = next(tmp_path.glob("*.log")).read_text()
    assert "resumed from" in log, log
    assert len(losses(run)) == 150


@pytest.mark.timeout(600)
def test_a_job_that_is_told_to_stop_saves_and_queues_itself_again(slurm: dict[str, str], tmp_path: Path) -> None:
    """What SLURM does before the time limit: SIGUSR1 to the tasks."""
    job = batch_file(tmp_path, "--train.steps", 150, "--checkpoint.every", 0)
    number = subprocess.check_output(["sbatch", "--parsable", job], cwd=tmp_path, env=slurm, text=True).strip()
    run = tmp_path / "run"
    for _ in range(1000):
        if (run / "metrics.jsonl").exists() and len(losses(run)) > 3:
            break
        time.sleep(0.1)
    subprocess.run(["scancel", "--signal=USR1", number], env=slurm, check=True)
    for _ in range(4500):
        if (run / "loss.png").exists() and len(losses(run)) == 150:
            break
        time.sleep(0.1)
    log = next(tmp_path.glob("*.log")).read_text()
    assert "stopped after step" in log, log
    assert "resumed from" in log, log
    assert len(losses(run)) == 150


def test_srun_shows_the_first_error_and_ends_all(slurm: dict[str, str], tmp_path: Path) -> None:
    program = [sys.executable, "-m", "arriero", "pretrain", write_recipe(tmp_path)]
    odd = 'if [ "$SLURM_PROCID" = 3 ]; then set -- "$@" --seed 7; fi; exec "$@"'
    command = ["srun", "--nodes=2", "--ntasks=4", "bash", "-c", odd, "task", *map(str, program)]
    done = subprocess.run(command, cwd=tmp_path, env=slurm, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("the processes do not agree") == 1
    assert "seed: 1234 on ranks 0-2" in done.stderr
    assert "7 on rank 3" in done.stderr
