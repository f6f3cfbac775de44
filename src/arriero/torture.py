"""`arriero torture`: a run is killed again and again, wherever a run can die, and must end as if never touched.

The recipe is trained at reduced width on the CPU, once in peace and then under fire. Whatever is killed is started
again with the same command line. In the end the SHA-256 of weights and moments, and the loss of every step, must be
those of the peaceful run; and a checkpoint of the tortured run must give the same numbers under other layouts.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from arriero.errors import EXIT_OK, EXIT_STOPPED, CheckFailed, UserError, join_problems

STEPS, EVERY = 40, 3
"""Steps of a run, and between its checkpoints."""
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


@dataclass(frozen=True)
class TortureArgs:
    """Kill a small run again and again; exit code 0 if its final SHA-256 never changed, 1 if it did."""

    recipe: tyro.conf.Positional[str] = ""
    """Whose model and layout to use, at reduced width; by default a small model on 2 x tensor and 2 x data parallel."""
    processes: int = 0
    """Processes of a run; 0 takes as many as the layout's model-parallel ranks, twice."""
    kills: int = 20
    """How many times something is killed."""
    seed: int = 0
    """Decides what is killed, and when."""
    out: str = ""
    """Where to leave the runs; by default they are removed."""
    json: bool = False
    """Print the result as JSON."""


@dataclass
class Tally:
    """What happened."""

    kills: Counter[str] = field(default_factory=Counter)
    resumes: int = 0
    lost_steps: int = 0
    runs: int = 0
    sha256: list[str] = field(default_factory=list)


def run(args: TortureArgs) -> int:
    """Runs the torture and prints what came of it."""
    if args.kills < 1:
        raise UserError(f"--kills is {args.kills}", "give a whole number from 1")
    root = Path(args.out or tempfile.mkdtemp(prefix="arriero-torture-"))
    if args.out and root.exists() and any(root.iterdir()):
        raise UserError(f"{root}: is not empty", "name a directory that is new")
    root.mkdir(parents=True, exist_ok=True)
    try:
        rack = Rack(args, root)
        began = time.monotonic()
        peace = rack.in_peace()
        tally = rack.under_fire()
        others = rack.under_other_layouts()
        return report(args, peace, tally, others, time.monotonic() - began)
    finally:
        if not args.out:
            shutil.rmtree(root, ignore_errors=True)


class Rack:
    """Starts, kills and starts again."""

    def __init__(self, args: TortureArgs, root: Path) -> None:
        from arriero.recipe import Recipe, file_settings, find_bundled, parse, to_toml
        from arriero.train.verify import reduced

        self.args, self.root, self.random = args, root, random.Random(args.seed)
        recipe = parse(Recipe, file_settings(find_bundled("", args.recipe or "demo", ".toml")), prog="arriero torture")
        if not args.recipe:
            recipe = replace(
                recipe, parallel=replace(recipe.parallel, tensor_parallel=2, zero_stage=1),
                train=replace(recipe.train, micro_batch=1),
            )  # fmt: skip
        self.processes = args.processes or 2 * recipe.parallel.model_parallel
        if problems := recipe.layout_problems(self.processes):
            raise join_problems(problems)
        small = reduced(recipe, self.processes, root)
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
                os.environ.pop("ARRIERO_FAULT", None)
                if fault:
                    os.environ["ARRIERO_FAULT"] = fault
                from arriero.cli import dispatch

                code = dispatch(command)
                sys.stdout.flush()
                sys.stderr.flush()
            finally:
                os._exit(code)
        os.close(log)
        return pid

    def in_peace(self) -> tuple[str, list[tuple[int, str]]]:
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
            kind = self.random.choice(list(KINDS)) if tally.kills.total() < self.args.kills else ""
            code = self.life(out, kind, tally)
            if code == EXIT_OK:
                tally.sha256.append(json.dumps(outcome(out)))
                tally.runs += 1
                if tally.kills.total() >= self.args.kills:
                    return tally
                out = self.root / f"fire-{tally.runs}"
            else:
                tally.resumes += 1

    def life(self, out: Path, kind: str, tally: Tally) -> int:
        """One start of a run, and its end by `kind`, if it does not end before; returns the exit code."""
        from arriero.checkpoint.layout import committed, step_of

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
        from arriero.checkpoint.layout import read_json, step_directory
        from arriero.checkpoint.parts import data_file

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
        from arriero.checkpoint.layout import step_directory

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
    from arriero.launch import process_state

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


