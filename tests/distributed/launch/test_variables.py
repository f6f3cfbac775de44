"""Environment variables that say where a process stands: each wrong value is a UserError that names its variable."""

from __future__ import annotations

import os
import re
import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arriero.cli import launch_slurm
from arriero.cli.main import dispatch
from arriero.common.errors import UserError
from arriero.distributed.launch import slurm
from arriero.distributed.launch.config import LaunchConfig, resolve, resolve_launch_env
from arriero.distributed.launch.cpu_affinity import set_cpu_affinity
from arriero.distributed.launch.rank_info import RankInfo, restart_count
from toy import write_recipe

STEP = {
    "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "gpu[08-09]", "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
}  # fmt: skip
TORCHRUN = {
    "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "gpu08",
    "MASTER_PORT": "29500",
}  # fmt: skip
HOSTILE = [
    "", " ", "two", "-1", "1.5", "0x4", "1e3", "²", "٣", "nan", "99999999999999999999999", "9" * 5000, "-" + "9" * 30,
    "4\n", "4;rm", "\x1b[31m", "\udcff", "[", "a[", "a[1-", "a[1-99999999]", "a[1-2][1-999999]", "a[9-1]", "a[-1]",
    "a[1-2", "a]1[", ",", "a,,b", "a b", "2(x", "2(x99999999)", "2(x-1)", "(x3)", "2(x2)(x2)",
]  # fmt: skip


def test_a_task_of_srun_knows_its_place() -> None:
    environment = dict(STEP)
    resolve_launch_env(LaunchConfig(), environment)
    assert {k: environment[k] for k in TORCHRUN if k != "MASTER_PORT"} == {
        k: v for k, v in TORCHRUN.items() if k != "MASTER_PORT"
    }
    assert 10000 <= int(environment["MASTER_PORT"]) < 32768


def test_a_task_of_srun_that_starts_processes_is_a_node() -> None:
    found = resolve_launch_env(LaunchConfig(nproc_per_node=8), dict(STEP))
    assert (found.nodes, found.node_rank, found.master_addr) == (4, 3, "gpu08")


def test_the_batch_file_itself_is_no_task() -> None:
    assert not slurm.is_step_task({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "4711"})


@pytest.mark.parametrize("missing", [name for name in STEP if name != "SLURM_STEP_NUM_TASKS"])
def test_a_missing_variable_of_srun_is_named(missing: str) -> None:
    environment = {k: v for k, v in STEP.items() if k != missing}
    with pytest.raises(UserError, match=f"{missing} is missing"):
        resolve_launch_env(LaunchConfig(), environment)


@pytest.mark.parametrize("missing", [name for name in TORCHRUN if name != "LOCAL_WORLD_SIZE"])
def test_a_missing_variable_of_torchrun_is_named(missing: str) -> None:
    with pytest.raises(UserError, match=f"{missing} is missing"):
        resolve_launch_env(LaunchConfig(), {k: v for k, v in TORCHRUN.items() if k != missing})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"SLURM_PROCID": "4"}, "SLURM_PROCID is 4 .* not from 0 to 3"),
        ({"SLURM_NODEID": "2"}, "SLURM_NODEID is 2 .* not from 0 to 1"),
        ({"SLURM_LOCALID": "2"}, "SLURM_LOCALID is 2 .* not from 0 to 1"),
        ({"SLURM_STEP_TASKS_PER_NODE": "2"}, "2 tasks on 1 nodes in SLURM_STEP_TASKS_PER_NODE.*names 2 hosts"),
        ({"SLURM_STEP_TASKS_PER_NODE": "0,4"}, "SLURM_STEP_TASKS_PER_NODE is '0,4', which gives a node 0 tasks"),
        ({"SLURM_STEP_TASKS_PER_NODE": "3,2"}, "5 tasks on 2 nodes .* SLURM_STEP_NUM_TASKS is 4"),
        ({"SLURM_STEP_NODELIST": "a[1-99999999]"}, "SLURM_STEP_NODELIST names more than"),
        ({"SLURM_STEP_NODELIST": "a[1-999][1-999][1-999][1-999]"}, "SLURM_STEP_NODELIST names more than"),
        ({"SLURM_STEP_NODELIST": "a[3-1]"}, r"SLURM_STEP_NODELIST holds \[3-1\], which runs backwards"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT is 65536"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT is 'http'"),
    ],
)
def test_variables_of_srun_that_contradict_each_other(changes: dict[str, str], named: str) -> None:
    with pytest.raises(UserError, match=named):
        resolve_launch_env(LaunchConfig(), STEP | changes)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"RANK": "4"}, "RANK is 4 .* not from 0 to 3"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK is 2"),
        ({"LOCAL_WORLD_SIZE": "5"}, "LOCAL_WORLD_SIZE is 5"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is 0"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT is 0"),
        ({"MASTER_ADDR": "  "}, "MASTER_ADDR is missing"),
    ],
)
def test_variables_of_torchrun_that_contradict_each_other(changes: dict[str, str], named: str) -> None:
    with pytest.raises(UserError, match=named):
        resolve_launch_env(LaunchConfig(), TORCHRUN | changes)


