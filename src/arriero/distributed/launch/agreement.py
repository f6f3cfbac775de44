"""Before the first step: do all processes run the same recipe, code and data?

Each writes what it has into the job's store, as JSON; rank 0 compares and tells all. A difference is named with the
ranks and hosts on each side of it, instead of a hang or a loss that is quietly wrong.
"""

from __future__ import annotations

import json
import socket
import time
from datetime import timedelta
from typing import TYPE_CHECKING

from arriero.common.errors import UserError
from arriero.common.text import format_ranks

if TYPE_CHECKING:
    from torch.distributed import Store


class Disagreement(UserError):  # noqa: N818 - a kind of UserError
    """An error that every process has in the same words: one of them need tell it."""


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
        text = f"{world - len(missing)} of {world} processes arrived in {seconds:g} s; missing: {format_ranks(missing)}"
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
            lines.append(f"  {key}: " + "; ".join(f"{v} on {format_ranks(r)} ({where[v]})" for v, r in sides.items()))
    return lines
