"""Each optional package is used by something, and each pinned version is of a package that something installs."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest

from arriero.cli.doctor import _EXTRAS

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
MODULES = {"torch-npu": "torch_npu", "pytest-timeout": "timeout", "import-linter": "importlinter"}
USERS = {
    "bench": ["benchmarks/*.py"],
    "docs": ["tests/*.py"],
    "dev": ["tests/**/*.py", "src/**/*.py", "Makefile", "pyproject.toml"],
}
"""Where the packages of an extra are used; those of all others are imported by the product."""


def name(requirement: str) -> str:
    return re.split(r"[<>=!~\[; (]", requirement)[0].lower().replace("_", "-")


def texts(patterns: list[str]) -> str:
    return "\n".join(p.read_text(encoding="utf-8") for pattern in patterns for p in sorted(ROOT.glob(pattern)))


NEEDED_BY_ANOTHER = {"accelerate"}  # transformers' Trainer imports it


@pytest.mark.parametrize(("extra", "package"), [(e, name(line)) for e, lines in EXTRAS.items() for line in lines])
def test_every_optional_package_is_used(extra: str, package: str) -> None:
    module = MODULES.get(package, package.replace("-", "_"))
    found = texts(USERS.get(extra, ["src/**/*.py"]))
    imported = rf"^\s*(?:import|from) {module}\b|import_module\(\"{module}\b|find_spec\(\"{module}\b"
    used = rf"{imported}|\(BIN\)/{module}\b|^{module} = |\[tool\.{module}\b" if extra == "dev" else imported
    assert package in NEEDED_BY_ANOTHER or re.search(used, found, re.M), f"nothing uses {package} of [{extra}]"


@pytest.mark.parametrize("package", [name(line) for line in PROJECT["dependencies"]])
def test_every_dependency_is_used(package: str) -> None:
    assert re.search(rf"^\s*(?:import|from) {package.replace('-', '_')}\b", texts(["src/**/*.py"]), re.M)


def test_doctor_knows_what_each_extra_is_for() -> None:
    assert set(_EXTRAS) == EXTRAS.keys() - USERS.keys()


def test_every_pin_is_of_a_package_that_is_installed_by_something() -> None:
    pins = {name(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    named = {name(line) for lines in [PROJECT["dependencies"], *EXTRAS.values()] for line in lines}
    for package in sorted(pins - named):
        assert package in texts(["Makefile"]) or package in needed_by(named), f"nothing installs {package}"


def needed_by(packages: set[str]) -> set[str]:
    """What those of the packages that are installed require themselves."""
    lines = [r for d in importlib.metadata.distributions() if name(d.name) in packages for r in d.requires or []]
    return {name(line) for line in lines}


def test_pages_offer_no_extra_that_is_not_there() -> None:
    pages = texts(["README.md", "docs/*.md", "src/**/*.py"])
    assert set(re.findall(r"arriero\[([a-z0-9-]+)\]", pages)) <= EXTRAS.keys()
