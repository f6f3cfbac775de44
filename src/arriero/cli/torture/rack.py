"""Starts a run, kills it somewhere, starts it again."""

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
from arriero.cli.torture.outcome import EVERY, STEPS, Outcome, largest_difference, last_step, log_size, outcome, tail
from arriero.common.errors import EXIT_OK, EXIT_STOPPED, CheckFailed, join_problems

DEAD = (-signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM)  # by the signal, or by a SIGTERM that came too early
PATIENCE = 240.0
"""Seconds in which a start must come to an end, killed or not."""
KINDS = {
    "rank": "SIGKILL to one process",
    "all": "SIGKILL to all processes and the launcher",
    "launcher": "SIGKILL to the launcher alone",
    "save": "death at one write, fsync, rename or removal of a save",
    "torn": "death in the middle of one write of a save",
    "term": "SIGTERM to the launcher: it saves and stops",
}


@dataclass
class Tally:
    """What happened."""

    kills: Counter[str] = field(default_factory=Counter)
    resumes: int = 0
    lost_steps: int = 0
    runs: int = 0
    ends: list[Outcome] = field(default_factory=list)
    """Of every run that was completed."""


class Rack:
    """Starts, kills and starts again."""

    def __init__(self, root: Path, *, recipe: str, processes: int, kills: int, seed: int) -> None:
        """`recipe` is empty for the small model on 2 x tensor and 2 x data parallel, or names one."""
        from arriero.train.recipe import Recipe, file_settings, find_bundled, parse, to_toml
        from arriero.train.verify_layout import reduced

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
        small = reduced(whole, self.processes, root)
        small = replace(
            small, train=replace(small.train, steps=STEPS), log=replace(small.log, every=1),
            checkpoint=replace(small.checkpoint, every=EVERY, keep=2, keep_every=EVERY * (STEPS // EVERY // 2)),
        )  # fmt: skip
        self.middle = small.checkpoint.keep_every
        self.file = root / "recipe.toml"
        self.file.write_text(to_toml(small), encoding="utf-8")
        self.marks: dict[Path, int] = {}
        """How long each run's log was when its last start ended."""

    def start(self, out: Path, *words: str, processes: int | None = None, fault: str = "") -> int:
        """Starts `arriero pretrain --resume auto` as a process group of its own; returns the launcher's number."""
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

    def in_peace(self) -> Outcome:
        """The run that nobody disturbs: its SHA-256 and its losses."""
        out = self.root / "peace"
        code = wait(self.start(out))
        if code != EXIT_OK:
            raise CheckFailed(f"the undisturbed run ended with {code}: see {self.root / 'peace.log'}\n{tail(out)}")
        return outcome(out)

    def under_fire(self) -> Tally:
        """Kills until it is enough; every run is brought to its end and its outcome noted."""
        tally = Tally()
        out = self.root / "fire-0"
        while True:
            kind = self.random.choice(list(KINDS)) if tally.kills.total() < self.kills else ""
            code = self.life(out, kind, tally)
            if code == EXIT_OK:
                tally.ends.append(outcome(out))
                tally.runs += 1
                if tally.kills.total() >= self.kills:
                    return tally
                out = self.root / f"fire-{tally.runs}"
            else:
                tally.resumes += 1

    def life(self, out: Path, kind: str, tally: Tally) -> int:
        """One start of a run, and its end by `kind`, if it does not end before; returns the exit code."""
        from arriero.checkpoint.find import committed
        from arriero.common.checkpoint_names import step_of

        words, fault = [], ""
        if kind in ("rank", "save", "torn") and self.random.random() < 0.5:
            words = ["--max-restarts", "1"]  # half of them are brought back by the launcher itself
        if kind in ("save", "torn"):
            fault = self.choose_fault("kill" if kind == "save" else "torn")
        pid = self.start(out, *words, fault=fault)
        if kind in ("rank", "all", "launcher", "term") and self.aim(pid, out):
            shoot(pid, kind, self.random)
            tally.kills[kind] += 1
        code = wait(pid)
        if code not in (EXIT_OK, EXIT_STOPPED, 1, *DEAD):
            raise CheckFailed(
                f"a start ended with exit code {code}: see {self.root / (out.name + '.log')}\n{tail(out)}"
            )
        if fault and "killed by SIGKILL" in tail(out, since=self.marks.get(out, 0)):
            tally.kills[kind] += 1
        self.marks[out] = log_size(out)
        done, saved = last_step(out), committed(out / "checkpoints")
        tally.lost_steps += 0 if code == EXIT_OK else max(0, done - (step_of(saved[-1]) if saved else 0))
        return code

    def choose_fault(self, what: str) -> str:
        """One of the operations of the first three saves of a start; half of the time, one that commits a save."""
        from arriero.checkpoint.directory import read_json, step_directory
        from arriero.checkpoint.shards import data_file

        rank, nth = self.random.randrange(self.processes), self.random.randint(1, 3)
        if self.random.random() < 0.5:
            rank = 0
        file = data_file(step_directory(self.root / "peace" / "checkpoints", STEPS), rank)
        tensors = read_json(file.with_suffix(".json"))["tensors"]
        own = sum(len(t["sha256"]) for t in tensors.values()) + 5  # header, sync, index and its sync, directory
        commits = 18 if rank == 0 else 0  # state, texts, manifest, rename, marker, and the directory made before
        at = nth * (own + commits) - (self.random.randint(0, commits) if rank == 0 else self.random.randint(0, own))
        return f"{what}@{at}:{rank}"

    def aim(self, pid: int, out: Path) -> bool:
        """Waits for the moment: some steps on, or some time in the start-up; False if the run ended first."""
        early = self.random.random() < 0.15
        until = time.monotonic() + (self.random.uniform(0, 2) if early else PATIENCE)
        begun, further = None, self.random.randint(1, 4 * EVERY)
        while time.monotonic() < until:
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                return False
            if log_size(out) > self.marks.get(out, 0) and not early:
                now = last_step(out)
                begun = now if begun is None and now else begun
                if begun is not None and now >= begun + further:
                    time.sleep(self.random.uniform(0, 0.1))
                    break
            time.sleep(0.01)
        return True

    def under_other_layouts(self) -> dict[str, float]:
        """Largest relative difference of the final state when the tortured run's middle goes on under other layouts."""
        from arriero.checkpoint.directory import step_directory

        middle = step_directory(self.root / "fire-0" / "checkpoints", self.middle)
        end = step_directory(self.root / "peace" / "checkpoints", STEPS)
        found: dict[str, float] = {}
        for name, (processes, words) in other_layouts(self.processes).items():
            out = self.root / f"other-{len(found)}"
            shutil.copytree(middle, out / "checkpoints" / middle.name)
            code = wait(self.start(out, *words, processes=processes))
            if code != EXIT_OK:
                raise CheckFailed(f"resumed on {name} it ended with {code}: see {self.root / (out.name + '.log')}")
            found[name] = largest_difference(step_directory(out / "checkpoints", STEPS), end)
        return found


def other_layouts(processes: int) -> dict[str, tuple[int, list[str]]]:
    """Three ways of running what `processes` ran: name -> (processes, words)."""
    plain = ["--parallel.tensor-parallel", "1", "--parallel.pipeline-parallel", "1", "--parallel.context-parallel", "1"]
    plain += ["--parallel.sequence-parallel", "false", "--parallel.zero-stage"]
    return {
        "one process": (1, [*plain, "1"]),
        "data 2, ZeRO-3": (2, [*plain, "3"]),
        f"data {max(2, processes // 2)}, ZeRO-2": (max(2, processes // 2), [*plain, "2"]),
    }


def shoot(launcher: int, kind: str, chance: random.Random) -> None:
    """Sends the signal."""
    if kind == "term":
        os.kill(launcher, signal.SIGTERM)
    elif kind == "all":
        os.killpg(launcher, signal.SIGKILL)
    elif kind == "launcher":
        os.kill(launcher, signal.SIGKILL)
    elif victims := children(launcher):
        os.kill(chance.choice(victims), signal.SIGKILL)


def children(parent: int) -> list[int]:
    """The processes that `parent` has started and that live."""
    from arriero.distributed.launch.worker_monitor import process_state

    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        state, its_parent = process_state(int(name))
        if its_parent == parent and state != "Z":
            found.append(int(name))
    return sorted(found)


def wait(pid: int) -> int:
    """The exit code, negative for a signal; what is left of the group is waited for, and killed if it stays."""
    until = time.monotonic() + PATIENCE
    while not (done := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() > until:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise CheckFailed(f"a start did not end within {PATIENCE:g} s")
        time.sleep(0.01)
    return os.waitstatus_to_exitcode(done[1])
