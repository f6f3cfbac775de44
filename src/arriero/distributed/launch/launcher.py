"""Starts the processes of a run, one per device, by torch's elastic agent; they are forked after torch is imported.

Fork, not a fork server: the launcher needs torch itself for the agent, so a server that preloads torch doubles the CPU
time of a start (measured with two processes: 1.7 s with fork, 3.3 s with forkserver and preload).

Under torchrun, or as tasks of srun, the processes exist already and none is started. In every case the processes first
check that they agree on what they run (agreement.py), and the error of the process that failed first is the one shown.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from arriero.common.errors import EXIT_USAGE, UserError
from arriero.distributed.launch import worker_monitor
from arriero.distributed.launch.config import LaunchConfig, resolve
from arriero.distributed.launch.rank_info import ROUND_VARIABLE
from arriero.distributed.launch.secret import Secret
from arriero.distributed.launch.worker import exit_worker, run_in_process_group
from arriero.distributed.launch.worker_monitor import WorkerMonitor

if TYPE_CHECKING:
    from arriero.distributed.launch.rendezvous import FixedRankRendezvous

T = TypeVar("T")


class ProcessFailed(RuntimeError):  # noqa: N818 - what happened, not a fault of the caller
    """A process of the run failed; the text names it and holds its traceback."""


def run_processes(
    function: Callable[[Any], T], argument: Any, processes: int, *, launch: LaunchConfig | None = None,
    facts: Callable[[Any], dict[str, str]] | None = None, saves: bool = False, secret: Secret | None = None,
) -> list[T]:  # fmt: skip
    """Calls `function(argument)` in each of `processes` new processes of this machine; their results by local rank.

    The first failure ends the others, or restarts all of them where `launch.max_restarts` allows. A UserError in a
    process is raised here as itself.

    Args:
        function: called in each process, within the process group of all.
        argument: its argument.
        processes: how many on this machine.
        launch: resolved; by default one machine.
        facts: of `argument`, on which all processes must agree.
        saves: whether `function` saves and returns when `signals.stop_requested`; else a signal kills the processes.
        secret: shared by the machines; by default the one that Secret.find finds for the working directory.

    Raises:
        UserError: a process raised one, or the machines did not find each other.
        ProcessFailed: a process failed otherwise; the text names it and holds its traceback.
        Interrupted: a signal has ended the processes.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException

    from arriero.distributed.launch.rendezvous import FixedRankRendezvous

    launch = launch or resolve(LaunchConfig(), {})
    rendezvous = FixedRankRendezvous(
        nodes=launch.nodes, node_rank=launch.node_rank, address=launch.master_addr, port=launch.master_port,
        processes=processes, join_seconds=launch.join_timeout, restarts=launch.max_restarts,
        secret=secret or Secret.find(launch.secret_file, os.environ, Path("arriero")),
    )  # fmt: skip
    monitor = WorkerMonitor(processes, launch.stop_timeout, saves=saves)
    rendezvous.on_poll = monitor.raise_if_killed
    silence_elastic_logger()

    def work() -> T:
        monitor.register_worker()
        os.environ[ROUND_VARIABLE] = str(rendezvous.round)
        return _run_worker(function, argument, launch, facts)

    try:
        return _run_agent(work, launch, processes, monitor, rendezvous)
    except SignalException as error:
        node = f"node {launch.node_rank} ({socket.gethostname()})"
        rendezvous.publish_end(f"{node} was ended by {error.sigval.name}")
        raise monitor.interruption(error.sigval) from None
    finally:
        monitor.close()
        rendezvous.close()


