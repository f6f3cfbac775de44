"""Lets tests import the helpers beside this file and those that several parts use; gives tiny models one thread."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
HELPERS = ("checkpoint", "checkpoint/formats", "data", "distributed/parallel")
sys.path[:0] = [str(HERE), *(str(HERE / part) for part in HELPERS)]
# Before torch is imported, and inherited by every process that a test starts: a second thread costs more than it does.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("ARRIERO_THREADS", "1")
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a shell's background job: what it starts would ignore Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

settings.register_profile("busy", deadline=None)  # a busy machine is no failure
settings.load_profile("busy")


def rank_variables() -> dict[str, str]:
    """The variables that say which process of which run this is."""
    names = (
        "ARRIERO_",
        "RANK",
        "LOCAL_",
        "WORLD_SIZE",
        "MASTER_",
        "GROUP_",
        "ROLE_",
        "TORCHELASTIC_",
        "SLURM_",
        "NNODES",
        "NODE_RANK",
    )
    return {name: value for name, value in os.environ.items() if name.startswith(names)}


LONGEST = (
    "distributed/parallel/test_layouts.py",
    "test_docs.py",
    "distributed/launch/test_launcher.py",
    "distributed/parallel/test_compiled.py",
    "cli/torture/test_torture.py",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Under `pytest -n` the longest files come first, so that no worker is left alone with one of them at the end."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        names = {HERE / name: place for place, name in enumerate(LONGEST)}
        items.sort(key=lambda item: names.get(item.path, len(names)))


@pytest.fixture(autouse=True)
def no_rank_variable_stays() -> Iterator[None]:
    """Fails a test that leaves such a variable behind: later tests, and what they start, would take it as theirs."""
    before = rank_variables()
    yield
    assert rank_variables() == before
