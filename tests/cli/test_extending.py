"""A verb of another package, found by its entry point."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import toy
from programs import arriero

EXAMPLE = Path(__file__).parents[2] / "examples/extending/verb.py"


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package `my-package` beside arriero, as pip would install it."""
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package/verb.py").write_text(EXAMPLE.read_text())
    info = tmp_path / "my_package-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[arriero.verbs]\ntokens = my_package.verb:TokensArgs\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")


@pytest.mark.usefixtures("installed")
def test_a_verb_of_another_package(tmp_path: Path) -> None:
    prefix = toy.write_data(tmp_path / "data", documents=3)
    assert json.loads(arriero("tokens", prefix, "--json"))["tokens"] > 0
    arriero("tokens", prefix, "--at-least", 10**9, code=1)
    assert "--at-least is -1" in arriero("tokens", prefix, "--at-least", -1, code=2)
    assert "The data set's prefix." in arriero("tokens", "--help")
    assert "from the package my-package" in arriero("--help")


def test_the_example_is_short() -> None:
    assert len(EXAMPLE.read_text().splitlines()) <= 80