def log_size(out: Path) -> int:
    """Bytes that all starts of a run have printed."""
    path = out.with_suffix(".log")
    return path.stat().st_size if path.exists() else 0


def tail(out: Path, since: int = -1) -> str:
    """What a run has printed since byte `since`, or last."""
    data = out.with_suffix(".log").read_bytes()
    return data[since if since >= 0 else -2000 :].decode(errors="replace")


def last_step(out: Path) -> int:
    """The last step that the metrics know."""
    path = out / "metrics.jsonl"
    lines = path.read_bytes().splitlines() if path.exists() else []
    for line in reversed(lines):
        try:
            return int(json.loads(line)["iteration"])
        except ValueError:  # cut off by a kill
            continue
    return 0


def outcome(out: Path) -> tuple[str, list[tuple[int, str]]]:
    """SHA-256 of the final state, and the loss of every step to the last bit."""
    from arriero.checkpoint.digest import state_sha256
    from arriero.checkpoint.layout import step_directory
    from arriero.checkpoint.verify import verify
    from arriero.observe.metrics import read_metrics

    final = step_directory(out / "checkpoints", STEPS)
    if wrong := verify(final):
        raise CheckFailed("\n".join(wrong))
    losses = [(m["iteration"], repr(m["lm_loss"])) for m in read_metrics(out / "metrics.jsonl") if m["kind"] == "step"]
    return state_sha256(final), losses


def largest_difference(a: Path, b: Path) -> float:
    """Between two states, relative to each tensor's norm."""
    from arriero.checkpoint.load import CheckpointReader

    one, other = CheckpointReader(a), CheckpointReader(b)
    return max(
        ((x - y).norm() / y.norm().clamp_min(1e-300)).item()
        for x, y in ((one.read(key), other.read(key)) for key in other.keys())  # noqa: SIM118
    )


def report(args: TortureArgs, peace: object, tally: Tally, others: dict[str, float], seconds: float) -> int:
    """Prints the verdict; raises CheckFailed if a run ended otherwise than in peace."""
    from arriero.train.verify import LIMIT

    wrong = sum(outcome != json.dumps(peace) for outcome in tally.sha256)
    same_elsewhere = all(value <= LIMIT for value in others.values())
    sha256 = json.loads(json.dumps(peace))[0]
    facts = {
        "kills": dict(tally.kills), "resumes": tally.resumes, "lost steps": tally.lost_steps,
        "runs completed": tally.runs, "runs that ended otherwise": wrong, "sha256": sha256,
        "other layouts": others, "seconds": round(seconds, 1),
    }  # fmt: skip
    if args.json:
        print(json.dumps(facts, indent=1))
    else:
        table = Table("killed", "times", box=None)
        for kind, text in KINDS.items():
            table.add_row(text, str(tally.kills[kind]))
        console = Console(soft_wrap=True)
        console.print(table)
        print(f"{tally.kills.total()} kills, {tally.resumes} new starts, {tally.lost_steps} steps done twice, "
              f"{tally.runs} runs completed in {seconds:.0f} s")  # fmt: skip
        for name, value in others.items():
            print(f"resumed from step {EVERY * (STEPS // EVERY // 2)} on {name}: final state within {value:.1e}")
        print(f"final SHA-256 {sha256}: {'never changed' if not wrong else f'CHANGED in {wrong} runs'}")
    if wrong or not same_elsewhere:
        raise CheckFailed(f"{wrong} of {tally.runs} runs ended otherwise; other layouts: {others}, limit {LIMIT:g}")
    return EXIT_OK
