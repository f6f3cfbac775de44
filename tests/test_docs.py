"""The docs state only what runs.

Every `$ ` line of a console block is executed, in order, in an empty directory, by a login shell of its own with
nothing of this test's environment. On the README's page and for the demo, `arriero` is the installed script; on the
other pages it is a client of the fork server, which saves each command the import of torch. What the block shows below
it must be what was printed, both streams together:

- a line `...` stands for any number of lines, and `...` within a line for any text;
- after the comment `<!-- numbers vary -->` above a block, each number in it stands for any number.

Text blocks hold commands that cannot run here; their verbs and options must exist.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import fork_server
from arriero.cli.main import VERBS
from arriero.common.settings import field_types
from arriero.train.recipe import Recipe
from programs import fork_server_socket

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = sorted([README, *(ROOT / "docs").glob("*.md")])
ACTIVATE = ". .venv/bin/activate"
DEMO = "arriero demo --out demo --steps 12 > /dev/null"
"""Several pages begin with it, in an empty directory; it is run once and its result copied."""
NUMBER = re.compile(r"(?<![A-Za-z0-9_.-])[+-]?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?")


@dataclass
class Action:
    """What a reader does: writes a file, or runs a command and looks at what it prints."""

    command: str
    """Empty: `text` is the content of `name`."""
    name: str = ""
    text: str = ""
    """What the page shows below the command; empty: nothing is said of it."""
    numbers_vary: bool = False


def actions(page: Path) -> list[Action]:
    """The page from top to bottom: "`NAME`:" before a block is a file to write, a console block is to be run."""
    found: list[Action] = []
    pattern = re.compile(r"(?:^`([\w./-]+)`:\n\n)?(<!-- numbers vary -->\n+)?^```(\w+)\n(.*?)^```", re.M | re.S)
    for name, vary, kind, body in pattern.findall(page.read_text(encoding="utf-8")):
        if kind == "console":
            for line in re.sub(r"\\\n\s*", "", body).splitlines(keepends=True):
                if line.startswith("$ "):
                    found.append(Action(line[2:].strip(), numbers_vary=bool(vary)))
                else:
                    found[-1].text += line
        elif name:
            found.append(Action("", name, body))
    return found


def fits(shown: str, printed: str, *, numbers_vary: bool) -> bool:
    """Whether `printed` is what `shown` says, with its wildcards; blanks at the end of a line do not count."""
    lines = []
    for line in shown.rstrip().splitlines():
        if line.strip() == "...":
            lines.append(r"(?:.*\n)*?")
            continue
        parts = [re.escape(part) for part in line.rstrip().split("...")]
        if numbers_vary:
            parts = [varying(part) for part in line.rstrip().split("...")]
        lines.append(".*".join(parts) + r"[ \t]*\n")
    return re.fullmatch("".join(lines), printed.rstrip() + "\n") is not None


def varying(text: str) -> str:
    """A pattern for `text` in which each number is any number, and blanks before it any number of blanks."""
    pattern, at = "", 0
    for match in NUMBER.finditer(text):
        pattern += re.sub(r"(?:\\ )+$", " *", re.escape(text[at : match.start()])) + NUMBER.pattern
        at = match.end()
    return pattern + re.escape(text[at:])


@pytest.fixture(scope="session")
def shell() -> dict[str, str]:
    """What a user's login shell has, and no more; PYTHONPATH stays, for a developer's other work tree."""
    bare = {"HOME": os.environ.get("HOME", "/"), "TERM": "dumb", "OMP_NUM_THREADS": "1", "ARRIERO_THREADS": "1"}
    return bare | {key: os.environ[key] for key in ("PYTHONPATH",) if key in os.environ}


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory, shell: dict[str, str]) -> Path:
    """The directory `demo` that DEMO makes."""
    at = prepared(tmp_path_factory.mktemp("demo"))
    done = run(DEMO, at, shell)
    assert done.returncode == 0, done.stdout
    return at / "demo"


def prepared(directory: Path) -> Path:
    """A directory with `.venv`, as `make demo` leaves it, which is the one that runs the tests."""
    if not Path(sys.prefix, "bin", "activate").exists():
        pytest.skip("this Python is in no virtual environment, so that there is none to activate")
    (directory / ".venv").symlink_to(sys.prefix)
    return directory


def forked_arriero() -> str:
    """A shell function `arriero` that runs its words in a process forked from one that has imported torch."""
    client = shlex.join([sys.executable, "-IS", fork_server.__file__, fork_server_socket()])
    return f'arriero() {{ {client} "$@"; }}\n'


def run(command: str, directory: Path, shell: dict[str, str], arriero: str = "") -> subprocess.CompletedProcess[str]:
    """Runs a command as the shell does in which the README's first line has been typed."""
    lines = f"{ACTIVATE}\nexport COLUMNS=100\n{arriero}{command}\n"
    return subprocess.run(
        ["bash", "--login", "-c", lines], cwd=directory, env=shell, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, timeout=1800, check=False,
    )  # fmt: skip


