"""The docs state only what runs: every `$ ` line of a console block is executed, in order, in an empty directory."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from arriero.cli import VERBS

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def actions(page: Path) -> list[tuple[str, str]]:
    """What a reader does, in order: ("write NAME", text) for "`NAME`:" before a block, ("run", command)."""
    found: list[tuple[str, str]] = []
    pattern = re.compile(r"(?:^`([\w./-]+)`:\n\n)?^```(\w+)\n(.*?)^```", re.M | re.S)
    for name, kind, body in pattern.findall(page.read_text(encoding="utf-8")):
        if kind == "console":
            lines = body.replace("\\\n", " ").splitlines()
            found += [("run", line[2:]) for line in lines if line.startswith("$ ")]
        elif name:
            found.append((f"write {name}", body))
    return found


@pytest.mark.parametrize("page", [p for p in PAGES if actions(p)], ids=lambda p: p.name)
def test_every_command_works(page: Path, tmp_path: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "COLUMNS": "100"}
    for action, text in actions(page):
        if action != "run":
            (tmp_path / action.removeprefix("write ")).write_text(text, encoding="utf-8")
            continue
        done = subprocess.run(
            ["bash", "-c", text], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{page.name}: $ {text}\n{done.stdout}{done.stderr}"


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"


def test_every_verb_has_its_page() -> None:
    for verb in VERBS:
        text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
        assert f"arriero {verb}" in text, f"no page shows arriero {verb}"


def test_the_readme_lists_the_verbs_as_the_program_does() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name, verb in VERBS.items():
        assert f"| `arriero {name}` | {verb.summary} |" in readme