def _run_agent(
    work: Callable[[], T], launch: LaunchConfig, processes: int, monitor: WorkerMonitor, rendezvous: FixedRankRendezvous
) -> list[T]:  # fmt: skip
    """Has torch's elastic agent run `work` in each process; the results by local rank. Raises as `run_processes`."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import rendezvous_handler_registry
    from torch.distributed.launcher.api import LaunchConfig as ElasticConfig
    from torch.distributed.launcher.api import elastic_launch

    from arriero.distributed.launch.error_files import ErrorFiles
    from arriero.distributed.launch.rendezvous import JobEnded

    rendezvous_handler_registry.register(rendezvous.name, lambda _: rendezvous)
    error_files = ErrorFiles()
    config = ElasticConfig(
        min_nodes=launch.nodes, max_nodes=launch.nodes, nproc_per_node=processes, run_id="arriero",
        rdzv_backend=rendezvous.name, max_restarts=launch.max_restarts, monitor_interval=0.1, start_method="fork",
        signals_to_handle="SIGQUIT",  # WorkerMonitor handles the others
        logs_specs=error_files,
    )  # fmt: skip
    try:
        results = elastic_launch(config, work)()
        return [results[rank] for rank in sorted(results)]
    except ChildFailedError as error:
        monitor.raise_if_killed()
        raise _first_failure(error, monitor, rendezvous) from None
    except JobEnded as error:
        rendezvous.publish_end(str(error))
        raise ProcessFailed(str(error)) from None
    except UserError as error:
        rendezvous.publish_end(str(error), is_user_error=True)
        raise
    finally:
        error_files.remove()
        os.environ.pop("TORCHELASTIC_SIGNALS_TO_HANDLE", None)  # torch's agent leaves it behind


def silence_elastic_logger() -> None:
    """Silences the log of torch's agent, which repeats at length what one line says here; LOGLEVEL enables it."""
    if "LOGLEVEL" not in os.environ:
        for name in list(logging.root.manager.loggerDict):
            if name.startswith(("torch.distributed.elastic", "torch.multiprocessing")):
                logging.getLogger(name).setLevel(logging.CRITICAL)


def _first_failure(error: Any, monitor: WorkerMonitor, rendezvous: FixedRankRendezvous) -> Exception:
    """The first failure, on this node or another, as an exception for the user; published to the other nodes."""
    rank, failure = error.get_first_failure()
    if failure.error_file_data.get("peer_lost") and (reason := rendezvous.wait_for_end(5.0)):
        return reason  # the cause is on another node, which has published it
    where = f"process {rank}"
    if rendezvous.nodes > 1:
        where += f" on {socket.gethostname()}, node {rendezvous.node_rank},"
    if failure.exitcode == EXIT_USAGE:
        rendezvous.publish_end(failure.message, is_user_error=True)
        return UserError(failure.message)
    if failure.pid in monitor.killed:
        text = f"{where} was stopped (SIGSTOP) for {worker_monitor.STOPPED_TIMEOUT} s, so it was killed"
    elif failure.exitcode < 0:
        hint = "; the kernel does that when memory runs out" if failure.exitcode == -signal.SIGKILL else ""
        text = f"{where} was killed by {failure.signal_name()}{hint}"
    else:
        no_message = "it left no message; LOGLEVEL=INFO shows the log of torch's agent"
        message = failure.message if failure.error_file_data.get("message") else no_message
        text = f"{where} failed (exit {failure.exitcode}):\n{message}"
    rendezvous.publish_end(text)
    return ProcessFailed(text)


def _run_worker(
    function: Callable[[Any], T], argument: Any, launch: LaunchConfig, facts: Callable[[Any], dict[str, str]] | None
) -> T:  # fmt: skip
    """What a started process runs; it is forked, so its arguments need not be pickled."""
    from arriero.distributed.launch.store import set_parent_death_signal

    set_parent_death_signal()  # a worker must not train on when the agent is killed
    try:
        return run_in_process_group(
            function, argument, facts=facts, join_seconds=launch.join_timeout,
            collective_seconds=launch.collective_timeout, master_addr=launch.master_addr,
        )  # fmt: skip
    except BaseException as error:
        exit_worker(error)
