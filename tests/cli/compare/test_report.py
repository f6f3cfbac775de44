"""Reports and messages of runs with hostile names: nothing in them is markup, and every path ends in a sentence."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arriero.cli.compare import report
from arriero.cli.compare.command import CompareArgs, run
from arriero.cli.compare.report import _html, _markdown, as_json, markdown, shell, write_report
from arriero.cli.main import dispatch
from arriero.common.errors import UserError
from arriero.observe.compare import compare_runs
from arriero.observe.curves.curve import Curves

NASTY = ["a|b", "`rm`", "<b onclick=x>", "a\nb", "\x1b[31mred", "$x$", "$\\frac{$", "*_x_*", "[l](http://x)", "# h",
         "&amp;", "-x", "a'b", "\udcff", "1. x", "www.x.com", "\u202egnp", "日本語"]  # fmt: skip


def curves(path: str, name: str = "lm_loss") -> Curves:
    return Curves(Path(path), {"lm_loss": {1: 8.5, 2: 8.0}, name: {1: 1.0, 2: 2.0}}, "CSV")


@pytest.mark.parametrize("name", NASTY)
def test_no_name_is_markup_in_a_report(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if "$" not in name:  # a figure costs a second, and dollars alone are markup in it
        monkeypatch.setattr(report, "_draw", lambda verdict, path: path.write_bytes(b""))
    other = curves(f"other {name}")
    other.columns["lm_loss"][3] = 7.0  # so that a note names the path
    verdict = compare_runs(curves(name), other, max_rel=0.5)
    write_report(verdict, tmp_path)
    text = (tmp_path / "compare.md").read_text(encoding="utf-8")
    same = _markdown(compare_runs(curves("plain"), Curves(Path("other plain"), other.columns, "CSV"), max_rel=0.5))
    assert text.count("\n") == same.count("\n")
    assert re.findall(r"(?<!\\)[|`<#*\[]", without_command(text)) == re.findall(
        r"(?<!\\)[|`<#*\[]", without_command(same)
    )
    page = (tmp_path / "compare.html").read_text(encoding="utf-8")
    plain = _html(verdict, b"").replace(name, "")
    assert re.findall(r"<[a-z/!]", page) == re.findall(r"<[a-z/!]", plain)
    assert "\x1b" not in text + page


def without_command(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if not line.startswith("    arriero"))


@given(st.text())
def test_markdown_of_any_text_is_one_line_without_markup(text: str) -> None:
    line = markdown(text)
    assert len(line.splitlines()) <= 1
    assert not re.search(r"(?<!\\)(?:\\\\)*[|`<>#*\[\]~]", line)


@pytest.mark.parametrize("name", NASTY)
def test_the_printed_command_has_the_very_path(name: str) -> None:
    if name == "\udcff":
        name = b"\xff".decode("utf-8", "surrogateescape")
    done = subprocess.run(["bash", "-c", f"printf %s {shell(Path(name))}"], capture_output=True, check=True)
    assert done.stdout.decode("utf-8", "surrogateescape").removeprefix("./") == str(Path(name))
    assert shell(Path(name)).isprintable()


PATHS = ["x" * 300, "x" * 5000, "a\0b", "\udc80", "no/such", ".", "/dev/null", "/dev/zero", "file.csv/inside"]


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("place", ["a", "b", "out"])
def test_a_path_that_cannot_be_used_is_a_sentence(
    tmp_path: Path, name: str, place: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.csv").write_text("step,loss\n1,2\n")
    (tmp_path / "pipe").unlink(missing_ok=True)
    words = {"a": "file.csv", "b": "file.csv", "out": "report"} | {place: name}
    code = dispatch(["compare", words["a"], words["b"], "--out", words["out"]])
    printed = capsys.readouterr()
    if place == "out" and name in ("\udc80", "no/such", "."):  # names that a directory may have
        assert code == 0
        return
    assert code == 2
    assert printed.err.startswith("arriero: ")
    assert "fix: " in printed.err
    assert len(printed.err) < 2000


def test_what_is_foreign_reaches_the_terminal_as_escapes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "\x1b[31mlog"
    log.write_text(
        " iteration 1/ 2 | elapsed time per iteration (ms): 1 | lm loss: 1 | \x1b]0;title\x07evil\x08\x9b31m: 5 |\n"
    )
    metrics = tmp_path / "m.jsonl"
    metrics.write_text('{"step": 1, "loss": 1, "\\u001b[31mred": 2, "a|b": 3}\n')
    run(CompareArgs(log, metrics))
    with pytest.raises(UserError, match="no x") as raised:
        run(CompareArgs(log, metrics, quantity=("x",)))
    printed = capsys.readouterr().out + str(raised.value).replace(str(log), "")
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", printed)


@pytest.mark.parametrize("value", [1e308, -1e308, 5e-324, 1e-200, 0.0])
def test_numbers_at_the_ends_of_their_range(tmp_path: Path, value: float) -> None:
    a = Curves(Path("a"), {"lm_loss": {1: value, 2: -value, 3: value}}, "CSV")
    b = Curves(Path("b"), {"lm_loss": {1: -value, 2: value, 3: 1.0}}, "CSV")
    verdict = compare_runs(a, b)
    write_report(verdict, tmp_path / "out")
    json.loads(json.dumps(as_json(verdict)), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