TEXTS = st.one_of(
    st.sampled_from(HOSTILE),
    st.integers(-(2**70), 2**70).map(str),
    st.text(string.digits + "[](),x-ab. \x00\x1b²", max_size=12),
)


@given(
    st.sampled_from([STEP, TORCHRUN]),
    st.dictionaries(st.sampled_from([*STEP, *TORCHRUN, "NNODES", "NODE_RANK"]), TEXTS, min_size=1),
    st.sampled_from([LaunchConfig(), LaunchConfig(nproc_per_node=2)]),
)
def test_any_value_is_taken_or_refused_by_name(
    usual: dict[str, str], changes: dict[str, str], config: LaunchConfig
) -> None:
    """No KeyError, IndexError or ValueError; a place that was accepted is one; the message can be printed."""
    environment, refused, info = usual | changes, "", RankInfo()
    try:
        resolve_launch_env(config, environment)
        info = RankInfo.from_environment(environment)
    except UserError as error:
        refused = str(error)
    if refused:
        assert re.search(r"SLURM_|RANK|SIZE|MASTER_|NNODES|--n", refused)
        assert len(refused) < 1000
        assert refused.replace("\n", "").isprintable()
    assert 0 <= info.rank < info.world_size
    assert 0 <= info.local_rank < info.local_world_size <= info.world_size


def test_other_numbers_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("many", "0", "-3", "1e9"):
        monkeypatch.setenv("ARRIERO_THREADS", value)
        with pytest.raises(UserError, match="ARRIERO_THREADS"):
            set_cpu_affinity(0, 1, bind=False)
    for name in ("ARRIERO_ROUND", "TORCHELASTIC_RESTART_COUNT"):
        with monkeypatch.context() as one:
            one.setenv(name, "x")
            with pytest.raises(UserError, match=name):
                restart_count()
    with pytest.raises(UserError, match="NNODES is 'two'"):
        resolve(LaunchConfig(), {"NNODES": "two"})


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("a", ["a"]),
        ("n[1,3]", ["n1", "n3"]),
        ("a,n[01-03,7]-ib,b", ["a", "n01-ib", "n02-ib", "n03-ib", "n7-ib", "b"]),
        ("r[1-2]n[8-9]", ["r1n8", "r1n9", "r2n8", "r2n9"]),
        ("gpu[098-101].cluster", ["gpu098.cluster", "gpu099.cluster", "gpu100.cluster", "gpu101.cluster"]),
    ],
)
def test_host_lists(text: str, hosts: list[str]) -> None:
    assert slurm.expand_hosts(text) == hosts


def test_task_counts() -> None:
    assert slurm.expand_counts("2(x3),1") == [2, 2, 2, 1]


def test_ports_of_jobs_differ() -> None:
    """Jobs that run on one machine at the same time are near each other in number, or a round number apart."""
    ports = [slurm.master_address(STEP | {"SLURM_JOB_ID": str(job)})[1] for job in (*range(77, 277), 2077, 4077, 12077)]
    assert all(10000 <= port < 32768 for port in ports)
    assert len(set(ports)) >= len(ports) - 4  # 203 of 22,768: 0.9 pairs are expected
    steps = [slurm.master_address(STEP | {"SLURM_STEP_ID": str(step)})[1] for step in range(20)]
    assert len(set(steps)) == 20


@pytest.mark.parametrize(
    ("flag", "value", "named"),
    [
        ("--nodes", "999999999", "--nodes is 999999999"),
        ("--cpus-per-task", "-1", "--cpus-per-task is -1"),
        ("--time", "1:00\n#SBATCH --uid=0", "--time is"),
        ("--partition", "big\nrm -rf x", "--partition is"),
    ],
)
def test_values_that_do_not_belong_into_a_batch_file(tmp_path: Path, flag: str, value: str, named: str) -> None:
    words = [str(write_recipe(tmp_path)), "--gpus-per-node", "1", flag, value]
    with pytest.raises(UserError, match=named):
        launch_slurm.batch_file(words)


@pytest.mark.parametrize("time", ["UNLIMITED", "30", "2-0", "1-12:00:00"])
def test_times_that_slurm_takes(tmp_path: Path, time: str) -> None:
    words = [str(write_recipe(tmp_path)), "--gpus-per-node", "1", "--time", time]
    assert f"#SBATCH --time={time}\n" in launch_slurm.batch_file(words)[0]


def test_the_command_ends_with_the_variable_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {k: v for k, v in STEP.items() if k != "SLURM_STEP_NODELIST"}.items():
        monkeypatch.setenv(name, value)
    assert dispatch(["pretrain", str(write_recipe(tmp_path))]) == 2
    assert "SLURM_STEP_NODELIST is missing" in capsys.readouterr().err
    assert "RANK" not in os.environ
