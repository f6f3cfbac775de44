"""Starts a run, kills it at a random moment, and starts it again, until the wanted number of kills is reached."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

from arriero.cli.torture.fault import install
from arriero.cli.torture.outcome import (
    CHECKPOINT_EVERY,
    MIDDLE_STEP,
    STEPS,
    Outcome,
    largest_difference,
    last_step,
    log_size,
    log_tail,
    run_outcome,
)
from arriero.common.errors import EXIT_OK, EXIT_STOPPED, CheckFailed, join_problems

KILLED_EXIT_CODES = (-signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM)
"""Of a start that a signal ended; the last one if SIGTERM came before the handlers were installed."""
RUN_TIMEOUT = 240.0
"""Seconds after which a start that has not ended fails the check."""
KILL_KINDS = {
    "rank": "SIGKILL to one process",
    "all": "SIGKILL to all processes and the launcher",
    "launcher": "SIGKILL to the launcher alone",
    "save": "death at one write, fsync, rename or removal of a save",
    "torn": "death in the middle of one write of a save",
    "term": "SIGTERM to the launcher: it saves and stops",
}


@dataclass
class KillResults:
    """Counts over all runs of `run_with_kills`."""

    kills: Counter[str] = field(default_factory=Counter)
    resumes: int = 0
    lost_steps: int = 0
    runs: int = 0
    outcomes: list[Outcome] = field(default_factory=list)
    """The outcome of each completed run."""


class KillHarness:
    """Starts runs of one recipe in `root`, kills them and resumes them."""

    def __init__(self, root: Path, *, recipe: str, processes: int, kills: int, seed: int) -> None:
        """`recipe` is empty for the small model on 2 x tensor and 2 x data parallel, or names one."""
        from arriero.common.settings import parse
        from arriero.common.toml import file_settings, to_toml
        from arriero.train.recipe import Recipe, find_bundled
        from arriero.train.synthetic import reduced_recipe

        self.kills, self.root, self.random = kills, root, random.Random(seed)
        whole = parse(Recipe, file_settings(find_bundled("", recipe or "demo", ".toml")), prog="arriero torture")
        if not recipe:
            whole = replace(
                whole, parallel=replace(whole.parallel, tensor_parallel=2, zero_stage=1),
                train=replace(whole.train, micro_batch=1),
            )  # fmt: skip
        self.processes = processes or 2 * whole.parallel.model_parallel
        if problems := whole.layout_problems(self.processes):
            raise join_problems(problems)
        small = reduced_recipe(whole, self.processes, root, steps=STEPS)
        small = replace(
            small, train=replace(small.train, steps=STEPS), log=replace(small.log, every=1),
            checkpoint=replace(small.checkpoint, every=CHECKPOINT_EVERY, keep=2, keep_every=MIDDLE_STEP),
        )  # fmt: skip
        self.file = root / "recipe.toml"
        self.file.write_text(to_toml(small), encoding="utf-8")
        self.log_sizes: dict[Path, int] = {}
        """Bytes of each run's log at the end of its last start."""

    def start_run(self, out: Path, *words: str, processes: int | None = None, fault: str = "") -> int:
        """Starts `arriero pretrain --resume auto` as a process group of its own; returns the launcher's process id."""
        log = os.open(self.root / f"{out.name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC)
        command = ["pretrain", str(self.file), "--out", str(out), "--resume", "auto", *words]
        command += ["--nproc-per-node", str(processes or self.processes)]
        pid = os.fork()  # it has torch already: a start costs a second, not five
        if pid == 0:
            code = 1
            try:
                os.setsid()
                os.dup2(log, 1)
                os.dup2(log, 2)
                sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
                install(fault)
                from arriero.cli.main import dispatch

                code = dispatch(command)
                sys.stdout.flush()
                sys.stderr.flush()
            finally:
                os._exit(code)
        os.close(log)
        return pid

    def run_undisturbed(self) -> Outcome:
        """Runs without kills; returns the SHA-256 of the final state and the losses."""
        out = self.root / "undisturbed"
        code = wait_for_exit(self.start_run(out))
        if code != EXIT_OK:
            raise CheckFailed(
                f"the undisturbed run ended with {code}: see {self.root / 'undisturbed.log'}\n{log_tail(out)}"
            )
        return run_outcome(out)

    def run_with_kills(self) -> KillResults:
        """Starts and kills runs until the number of kills is reached; every run is completed."""
        results = KillResults()
        out = self.root / "killed-0"
        while True:
            kind = self.random.choice(list(KILL_KINDS)) if results.kills.total() < self.kills else ""
            code = self.run_once(out, kind, results)
            if code == EXIT_OK:
                results.outcomes.append(run_outcome(out))
                results.runs += 1
                if results.kills.total() >= self.kills:
                    return results
                out = self.root / f"killed-{results.runs}"
            else:
                results.resumes += 1

    def run_once(self, out: Path, kind: str, results: KillResults) -> int:
        """Starts a run once and kills it by `kind` unless it ends before; returns the exit code."""
        from arriero.checkpoint.find import committed
        from arriero.common.checkpoint_names import step_of

        words, fault = [], ""
        if kind in ("rank", "save", "torn") and self.random.random() < 0.5:
            words = ["--max-restarts", "1"]  # half of them are brought back by the launcher itself
        if kind in ("save", "torn"):
            fault = self.choose_fault("kill" if kind == "save" else "torn")
        pid = self.start_run(out, *words, fault=fault)
        if kind in ("rank", "all", "launcher", "term") and self.wait_for_kill_time(pid, out):
            send_kill(pid, kind, self.random)
            results.kills[kind] += 1
        code = wait_for_exit(pid)
        if code not in (EXIT_OK, EXIT_STOPPED, 1, *KILLED_EXIT_CODES):
            raise CheckFailed(
                f"a start ended with exit code {code}: see {self.root / (out.name + '.log')}\n{log_tail(out)}"
            )
        if fault and "killed by SIGKILL" in log_tail(out, since=self.log_sizes.get(out, 0)):
            results.kills[kind] += 1
        self.log_sizes[out] = log_size(out)
        done, saved = last_step(out), committed(out / "checkpoints")
        results.lost_steps += 0 if code == EXIT_OK else max(0, done - (step_of(saved[-1]) if saved else 0))
        return code

    def choose_fault(self, what: str) -> str:
        """A fault at a random operation of the first three saves; half of the time on rank 0, where a save commits."""
        from arriero.checkpoint.directory import read_json, step_directory
        from arriero.checkpoint.shards import data_file

        rank, nth = self.random.randrange(self.processes), self.random.randint(1, 3)
        if self.random.random() < 0.5:
            rank = 0
        file = data_file(step_directory(self.root / "undisturbed" / "checkpoints", STEPS), rank)
        tensors = read_json(file.with_suffix(".json"))["tensors"]
        own = sum(len(t["sha256"]) for t in tensors.values()) + 5  # header, sync, index and its sync, directory
        commits = 18 if rank == 0 else 0  # state, texts, manifest, rename, marker, and the directory made before
        at = nth * (own + commits) - (self.random.randint(0, commits) if rank == 0 else self.random.randint(0, own))
        return f"{what}@{at}:{rank}"

    def wait_for_kill_time(self, pid: int, out: Path) -> bool:
        """Waits for a random step, or a random time in the start-up; returns False if the run ended before."""
        early = self.random.random() < 0.15
        until = time.monotonic() + (self.random.uniform(0, 2) if early else RUN_TIMEOUT)
        begun, further = None, self.random.randint(1, 4 * CHECKPOINT_EVERY)
        while time.monotonic() < until:
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                return False
            if log_size(out) > self.log_sizes.get(out, 0) and not early:
                now = last_step(out)
                begun = now if begun is None and now else begun
                if begun is not None and now >= begun + further:
                    time.sleep(self.random.uniform(0, 0.1))
                    break
            time.sleep(0.01)
        return True

    def resume_under_other_layouts(self) -> dict[str, float]:
        """Resumes a killed run's middle checkpoint under other layouts; returns the largest relative difference of each
        final state from the undisturbed run's."""
        from arriero.checkpoint.directory import step_directory

        middle = step_directory(self.root / "killed-0" / "checkpoints", MIDDLE_STEP)
        end = step_directory(self.root / "undisturbed" / "checkpoints", STEPS)
        found: dict[str, float] = {}
        for name, (processes, words) in other_layouts(self.processes).items():
            out = self.root / f"other-layout-{len(found)}"
            shutil.copytree(middle, out / "checkpoints" / middle.name)
            code = wait_for_exit(self.start_run(out, *words, processes=processes))
            if code != EXIT_OK:
                raise CheckFailed(f"resumed on {name} it ended with {code}: see {self.root / (out.name + '.log')}")
            found[name] = largest_difference(step_directory(out / "checkpoints", STEPS), end)
        return found


def other_layouts(processes: int) -> dict[str, tuple[int, list[str]]]:
    """Three other layouts: name -> (processes, flags)."""
    plain = ["--parallel.tensor-parallel", "1", "--parallel.pipeline-parallel", "1", "--parallel.context-parallel", "1"]
    plain += ["--parallel.sequence-parallel", "false", "--parallel.zero-stage"]
    return {
        "one process": (1, [*plain, "1"]),
        "data 2, ZeRO-3": (2, [*plain, "3"]),
        f"data {max(2, processes // 2)}, ZeRO-2": (max(2, processes // 2), [*plain, "2"]),
    }


def send_kill(launcher: int, kind: str, chance: random.Random) -> None:
    """Sends the signal of this kind of kill."""
    if kind == "term":
        os.kill(launcher, signal.SIGTERM)
    elif kind == "all":
        os.killpg(launcher, signal.SIGKILL)
    elif kind == "launcher":
        os.kill(launcher, signal.SIGKILL)
    elif victims := child_processes(launcher):
        os.kill(chance.choice(victims), signal.SIGKILL)


def child_processes(parent: int) -> list[int]:
    """The running child processes of `parent`."""
    from arriero.distributed.launch.worker_monitor import process_state

    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        state, its_parent = process_state(int(name))
        if its_parent == parent and state != "Z":
            found.append(int(name))
    return sorted(found)


def wait_for_exit(pid: int) -> int:
    """The exit code, negative for a signal. Kills the process group at the time-out and raises CheckFailed."""
    until = time.monotonic() + RUN_TIMEOUT
    while not (done := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() > until:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise CheckFailed(f"a start did not end within {RUN_TIMEOUT:g} s")
        time.sleep(0.01)
    return os.waitstatus_to_exitcode(done[1])
