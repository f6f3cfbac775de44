"""Before the first step: do all processes run the same recipe, code and data?

Each process writes its facts, a dictionary of texts, to the job's store as JSON; rank 0 compares them and publishes the
result. A difference is reported with the ranks and hosts on each side, instead of a hang or a loss that is wrong.
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
    """The same error on every process: one of them reports it."""


def check_agreement(store: Store, rank: int, world_size: int, facts: dict[str, str], *, seconds: float) -> None:
    """Returns once all processes have written the same facts.

    Raises:
        Disagreement: the same on every process: what differs and where, or which ranks did not arrive in time.
    """
    store.set(f"facts/{rank}", json.dumps({"host": socket.gethostname(), "facts": facts}))
    if rank == 0:
        problem, fix = _compare_facts(store, world_size, seconds)
        store.set("facts-result", json.dumps([problem, fix]))
        if problem:  # where rank 0 hosts the store, it stays until the others have read the result
            deadline = time.monotonic() + 3
            while store.add("facts-result-read", 0) < world_size - 1 and time.monotonic() < deadline:
                time.sleep(0.05)
    else:
        try:
            store.wait(["facts-result"], timedelta(seconds=seconds + 10))
        except RuntimeError:
            problem = f"rank {rank} had no answer from rank 0 in {seconds:g} s"
            raise UserError(problem, "look at rank 0's log") from None
        problem, fix = json.loads(store.get("facts-result"))
        store.add("facts-result-read", 1)
    if problem:
        raise Disagreement(problem, fix)


def _compare_facts(store: Store, world_size: int, seconds: float) -> tuple[str, str]:
    """The problem and its fix; empty texts if all ranks agree."""
    keys = [f"facts/{r}" for r in range(world_size)]
    try:
        store.wait(keys, timedelta(seconds=seconds))
    except RuntimeError:
        missing = [r for r, key in enumerate(keys) if not store.check([key])]
        arrived = f"{world_size - len(missing)} of {world_size} processes arrived in {seconds:g} s"
        return (
            f"{arrived}; missing: {format_ranks(missing)}",
            "look at the logs of the missing; --join-timeout waits longer",
        )
    records = [json.loads(text) for text in store.multi_get(keys)]
    lines = differences([r["facts"] for r in records], [r["host"] for r in records])
    if not lines:
        return "", ""
    return "the processes do not agree:\n" + "\n".join(lines), "give every node the same recipe, code and data"


def differences(facts: list[dict[str, str]], hosts: list[str]) -> list[str]:
    """One line for each key on which the ranks differ: its values, and the ranks and hosts that have each.

    Args:
        facts: of each rank.
        hosts: of each rank.
    """
    lines = []
    for key in dict.fromkeys(key for one in facts for key in one):
        ranks_by_value: dict[str, list[int]] = {}
        for rank, one in enumerate(facts):
            ranks_by_value.setdefault(one.get(key, "nothing"), []).append(rank)
        if len(ranks_by_value) > 1:
            sides = []
            for value, ranks in ranks_by_value.items():
                names = ", ".join(dict.fromkeys(hosts[r] for r in ranks))
                sides.append(f"{value} on {format_ranks(ranks)} ({names})")
            lines.append(f"  {key}: " + "; ".join(sides))
    return lines
