"""Starting the processes of a run: one a device, by torch's own elastic agent, forked after torch is imported.

Under torchrun, or as tasks of srun, the processes are there already and nothing is started. In every case they first
agree on what they run (agreement.py), and a process that fails says so before the others are ended.
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
from arriero.distributed.launch.config import LaunchConfig, resolve
from arriero.distributed.launch.secret import Secret
from arriero.distributed.launch.worker import (
    ROUND_VARIABLE,
    exit_worker,
    run_in_process_group,
)
from arriero.distributed.launch.worker_monitor import STOPPED_AFTER, WorkerMonitor

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

    The first failure ends the others, or starts them all again where `launch.max_restarts` allows. A UserError in a
    process is raised here as itself.

    Args:
        function: what each process does, within the group of all.
        argument: handed to it.
        processes: how many on this machine.
        launch: resolved; by default one machine.
        facts: of `argument`, what all processes must agree on.
        saves: whether `function` saves and returns when `signals.stop_requested`; else a signal ends the processes.
        secret: what the machines share; by default what Secret.find finds for the working directory.

    Raises:
        UserError: a process raised one, or the machines did not come together.
        ProcessFailed: a process failed otherwise; the text names it and holds its traceback.
        Interrupted: a signal has ended the processes.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import rendezvous_handler_registry
    from torch.distributed.launcher.api import LaunchConfig as ElasticConfig
    from torch.distributed.launcher.api import elastic_launch

    from arriero.distributed.launch.error_files import ErrorFiles
    from arriero.distributed.launch.rendezvous import FixedRankRendezvous, JobEnded

    launch = launch or resolve(LaunchConfig(), {})
    meeting = FixedRankRendezvous(
        nodes=launch.nodes, node_rank=launch.node_rank, address=launch.master_addr, port=launch.master_port,
        processes=processes, join_seconds=launch.join_timeout, restarts=launch.max_restarts,
        secret=secret or Secret.find(launch.secret_file, os.environ, Path("arriero")),
    )  # fmt: skip
    rendezvous_handler_registry.register(meeting.name, lambda _: meeting)
    error_files = ErrorFiles()
    config = ElasticConfig(
        min_nodes=launch.nodes, max_nodes=launch.nodes, nproc_per_node=processes, run_id="arriero",
        rdzv_backend=meeting.name, max_restarts=launch.max_restarts, monitor_interval=0.1, start_method="fork",
        signals_to_handle="SIGQUIT",  # WorkerMonitor takes the others
        logs_specs=error_files,
    )  # fmt: skip
    children = WorkerMonitor(processes, launch.stop_timeout, saves=saves)
    silence_elastic_logger()

    def begin() -> None:
        children.here()
        os.environ[ROUND_VARIABLE] = str(meeting.round)

    try:
        try:
            results = elastic_launch(config, _entry)(function, argument, launch, facts, begin)
            return [results[rank] for rank in sorted(results)]
        except ChildFailedError as error:
            if children.ended_by:
                raise SignalException("ended", signal.Signals(children.ended_by)) from None
            raise _failure(error, children, meeting) from None
        except JobEnded as error:
            meeting.end(str(error))
            raise ProcessFailed(str(error)) from None
        except UserError as error:
            meeting.end(str(error), user=True)
            raise
    except SignalException as error:
        meeting.end(f"node {launch.node_rank} ({socket.gethostname()}) was ended by {error.sigval.name}")
        raise children.outcome(error.sigval) from None
    finally:
        children.stop()
        meeting.close()
        error_files.remove()
        os.environ.pop("TORCHELASTIC_SIGNALS_TO_HANDLE", None)  # torch's agent leaves it behind


def silence_elastic_logger() -> None:
    """Silences the agent's own log, which says at length what is said in one line here; LOGLEVEL brings it back."""
    if "LOGLEVEL" not in os.environ:
        for name in list(logging.root.manager.loggerDict):
            if name.startswith(("torch.distributed.elastic", "torch.multiprocessing")):
                logging.getLogger(name).setLevel(logging.CRITICAL)


def _failure(error: Any, children: WorkerMonitor, meeting: FixedRankRendezvous) -> Exception:
    """What failed first, in this node or in another, as an exception for the user."""
    rank, failure = error.get_first_failure()
    if failure.error_file_data.get("lost_touch") and (reason := meeting.reason(5.0)):
        return reason  # the cause is elsewhere, and it was told
    where = f"process {rank}" + (f" on {socket.gethostname()}, node {meeting.node_rank}," if meeting.nodes > 1 else "")
    if failure.exitcode == EXIT_USAGE:
        meeting.end(failure.message, user=True)
        return UserError(failure.message)
    if failure.pid in children.ended:
        text = f"{where} stood still (stopped by a signal) for {STOPPED_AFTER} s and was ended"
    elif failure.exitcode < 0:
        hint = "; the kernel does that when memory runs out" if failure.exitcode == -signal.SIGKILL else ""
        text = f"{where} was killed by {failure.signal_name()}{hint}"
    else:
        silent = "it left no message; LOGLEVEL=INFO shows the log of torch's agent"
        said = failure.message if failure.error_file_data.get("message") else silent
        text = f"{where} failed (exit {failure.exitcode}):\n{said}"
    meeting.end(text)
    return ProcessFailed(text)


def _entry(
    function: Callable[[Any], T], argument: Any, launch: LaunchConfig, facts: Callable[[Any], dict[str, str]] | None,
    begin: Callable[[], None],
) -> T:  # fmt: skip
    """What a started process runs; it is forked, so its arguments need not be pickled."""
    from arriero.distributed.launch.store import set_parent_death_signal

    begin()
    set_parent_death_signal()  # no orphan trains on when the agent is killed
    try:
        return run_in_process_group(
            function, argument, facts=facts, join_seconds=launch.join_timeout,
            collective_seconds=launch.collective_timeout, towards=launch.master_addr,
        )  # fmt: skip
    except BaseException as error:
        exit_worker(error)