@pytest.mark.timeout(3600)  # a busy machine is no failure
@pytest.mark.parametrize("page", [p for p in PAGES if any(a.command for a in actions(p))], ids=lambda p: p.name)
def test_every_command_works_and_prints_what_is_shown(
    page: Path, tmp_path: Path, shell: dict[str, str], request: pytest.FixtureRequest
) -> None:
    prepared(tmp_path)
    arriero = "" if page == README else forked_arriero()
    for action in actions(page):
        if not action.command:
            (tmp_path / action.name).write_text(action.text, encoding="utf-8")
        elif action.command == DEMO:
            shutil.copytree(request.getfixturevalue("demo"), tmp_path / "demo")
        else:
            done = run(action.command, tmp_path, shell, arriero)
            assert done.returncode == 0, f"{page.name}: $ {action.command}\n{done.stdout}"
            if action.text:
                same = fits(action.text, done.stdout, numbers_vary=action.numbers_vary)
                assert same, f"{page.name}: $ {action.command}\n{done.stdout}\nThe page shows:\n{action.text}"


def test_the_readme_says_how_a_plain_shell_finds_the_program() -> None:
    first = next(action for action in actions(README) if action.command)
    assert first.command == ACTIVATE


@pytest.mark.parametrize(
    ("shown", "printed", "numbers_vary", "same"),
    [
        ("a 1\n", "a 1\n", False, True),
        ("a 1\n", "a 2\n", False, False),
        ("a 1\n", "a 1\nb\n", False, False),
        ("a 1\n...\n", "a 1\nb\nc\n", False, True),
        ("a ... z\n", "a bcd z  \n", False, True),
        ("a  1.5e-3, x\n", "a 1,234, x\n", True, True),
        ("a 1 x\n", "a 2 y\n", True, False),
        ("v2 1\n", "v3 1\n", True, False),
    ],
)
def test_the_comparison_of_outputs(shown: str, printed: str, numbers_vary: bool, same: bool) -> None:
    assert fits(shown, printed, numbers_vary=numbers_vary) == same


def text_commands(page: Path) -> list[str]:
    """Every line of a text block that calls arriero, continued lines joined."""
    blocks = re.findall(r"^```(?:text|sh)\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    lines = re.sub(r"\\\n\s*", "", "".join(blocks)).splitlines()
    return [line.removeprefix("$ ") for line in lines if re.match(r"(\$ )?([A-Z_]+=\S+ )*arriero ", line)]


def test_commands_in_text_blocks_have_verbs_and_options_that_exist() -> None:
    sources = "\n".join(p.read_text(encoding="utf-8") for p in sorted((ROOT / "src" / "arriero").rglob("*.py")))
    keys = field_types(Recipe)
    for page in PAGES:
        for line in text_commands(page):
            words = [word for word in shlex.split(line, comments=True) if not re.match(r"[A-Z_]+=", word)]
            assert words[1] in VERBS, f"{page.name}: {line}"
            for word in words[2:]:
                option = word.removeprefix("--").partition("=")[0]
                if not word.startswith("--") or not option:
                    continue
                field = option.replace("-", "_")
                known = field in keys or re.search(rf'^    {field}: |"--{option}"', sources, re.M)
                assert known, f"{page.name}: {word} in: {line}"


def test_text_blocks_show_no_output_of_a_command() -> None:
    """A command with its output belongs into a console block, where both are tested."""
    for page in PAGES:
        for block in re.findall(r"^```text\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S):
            assert not re.search(r"^\$ ", block, re.M), f"{page.name}: {block}"


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
