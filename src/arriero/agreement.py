"""Before the first step: do all processes run the same recipe, code and data?

Each writes what it has into the job's store, as JSON; rank 0 compares and tells all. A difference is named with the
ranks and hosts on each side of it, instead of a hang or a loss that is quietly wrong.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import socket
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arriero import __version__
from arriero.common.errors import UserError

if TYPE_CHECKING:
    from torch.distributed import Store

    from arriero.recipe import Recipe


class Disagreement(UserError):  # noqa: N818 - a kind of UserError
    """An error that every process has in the same words: one of them need tell it."""


PATHS = ("model", "tokenizer", "data.prefix")
"""Keys that may differ between machines, as long as what lies there is the same."""


def run_facts(recipe: Recipe) -> dict[str, str]:
    """What decides a run, by name: every key of the recipe, versions, and digests of what its paths lead to."""
    import torch

    facts = {"arriero version": __version__, "arriero source": source_digest(), "torch version": torch.__version__}
    facts |= {key: str(value) for key, value in flat(recipe).items() if key not in PATHS}
    facts |= {f"model's {key}": str(value) for key, value in recipe.model_config().to_json().items()}
    return facts | input_digests(recipe)


def input_digests(recipe: Recipe) -> dict[str, str]:
    """Digests of the tokenizer and of each data file, wherever they lie."""
    facts: dict[str, str] = {}
    if recipe.tokenizer:
        facts["tokenizer"] = tokenizer_digest(Path(recipe.tokenizer))
    for number, word in enumerate(recipe.data.prefix.split()):
        for path in sorted(Path(word).parent.glob(f"{Path(word).name}*.idx")):
            facts[f"data {number} {path.name}"] = file_sample(path)
            facts[f"data {number} {path.with_suffix('.bin').name}"] = file_sample(path.with_suffix(".bin"))
    return facts


def flat(part: Any, prefix: str = "") -> dict[str, Any]:
    """Every key of a recipe, dotted, with its value."""
    found: dict[str, Any] = {}
    for f in dataclasses.fields(part):
        value = getattr(part, f.name)
        found |= flat(value, f"{prefix}{f.name}.") if dataclasses.is_dataclass(value) else {prefix + f.name: value}
    return found


def source_digest() -> str:
    """Of arriero's own files, so that two checkouts of one version differ by name."""
    root, total = Path(__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        total.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return total.hexdigest()[:12]


def tokenizer_digest(path: Path) -> str:
    """Of the file that decides the ids."""
    names = [path] if path.is_file() else [path / "tokenizer.json", path / "tokenizer.model"]
    return next((hashlib.sha256(p.read_bytes()).hexdigest()[:12] for p in names if p.is_file()), "missing")


def file_sample(path: Path, part: int = 1 << 20) -> str:
    """Size and a digest of the first and last MiB: it must not read a terabyte."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            total = hashlib.sha256(file.read(part))
            file.seek(max(0, size - part))
            total.update(file.read(part))
    except OSError as error:
        return error.strerror or "unreadable"
    return f"{size} bytes, {total.hexdigest()[:12]}"


def agree(store: Store, rank: int, world: int, facts: dict[str, str], *, seconds: float) -> None:
    """Returns once all `world` processes have shown the same facts.

    Raises:
        Disagreement: on every process the same, naming what differs and where; or who did not come in time.
    """
    mine = {"host": socket.gethostname(), "facts": facts}
    store.set(f"facts/{rank}", json.dumps(mine))
    if rank == 0:
        problem, fix = _judge(store, world, seconds)
        store.set("verdict", json.dumps([problem, fix]))
        if problem:  # where rank 0 hosts the store, it stays until the others have read it
            deadline = time.monotonic() + 3
            while store.add("read", 0) < world - 1 and time.monotonic() < deadline:
                time.sleep(0.05)
    else:
        try:
            store.wait(["verdict"], timedelta(seconds=seconds + 10))
        except RuntimeError:
            raise UserError(f"rank 0 said nothing to rank {rank} in {seconds:g} s", "look at rank 0's log") from None
        problem, fix = json.loads(store.get("verdict"))
        store.add("read", 1)
    if problem:
        raise Disagreement(problem, fix)


def _judge(store: Store, world: int, seconds: float) -> tuple[str, str]:
    """The problem and its fix, or two empty strings."""
    keys = [f"facts/{r}" for r in range(world)]
    try:
        store.wait(keys, timedelta(seconds=seconds))
    except RuntimeError:
        missing = [r for r, key in enumerate(keys) if not store.check([key])]
        text = f"{world - len(missing)} of {world} processes arrived in {seconds:g} s; missing: {ranges(missing)}"
        return text, "look at the logs of the missing; --join-timeout waits longer"
    told = [json.loads(text) for text in store.multi_get(keys)]
    lines = differences([t["facts"] for t in told], [t["host"] for t in told])
    if not lines:
        return "", ""
    return "the processes do not agree:\n" + "\n".join(lines), "give every node the same recipe, code and data"


def differences(facts: list[dict[str, str]], hosts: list[str]) -> list[str]:
    """One line for each key on which the ranks differ: its values, and the ranks and hosts that have each."""
    lines = []
    for key in dict.fromkeys(key for one in facts for key in one):
        sides: dict[str, list[int]] = {}
        for rank, one in enumerate(facts):
            sides.setdefault(one.get(key, "nothing"), []).append(rank)
        if len(sides) > 1:
            where = {v: ", ".join(dict.fromkeys(hosts[r] for r in ranks)) for v, ranks in sides.items()}
            lines.append(f"  {key}: " + "; ".join(f"{v} on {ranges(r)} ({where[v]})" for v, r in sides.items()))
    return lines


def ranges(ranks: list[int]) -> str:
    """[0, 1, 2, 5] -> "ranks 0-2, 5"."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and runs[-1][-1] == rank - 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    text = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"rank {text}" if len(ranks) == 1 else f"ranks {text}"
