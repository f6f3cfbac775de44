"""The help of every verb shows a flag under the word that its description is about."""

from __future__ import annotations

import dataclasses
import importlib
import re
from typing import get_type_hints

import pytest

from arriero.cli.main import VERBS, dispatch

RECIPE_VERBS = {"pretrain", "bench", "launch"}


@pytest.mark.parametrize("name", [name for name in VERBS if name not in RECIPE_VERBS])
def test_no_flag_is_shown_by_its_negative_alone(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    verb = VERBS[name]
    arguments = getattr(importlib.import_module(verb.module), verb.arguments)
    hints = get_type_hints(arguments)
    flags = [f.name.replace("_", "-") for f in dataclasses.fields(arguments) if hints[f.name] is bool]
    with pytest.raises(SystemExit):
        dispatch([name, "--help"])
    text = capsys.readouterr().out
    for flag in flags:
        assert re.search(rf"--{flag}, --no-{flag}\b", text), flag
        on = next(f.default for f in dataclasses.fields(arguments) if f.name.replace("_", "-") == flag)
        described = f"(on by default; --no-{flag} turns it off)" if on else "(off by default)"
        after = text.partition(f"--{flag}, --no-{flag}")[2].partition(", --no-")[0]
        assert described in " ".join(after.split()), flag
