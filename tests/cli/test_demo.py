"""The demo's own decisions, without its training: what it runs, what ends it, and the commands that it prints."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from arriero.cli import demo
from arriero.cli.demo import LIMIT, DemoArgs, program, run
from arriero.cli.main import dispatch
from arriero.data.demo_corpus import CorpusStats


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """What the demo runs, recorded instead of run; the text and the tokenizer are left out."""
    ran: list[list[str]] = []

    def start(words: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        ran.append(words[words.index("arriero") + 1 :])
        return subprocess.CompletedProcess(words, CODES.get(ran[-1][0], 0))

    CODES.clear()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "write_corpus", lambda path: CorpusStats(1, 1))
    monkeypatch.setattr(demo, "corpus_texts", lambda path: [])
    monkeypatch.setattr(demo, "train_tokenizer", lambda texts, directory, size: directory.mkdir(parents=True))
    monkeypatch.setattr(subprocess, "run", start)
    return ran


CODES: dict[str, int] = {}
"""Exit codes of the verbs that are to fail."""


def test_the_whole_way(commands: list[list[str]]) -> None:
    assert run(DemoArgs()) == 0
    verbs = [words[0] for words in commands]
    assert verbs == ["prepare", "pretrain", "pretrain", "pretrain", "compare", "export", "generate"]
    assert all("float64" in words for words in commands[2:4])
    assert commands[4][commands[4].index("--max-rel") + 1] == LIMIT


def test_a_failed_comparison_does_not_end_it_and_decides_the_exit_code(
    commands: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    CODES["compare"] = 1
    assert run(DemoArgs()) == 1
    assert [words[0] for words in commands][-2:] == ["export", "generate"]
    assert "FAILED: the comparison ended with exit code 1" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize("verb", ["prepare", "pretrain", "export", "generate"])
def test_a_step_that_others_need_ends_it(
    commands: list[list[str]], verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    CODES[verb] = 2
    assert dispatch(["demo"]) == 1
    assert commands[-1][0] == verb
    assert f"arriero {verb} ended with exit code 2" in capsys.readouterr().err


def test_the_printed_commands_are_the_ones_that_are_run_and_parse(
    commands: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path("a directory/demo")
    assert run(DemoArgs(out=out)) == 0
    printed = capsys.readouterr().out.splitlines()
    lines = [shlex.split(line[2:]) for line in printed if line.startswith("$ ")]
    assert [line[-len(words) :] for line, words in zip(lines, commands, strict=True)] == commands
    following = [line for line in printed[printed.index("Next:") :] if line.startswith("  ")]
    assert len(following) == 4
    assert all(str(out) in " ".join(shlex.split(line, comments=True)) for line in following)


def test_the_program_is_what_the_shell_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for where in (tmp_path / "my env" / "bin", tmp_path / ".venv" / "bin"):
        where.mkdir(parents=True)
        (where / "arriero").touch(mode=0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv" / "bin" / "python"))
    monkeypatch.setenv("PATH", "/usr/bin")
    assert program() == ".venv/bin/arriero"
    monkeypatch.setenv("PATH", str(tmp_path / ".venv" / "bin"))
    assert program() == "arriero"
    monkeypatch.setenv("PATH", str(tmp_path / "my env" / "bin"))  # another one
    assert program() == ".venv/bin/arriero"
    monkeypatch.setattr(sys, "executable", str(tmp_path / "my env" / "bin" / "python"))
    monkeypatch.setenv("PATH", "/usr/bin")
    assert program() == "'my env/bin/arriero'"
    monkeypatch.setattr(sys, "executable", "/opt/a b/python")
    assert program() == "'/opt/a b/python' -m arriero"


@pytest.mark.parametrize("name", ["x" * 300, "x/" * 3000, "a\0b", "file", "file/inside", "full"])
def test_a_directory_that_cannot_be_used_is_a_sentence(
    commands: list[list[str]], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("file").touch()
    Path("full").mkdir()
    Path("full/notes").touch()
    for words in (["demo", "--out", name], ["demo", "--out", name, "--overwrite"]):
        assert dispatch(words) == 2
        assert capsys.readouterr().err.startswith("arriero: ")
    assert Path("full/notes").exists()
    assert commands == []


@pytest.mark.parametrize("steps", [0, -1, 2**70])
def test_steps_have_a_range(commands: list[list[str]], steps: int) -> None:
    assert dispatch(["demo", "--steps", str(steps)]) == 2
    assert commands == []
