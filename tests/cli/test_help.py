"""Help: complete or one section of it, without boxes in a pipe; completion of what the help lists."""

from __future__ import annotations

import subprocess

import pytest

from arriero.cli import main as cli
from arriero.cli.completion import completion_script, verb_flags
from arriero.common.errors import UserError
from arriero.train.recipe import bundled_directory
from programs import arriero


def help_of(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as caught:
        cli.run_verb(words[0], [*words[1:]])
    assert caught.value.code == 0
    return capsys.readouterr().out


def test_a_section_alone(capsys: pytest.CaptureFixture[str]) -> None:
    section = help_of(capsys, "pretrain", "--help", "parallel")
    assert "--parallel.tensor-parallel" in section
    assert "--train.steps" not in section
    assert "--nodes" in help_of(capsys, "pretrain", "--help", "launch")
    own = help_of(capsys, "pretrain", "--help", "recipe")
    assert "--seed" in own
    assert "--data.prefix" not in own
    start = help_of(capsys, "pretrain", "--help", "start")
    assert "--resume" in start
    assert "--nodes" not in start
    assert "--iterations" in help_of(capsys, "bench", "--help", "bench")
    with pytest.raises(UserError, match="did you mean 'parallel'"):
        cli.run_verb("pretrain", ["--help", "paralel"])


def test_the_complete_help_has_every_flag_and_every_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    printed = help_of(capsys, "pretrain", "--help")
    flags = verb_flags("arriero.cli.pretrain", "PretrainArgs")
    assert len(flags) > 80
    assert [key for key in flags if f"{key.replace('--launch.', '--')} " not in printed] == []
    for path in bundled_directory().glob("*.toml"):
        assert path.stem in printed


def test_no_boxes_in_a_pipe() -> None:
    for words in (["pretrain", "--help"], ["generate", "--help"], ["launch", "slurm", "--help"], ["bench", "--help"]):
        assert arriero(*words).isascii(), words


COMPLETED = {
    "verb": (["pre"], "prepare pretrain"),
    "flag": (["pretrain", "demo", "--parallel.ten"], "--parallel.tensor-parallel"),
    "choice": (["pretrain", "--train.dtype", "bf"], "bfloat16"),
    "choices": (["pretrain", "--train.dtype", "f"], "float32 float16 float64"),
    "truth": (["bench", "--train.compile", ""], "true false"),
    "recipe": (["pretrain", "dem"], "demo"),
    "kind": (["launch", ""], "slurm"),
    "another verb's flag": (["doctor", "--j"], "--json"),
    "shell": (["completion", ""], "bash zsh"),
    "file": (["inspect", "runs/"], ""),
}


@pytest.fixture(scope="module")
def script() -> str:
    return completion_script()


@pytest.mark.parametrize("name", COMPLETED)
def test_completion(script: str, name: str) -> None:
    words, expected = COMPLETED[name]
    given = " ".join(f"'{word}'" for word in ["arriero", *words])
    command = f'{script}\nCOMP_WORDS=({given}); COMP_CWORD={len(words)}; _arriero; echo "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert done.stdout.strip() == expected


def test_every_verb_is_completed(script: str) -> None:
    for verb in cli.VERBS:
        assert f'"{verb} -"*) words="' in script
