"""Runs that several tests go on from, each with a copy of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from arriero.cli.main import dispatch
from arriero.common.errors import EXIT_OK
from toy import write_recipe


@pytest.fixture(scope="session")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps with three checkpoints; its recipe lies beside it. Not to be changed."""
    root = tmp_path_factory.mktemp("begun")
    words = ["pretrain", str(write_recipe(root)), "--checkpoint.every", "2", "--checkpoint.keep", "0"]
    assert dispatch(words) == EXIT_OK
    return root / "run"
